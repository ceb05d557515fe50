"""TinyWorld on disk: a dataset of mp4 clips with conversations.

A dataset folder holds `clips/<split>_<seed>.mp4`, `conversations.jsonl` (LLaVA-style, as training reads it) and
`scenes.jsonl` (the facts behind each clip, as the mini VDC reads them). In the layout of VDC it also holds
`VDC_1k.jsonl` and `VDCScore_qa/`, the published format.
"""

import io
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from .language import STATED_SLOTS, Category, caption_prompts, captions, qa_pairs
from .render import Frames, encode_h264, render_clip, write_mp4
from .scene import SPLITS, Scene, sample_scene

CHUNK_CLIPS = 64
"""Clips a process renders between two notes of progress."""


class Layout(Enum):
    """Files beside the clips and their facts."""

    conversations = "conversations"
    vdc = "vdc"


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """Write TinyWorld clips as mp4, with LLaVA-style conversations and the facts of each clip."""

    folder: str = "tinyworld"
    """Target folder; made if absent."""
    split: str = "train"
    """train, val, test or heldout."""
    num_clips: int = 100
    """Clips to write."""
    first_seed: int = 0
    """Clips have seeds first_seed, first_seed + 1, ..."""
    num_frames: int = 8
    """Frames per clip."""
    image_size: int = 96
    """Side of a frame in pixels, even."""
    fps: int = 4
    """Frames per second of the mp4."""
    crf: int = 20
    """x264 quality, 0 (lossless) to 51."""
    workers: int = 1
    """Processes."""
    layout: Layout = Layout.conversations
    """conversations (for training), or vdc: also the caption and question files of VDC as published."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r}: want one of {', '.join(SPLITS)}")
        for key, low in (("num_clips", 1), ("first_seed", 0), ("num_frames", 1), ("image_size", 16), ("workers", 1)):
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)}: want at least {low}")
        if self.image_size % 2:
            raise ValueError(f"image_size={self.image_size}: want an even number for H.264")


def conversations(scene: Scene, video: str) -> list[dict[str, object]]:
    """LLaVA-style records of one clip: five captions with a prompt each, and one record with all questions.

    Args:
        scene: The clip's scene.
        video: Path of the clip, relative to the dataset's folder.
    """
    rng = np.random.default_rng([31, scene.seed])
    name = Path(video).stem
    records: list[dict[str, object]] = []
    for category, caption in captions(scene, scene.seed).items():
        prompts = caption_prompts(category)
        turns = [(prompts[rng.integers(len(prompts))], caption)]
        records.append(_record(f"{name}_{category.value}", video, turns))
    turns = [(pair.question, pair.answer) for pair in qa_pairs(scene, scene.seed)]
    records.append(_record(f"{name}_questions", video, turns))
    return records


def _record(name: str, video: str, turns: Sequence[tuple[str, str]]) -> dict[str, object]:
    messages = []
    for index, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": question if index else f"<image>\n{question}"})
        messages.append({"from": "gpt", "value": answer})
    return {"id": name, "video": video, "conversations": messages}


def write_dataset(config: DatasetConfig, *, progress: bool = True) -> Path:
    """Write clips, conversations and scenes; clips that are already there are kept, so a killed run can start again.

    Args:
        config: What to write.
        progress: Show a progress bar.

    Returns:
        Path of `conversations.jsonl`, or of `VDC_1k.jsonl` in the layout of VDC.

    Raises:
        ValueError: if the folder holds clips of other settings.
    """
    folder = Path(config.folder)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(config, key) for key in ("num_frames", "image_size", "fps", "crf")}
    _check_settings(folder / "settings.json", settings)
    seeds = list(range(config.first_seed, config.first_seed + config.num_clips))
    chunks = [(config, seeds[start : start + CHUNK_CLIPS]) for start in range(0, len(seeds), CHUNK_CLIPS)]
    for _ in _progress(_spread(_write_clips, chunks, config.workers), len(chunks), "writing clips", progress):
        pass
    scenes = [sample_scene(seed, config.split) for seed in seeds]
    names = [_clip_name(scene) for scene in scenes]
    records = (record for scene, name in zip(scenes, names, strict=True) for record in conversations(scene, name))
    facts = ({"video": name, **scene.to_dict()} for scene, name in zip(scenes, names, strict=True))
    _write_lines(folder / "scenes.jsonl", facts)
    _write_lines(folder / "conversations.jsonl", records)
    if config.layout is Layout.vdc:
        _write_vdc(folder, scenes)
        return folder / "VDC_1k.jsonl"
    return folder / "conversations.jsonl"


def _write_vdc(folder: Path, scenes: Sequence[Scene]) -> None:
    """The captions file and the five question files of VDC; a category asks for every slot that its caption states."""
    (folder / "VDCScore_qa").mkdir(exist_ok=True)
    questions: dict[Category, list[dict[str, object]]] = {category: [] for category in Category}
    rows: list[dict[str, object]] = []
    for scene in scenes:
        name = Path(_clip_name(scene))
        texts = {f"{category.value}_caption": text for category, text in captions(scene, scene.seed).items()}
        rows.append({"video_id": name.stem, "video_name": name.name, **texts})
        pairs = qa_pairs(scene, scene.seed)
        for category, entries in questions.items():
            stated = [pair for pair in pairs if pair.slot in STATED_SLOTS[category]]
            asked = [{"question": pair.question, "answer": pair.answer, "category": pair.slot} for pair in stated]
            entries.append({name.stem: asked})
    _write_lines(folder / "VDC_1k.jsonl", rows)
    for category, entries in questions.items():
        _write_lines(folder / "VDCScore_qa" / f"{category.value}.jsonl", entries)


def _clip_name(scene: Scene) -> str:
    return f"clips/{scene.split}_{scene.seed:07d}.mp4"


def _write_clips(config: DatasetConfig, seeds: list[int]) -> int:
    for seed in seeds:
        scene = sample_scene(seed, config.split)
        target = Path(config.folder) / _clip_name(scene)
        if not target.exists():
            frames = render_clip(scene, num_frames=config.num_frames, image_size=config.image_size)
            write_mp4(frames, target, fps=config.fps, crf=config.crf)
    return len(seeds)


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    _write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _check_settings(path: Path, settings: dict[str, object]) -> None:
    """Note what a target was made with, or compare with the note of an earlier run."""
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != settings:
            raise ValueError(f"{path}: made with {found}, now asked for {settings}; want another path")
    else:
        _write_text(path, json.dumps(settings))


def _spread(function: Callable[..., int], jobs: Sequence[tuple[object, ...]], workers: int) -> Iterator[int]:
    """Results of function(*job), in order of completion, from this process or from `workers` fresh ones."""
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield function(*job)
        return
    # Fresh processes: a forked one may inherit a lock that one of PyTorch's threads holds.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(function, *job) for job in jobs]):
            yield future.result()


def _progress(results: Iterator[int], total: int, title: str, show: bool) -> Iterator[int]:
    if not show:
        yield from results
        return
    from rich.progress import track

    yield from track(results, description=title, total=total)


def through_h264(frames: Frames, *, crf: int = 20) -> Frames:
    """Encode frames (F, H, W, 3) as H.264 and decode them again; same shape, colours as a decoder gives them."""
    import av

    buffer = io.BytesIO()
    encode_h264(frames, buffer, crf=crf)
    buffer.seek(0)
    with av.open(buffer, "r") as written:
        return np.stack([np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in written.decode(video=0)])
