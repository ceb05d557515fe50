"""The two quick starts of the model's documentation run as they stand.

`seed_snippets/*.txt` are word for word from the page. Changed are the import line, the model id, the device, and the
downloads, whose files are here already; every change must find its text.
"""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

from aurora.model.captioner import AuroraConfig
from aurora.model.llama import LlamaConfig
from aurora.model.vision import VisionConfig
from aurora.modeling import AuroraForConditionalGeneration, GenerateOutput
from aurora.processing.image import AuroraImageProcessor, ImageConfig
from aurora.processing.processor import AuroraProcessor
from aurora.processing.text import Tokenizer
from tests.mixed_text import mixed_lines
from tests.processing.clips import decode_plainly, write_clip

SNIPPETS = Path(__file__).parent / "seed_snippets"
EDGE_PX, PATCH_PX, NUM_LAYERS = 56, 7, 4
RATIO = 0.2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights in the Aurora layout, fp16."""
    folder = tmp_path_factory.mktemp("aurora")
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER: ASSISTANT: Describe the image in detail. the video", *mixed_lines(200, seed=2)]),
        model_writer=content,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    tokenizer = Tokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = AuroraConfig(
        vision=VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_layers=NUM_LAYERS,
            num_heads=2,
            patch_size=PATCH_PX,
            image_size=EDGE_PX,
        ),
        text=LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            max_seq_len=1500,
        ),
    )
    AuroraForConditionalGeneration(config).half().save_pretrained(folder)
    AuroraProcessor(AuroraImageProcessor(ImageConfig(image_size=EDGE_PX)), tokenizer).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["AuroraForConditionalGeneration"]
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "sample.mp4", num_frames=45)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "view.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)).save(path)
    return path


def run_snippet(name: str, changes: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Run a snippet with texts replaced; return its variables and what it printed."""
    code = (SNIPPETS / name).read_text()
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    scope: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, name, "exec"), scope)
    return scope, printed.getvalue()


def common_changes(checkpoint: Path, model_id: str) -> dict[str, str]:
    return {
        "from transformers import Aurora": "from aurora import Aurora",
        f'"{model_id}"': repr(str(checkpoint)),
        '"cuda:0"': '"cpu"',
        "import requests\n": "",
    }


def answer(checkpoint: Path, prompt: str, pixels: torch.Tensor) -> tuple[GenerateOutput, str]:
    """The same question asked piece by piece: pixels (1, F, 3, H, W) and the prompt's text."""
    model = AuroraForConditionalGeneration.from_pretrained(checkpoint, torch_dtype="auto")
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    before, after = prompt.split("<image>")
    ids = [*tokenizer.encode(before, add_bos=True), -200, *tokenizer.encode(after)]
    out = model.generate(
        torch.tensor([ids]), pixels.half(), max_new_tokens=1024, token_kept_ratio=RATIO, return_dict=True
    )
    assert isinstance(out, GenerateOutput)
    return out, tokenizer.decode(out.sequences[0])


def num_kept() -> int:
    """Tokens that the reference's rule leaves of a frame, features taken one layer before the last."""
    num_patches = (EDGE_PX // PATCH_PX) ** 2
    r = int(EDGE_PX * EDGE_PX / PATCH_PX**2 * (1 - RATIO) / NUM_LAYERS)
    return num_patches - sum(min(r, (num_patches - r * layer) // 2) for layer in range(NUM_LAYERS - 1))


def test_snippets_are_word_for_word() -> None:
    """A few lines that only the page has, so that nobody tidies the copies up."""
    image, video = (SNIPPETS / "image.txt").read_text(), (SNIPPETS / "video.txt").read_text()
    for code in (image, video):
        assert code.startswith("from transformers import AuroraForConditionalGeneration, AuroraProcessor\n")
        assert "low_cpu_mem_usage=True) \nmodel.to(" in code  # a space at the end of the line
        assert "output = model.generate(**inputs, max_new_tokens=1024, token_kept_ratio=0.2)\n" in code
    assert '{"type": "image"}, # we still use image type for video input' in video
    assert "indices = np.arange(0, total_frames, total_frames / 8).astype(int)" in video
    assert (len(image), len(video)) == (1007, 2144)


def test_image_snippet(checkpoint: Path, photo: Path) -> None:
    download = "Image.open(requests.get(url, stream=True).raw)"
    changes = common_changes(checkpoint, "wchai/AuroraCap-7B-IMG") | {download: f"Image.open({str(photo)!r})"}
    scope, printed = run_snippet("image.txt", changes)
    assert scope["prompt"] == "USER: <image>\nDescribe the image in detail. ASSISTANT:"
    assert scope["inputs"]["pixel_values"].dtype == scope["model"].dtype == torch.float16
    pixels = AuroraImageProcessor.from_pretrained(checkpoint)(Image.open(photo))[None]
    out, text = answer(checkpoint, scope["prompt"], pixels)
    assert printed == text + "\n"
    assert torch.equal(scope["output"], out.sequences)
    assert out.visual_token_counts == [[num_kept()]]
    assert len(text) > 20


def test_video_snippet(checkpoint: Path, clip: Path) -> None:
    code = (SNIPPETS / "video.txt").read_text()
    (download,) = re.findall(r"hf_hub_download\(repo_id.*\)", code)
    changes = common_changes(checkpoint, "wchai/AuroraCap-7B-VID") | {download: repr(str(clip))}
    scope, printed = run_snippet("video.txt", changes)
    frames = decode_plainly(clip)[scope["indices"]]
    assert scope["indices"].tolist() == [0, 5, 11, 16, 22, 28, 33, 39]
    assert np.array_equal(scope["video"], frames)
    pixels = AuroraImageProcessor.from_pretrained(checkpoint).preprocess_frames(frames)[None]
    out, text = answer(checkpoint, scope["prompt"], pixels)
    assert printed == text + "\n"
    assert torch.equal(scope["output"], out.sequences)
    assert out.visual_token_counts == [[num_kept()] * 8]
    assert scope["inputs"]["pixel_values_videos"].shape == (1, 8, 3, EDGE_PX, EDGE_PX)
