"""The clips that come with the package: rendered from TinyWorld, so what each one shows is known."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from aurora.data.tinyworld import Category, captions, render_clip, sample_scene, write_mp4

MEDIA = Path(__file__).parents[1] / "assets" / "media"
"""The clips that come with the package."""
CLIPS_FILE = "clips.json"
"""Beside the clips: name, scene seed, reference caption and facts of each."""

# Seeds of the bundled clips' scenes in TinyWorld's test split, which training never draws from.
SEEDS = (11, 4, 7, 23)
CLIP_FRAMES, CLIP_FPS, CLIP_PX = 32, 8, 192


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A bundled clip."""

    file: str
    """Name beside `clips.json`."""
    seed: int
    """Of its scene, in the test split."""
    caption: str
    """A true detailed caption."""
    facts: dict[str, str]
    """What the scene shows, slot to value."""


def make_media(folder: Path = MEDIA) -> list[Clip]:
    """Render the bundled clips as H.264 and write `clips.json` beside them.

    Args:
        folder: Where to; made if needed.

    Returns:
        The clips.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for seed in SEEDS:
        scene = sample_scene(seed, split="test")
        name = f"{scene.slots['background']}_{scene.slots['shape']}"
        frames = render_clip(scene, num_frames=CLIP_FRAMES, image_size=CLIP_PX)
        write_mp4(frames, folder / f"{name}.mp4", fps=CLIP_FPS)
        caption = captions(scene, seed)[Category.detailed]
        clips.append(Clip(file=f"{name}.mp4", seed=seed, caption=caption, facts=dict(scene.slots)))
    text = json.dumps([asdict(clip) for clip in clips], indent=2)
    (folder / CLIPS_FILE).write_text(text + "\n", encoding="utf-8")
    return clips


def read_clips(folder: Path) -> list[Clip]:
    """Read `clips.json`.

    Raises:
        ValueError: if it is missing or not what `make_media` writes.
    """
    path = folder / CLIPS_FILE
    if not path.is_file():
        raise ValueError(f"{path}: not found; want the clips that `python scripts/make_media.py` renders")
    try:
        return [Clip(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}; want a list of file, seed, caption and facts") from error
