"""The demo: bundled clips captioned at kept ratios 1.0 to 0.1, with token counts, times and merge pictures.

The clips are rendered from TinyWorld, so what each one shows is known and printed beside the captions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aurora.captioning import BUNDLED_MODEL
from aurora.data.bundled import MEDIA, Clip, read_clips
from aurora.data.tinyworld import Category, caption_prompts
from aurora.evaluation.tinyvdc import REQUIRED, parse
from aurora.modeling import AuroraForConditionalGeneration, GenerateOutput
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import load_visual
from aurora.runtime import set_threads
from aurora.visualization.figure import save_picture
from aurora.visualization.merge_map import Picture, traces_of_clip
from aurora.visualization.visualize import TracedRun, film_strip, seen_pictures

RATIOS = (1.0, 0.4, 0.2, 0.1)
NUM_FRAMES = 8
MAX_NEW_TOKENS = 160
PHASES = ("encode", "prefill", "decode")
_MAX_COLUMNS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One clip at one kept ratio."""

    ratio: float
    counts: list[int]
    """Visual tokens delivered, per frame."""
    patches: int
    """Visual tokens of the clip without merging."""
    seconds: dict[str, float]
    """encode, prefill and decode."""
    caption: str
    facts_right: int
    """Facts of the clip that the caption states, by TinyVDC's rules."""
    num_facts: int


def demo(
    *,
    model_path: str | Path = BUNDLED_MODEL,
    media: Path = MEDIA,
    output: Path = Path("outputs/demo"),
    ratios: tuple[float, ...] = RATIOS,
    console: Console | None = None,
) -> dict[str, list[Result]]:
    """Caption every bundled clip at every ratio, print as it goes, and save one merge picture for each clip.

    Args:
        model_path: Checkpoint folder.
        media: Folder with `clips.json`.
        output: Folder of the pictures; made if needed.
        ratios: Kept ratios to compare, largest first.
        console: Where to print; None is stdout.

    Returns:
        File name of each clip to its results, in the order of `ratios`.

    Raises:
        ValueError: if the model or a clip cannot be read.
    """
    console = console or Console(highlight=False)
    clips = read_clips(media)
    set_threads(0)
    processor = AuroraProcessor.from_pretrained(model_path)
    model = AuroraForConditionalGeneration.from_pretrained(model_path)
    console.print(_header(model_path, model))
    _warm_up(model, processor, media / clips[0].file)
    results: dict[str, list[Result]] = {}
    for clip in clips:
        results[clip.file], picture = caption_clip(model, processor, media / clip.file, clip.facts, ratios)
        console.print(_clip_table(clip, results[clip.file], min(console.width, _MAX_COLUMNS)))
        written = save_picture(picture, output / f"merge_{Path(clip.file).stem}.png")
        console.print(f"what merged: {written}\n", soft_wrap=True)
    console.print(_summary_table(results, ratios))
    console.print(
        "Now yours: .venv/bin/python scripts/caption.py visual_input=clip.mp4 token_kept_ratio=0.2\n"
        "(merge=exact delivers the share itself)",
        soft_wrap=True,
    )
    return results


def caption_clip(
    model: AuroraForConditionalGeneration,
    processor: AuroraProcessor,
    path: Path,
    facts: Mapping[str, str],
    ratios: Iterable[float],
) -> tuple[list[Result], Picture]:
    """Caption one clip at every ratio and draw what merged.

    Args:
        model: The captioner.
        processor: Of the same checkpoint.
        path: The clip.
        facts: What it shows, slot to value.
        ratios: Kept ratios.

    Returns:
        The results, and a film strip of the ratios below 1.
    """
    visual = load_visual(path, NUM_FRAMES)
    pixels = processor.image_processor.preprocess_frames(visual.frames)
    inputs = processor(text=processor.build_prompt(_prompt(), len(visual.frames))).to(model.device)
    results, runs = [], []
    for ratio in ratios:
        prefix = model.encode(
            pixel_values_videos=pixels[None].to(model.device, model.dtype), trace=True, token_kept_ratio=ratio
        )
        made = model.generate(inputs["input_ids"], prefix=prefix, max_new_tokens=MAX_NEW_TOKENS, return_dict=True)
        assert isinstance(made, GenerateOutput)
        caption = processor.tokenizer.decode(made.sequences[0].tolist()).strip()
        stated = parse(Category.detailed, caption)
        results.append(
            Result(
                ratio=ratio,
                counts=made.visual_token_counts[0],
                patches=sum(plan.num_patches for plan in made.plans[0]),
                seconds=made.seconds,
                caption=caption,
                facts_right=sum(stated.get(slot) == facts[slot] for slot in REQUIRED[Category.detailed]),
                num_facts=len(REQUIRED[Category.detailed]),
            )
        )
        runs.append(TracedRun(f"kept {ratio:g}", traces_of_clip(prefix.features)))
    pictures = seen_pictures(pixels, processor.image_processor, model.config.vision.patch_size)
    merged = [run for run, result in zip(runs, results, strict=True) if result.ratio < 1] or runs
    return results, film_strip(pictures, merged, seconds=visual.seconds)


def _prompt() -> str:
    return caption_prompts(Category.detailed)[0]


def _header(model_path: str | Path, model: AuroraForConditionalGeneration) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    threads = torch.get_num_threads()
    return (
        f"{Path(model_path).name}: {millions:.1f} M parameters in {str(model.dtype).removeprefix('torch.')} on "
        f"{model.device}, {threads} thread{'s' * (threads != 1)}; {NUM_FRAMES} frames of each clip, greedy decoding.\n"
        f'Prompt: "{_prompt()}"\n'
        "`kept` is the share of visual tokens asked for. The published schedule, which this is, keeps somewhat more; "
        "what the language model really read stands beside it. Facts are those of the clip that the caption states.\n"
    )


def _warm_up(model: AuroraForConditionalGeneration, processor: AuroraProcessor, path: Path) -> None:
    """Let the first clip not pay for torch's first calls."""
    pixels = processor.image_processor.preprocess_frames(load_visual(path, NUM_FRAMES).frames)
    inputs = processor(text=processor.build_prompt(_prompt(), NUM_FRAMES)).to(model.device)
    model.generate(
        inputs["input_ids"], pixel_values_videos=pixels[None].to(model.device, model.dtype), max_new_tokens=2
    )


def _clip_table(clip: Clip, results: Iterable[Result], width: int) -> Table:
    """One row for each ratio."""
    table = Table(box=box.SIMPLE_HEAD, width=width, pad_edge=False, title_justify="left", title_style="")
    table.title = Text.assemble((clip.file, "bold"), " shows: ", clip.caption)
    table.add_column("kept")
    table.add_column("visual tokens", no_wrap=True)
    table.add_column("seconds", no_wrap=True)
    table.add_column("caption", ratio=1, overflow="fold")
    for result in results:
        table.add_row(
            str(result.ratio),
            f"{sum(result.counts)} of {result.patches}\n{result.counts[-1]} a frame",
            "\n".join(f"{result.seconds[phase]:.2f} {phase}" for phase in PHASES),
            Text(f"{_printable(result.caption)} ({result.facts_right} of {result.num_facts} facts)"),
            end_section=True,
        )
    return table


def _printable(text: str) -> str:
    """Replace what a terminal would obey instead of show: byte tokens can spell control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _summary_table(results: dict[str, list[Result]], ratios: Iterable[float]) -> Table:
    """Means over the clips."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Mean of the clips", title_justify="left")
    for name in ("kept", "visual tokens", "share", "facts right", "encode s", "prefill s", "decode s"):
        table.add_column(name, justify="right")
    for index, ratio in enumerate(ratios):
        rows = [clip[index] for clip in results.values()]
        tokens, patches = (
            sum(values) for values in zip(*((sum(row.counts), row.patches) for row in rows), strict=True)
        )
        means = [f"{fmean(row.seconds[phase] for row in rows):.3f}" for phase in PHASES]
        right = sum(row.facts_right for row in rows) / sum(row.num_facts for row in rows)
        table.add_row(str(ratio), f"{tokens / len(rows):.0f}", f"{tokens / patches:.1%}", f"{right:.0%}", *means)
    return table
