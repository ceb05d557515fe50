"""A tiny dataset on disk, and what opens it."""

import json

import numpy as np
from PIL import Image

from aurora.data.datasets import open_data
from aurora.data.records import DataConfig
from aurora.processing.image import AspectRatio, AuroraImageProcessor, ImageConfig


class StubTokenizer:
    """Character c is ord(c) % 200 + 10."""

    bos_id = 1
    eos_id = 2

    def encode(self, text, add_bos=False):
        return [1] * add_bos + [ord(c) % 200 + 10 for c in text]


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def write_jsonl(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def write_image(path, seed=0, size=(28, 28)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_dataset(folder, *, num_images=6, num_clips=3, num_texts=3):
    """Images, clips as lists of two frames, and texts of different lengths."""
    records = []
    for i in range(num_images):
        write_image(folder / f"im/{i}.png", seed=i)
        records.append({"image": f"im/{i}.png", "conversations": turns("<image>\nWhat?", f"Image {'x' * i}.")})
    for i in range(num_clips):
        names = [f"im/c{i}_{f}.png" for f in range(2)]
        for f, name in enumerate(names):
            write_image(folder / name, seed=100 + 10 * i + f)
        records.append({"image": names, "conversations": turns("<image>\nWhat?", f"Clip {i}.", "And?", "Yes.")})
    for i in range(num_texts):
        records.append({"conversations": turns("Hello?", "Hi" + "!" * i)})
    return write_jsonl(folder / "data.jsonl", records)


def four_tokens(num_frames, height_px, width_px):
    return [(height_px // 14) * (width_px // 14)] * num_frames


def opened(path=None, *, aspect=AspectRatio.squash, tokenizer=None, report=None, **settings):
    config = DataConfig(path=None if path is None else str(path), **settings)
    processor = AuroraImageProcessor(ImageConfig(image_size=28, aspect_ratio=aspect))
    return open_data(
        config,
        tokenizer or StubTokenizer(),
        processor,
        tokens_per_placeholder_fn=four_tokens,
        report=report if report is not None else lambda line: None,
    )
