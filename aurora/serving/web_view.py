"""HTML of the web page's results: merge maps that uncover the frame under the pointer, figures, and messages."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from aurora.serving.web_runs import Figures, Merged
from aurora.visualization.merge_map import Picture, enlarge, merge_map

SHOWN_FRAMES = 8
"""Frames whose maps are shown, evenly over the clip."""
_FRAME_PX = 192
"""About how wide a map is drawn, outlines one pixel wide; the page scales twice that smoothly."""
_PHASES = ("read", "preprocess", "encode", "prefill", "decode")

CSS = """
.aurora-head p { margin: 0 }
.aurora-note { border-radius: 8px; padding: 8px 12px; border: 1px solid var(--border-color-primary);
  color: var(--body-text-color); background: var(--background-fill-secondary); font-size: 14px }
.aurora-note.error { border-color: #d55e00; border-left: 6px solid #d55e00 }
.aurora-note.busy { border-left: 6px solid #0072b2 }
.aurora-note.done { border-left: 6px solid #009e73 }
.aurora-map h4, .aurora-figures h4 { margin: 0 0 6px; font-size: 14px; font-weight: 600; color: var(--body-text-color) }
.aurora-grid { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(max(112px, 22%), 1fr)) }
.aurora-grid.single { grid-template-columns: minmax(0, 384px) }
.aurora-grid figure { margin: 0; position: relative; border-radius: 6px; outline-offset: 2px }
.aurora-grid .stack { position: relative; display: block }
.aurora-grid img { display: block; width: 100%; margin: 0; border-radius: 6px }
.aurora-grid img.merged { position: absolute; inset: 0; height: 100%; transition: opacity .15s }
.aurora-grid figure:hover img.merged, .aurora-grid figure:focus img.merged { opacity: 0 }
.aurora-grid figcaption { font-size: 12px; text-align: center; padding-top: 2px; font-variant-numeric: tabular-nums }
.aurora-grid figcaption, .aurora-map p, .aurora-figures dt { color: var(--body-text-color); opacity: .75 }
.aurora-map p, .aurora-figures p { margin: 6px 0 0; font-size: 12px }
.aurora-figures dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 8px 0 0;
  font-size: 13px; font-variant-numeric: tabular-nums }
.aurora-figures dd { margin: 0; color: var(--body-text-color) }
.aurora-bar { display: flex; height: 10px; border-radius: 5px; overflow: hidden; gap: 1px;
  background: var(--border-color-primary) }
.aurora-bar span { min-width: 2px }
.aurora-key { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin: 0 4px 0 0 }
.aurora-phases span.phase { white-space: nowrap; margin-right: 10px }
#status { position: sticky; top: 8px; z-index: 40 }
#status .html-container, [id^="figures-"] .html-container, [id^="map-"] .html-container { padding: 0 !important }
button#cancel:disabled { background: var(--button-secondary-background-fill); color: var(--body-text-color-subdued) }
input[type=range]::-webkit-slider-thumb { border: 1px solid var(--neutral-400) }
input[type=range]::-moz-range-thumb { border: 1px solid var(--neutral-400) }
#examples .grid-wrap { max-height: none; height: auto; min-height: 0; padding: 0 }
#examples .caption-label { font-size: 11px; padding: 1px 5px; max-width: 100%; border-radius: 4px 0 0 0 }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 6px }
"""
_COLOURS = dict(zip(_PHASES, ("#a67c00", "#b5519c", "#0072b2", "#009e73", "#d55e00"), strict=True))


def note(text: str, kind: str = "") -> str:
    """A message: kind is error, busy, done or nothing."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="aurora-note {kind}" role="{role}">{escape(text)}</div>'


def maps(merged: Merged) -> str:
    """Draw what merged: a map for each frame, which uncovers the frame when it is pointed at or focused."""
    counts = merged.run.token_counts()[:, -1]
    num_frames = len(merged.pictures)
    shown = np.unique(np.linspace(0, num_frames - 1, min(num_frames, SHOWN_FRAMES), dtype=int))
    figures = []
    for frame in map(int, shown):
        picture = merged.pictures[frame]
        patches = merged.run.groups(frame).size
        scale = max(1, round(_FRAME_PX / picture.shape[1]))
        drawn = enlarge(merge_map(picture, merged.run.groups(frame), scale=scale), 2)
        when = "" if merged.visual.is_image else f"{merged.visual.seconds[frame]:.1f} s"
        label = f"{counts[frame]} tokens"
        alt = f"merge map {when}: {counts[frame]} of {patches} tokens".replace(" :", ":")
        figures.append(
            f'<figure tabindex="0" aria-label="{escape(alt)}"><span class="stack">'
            f'<img src="{_jpeg(enlarge(picture, 2 * scale))}" alt="what the model sees">'
            f'<img class="merged" src="{_png(drawn)}" alt="{escape(alt)}"></span>'
            f"<figcaption>{' · '.join(filter(None, (when, label)))}</figcaption></figure>"
        )
    some = f"{len(shown)} of {num_frames} frames are shown. " * (len(shown) < num_frames)
    legend = "Each outlined group is one visual token, in its mean colour."
    if merged.num_tokens == merged.num_patches:
        legend = "Nothing merged: each patch is one visual token."
    elif _keeps_more_than_asked(merged):
        legend += " The published schedule keeps more than asked; exact, under Advanced, keeps the share."
    grid = "aurora-grid single" if len(shown) == 1 else "aurora-grid"
    head = f"Merge map, {merged.run.name}: {_share(merged)}"
    return (
        f'<section class="aurora-map" data-tokens="{merged.num_tokens}"><h4>{escape(head)}</h4>'
        f'<div class="{grid}">{"".join(figures)}</div>'
        f"<p>{some}{legend} Point at a map, or tap it, to see the frame.</p>"
        "</section>"
    )


def figures(merged: Merged, made: Figures, name: str) -> str:
    """Tokens, time and memory of a caption."""
    total_s = sum(made.seconds.values())
    bar = "".join(
        f'<span style="flex:{seconds / total_s:.4f};background:{_COLOURS[phase]}" title="{phase}"></span>'
        for phase, seconds in made.seconds.items()
    )
    phases = "".join(
        f'<span class="phase"><i class="aurora-key" style="background:{_COLOURS[phase]}"></i>'
        f"{phase} {_time(seconds)}</span>"
        for phase, seconds in made.seconds.items()
    )
    per_s = f", {made.new_tokens / made.seconds['decode']:.0f} a second" if made.seconds["decode"] > 0 else ""
    saved = f" of {_size(made.cache_bytes_unmerged)} unmerged" * (merged.num_tokens < merged.num_patches)
    frames = "an image" if merged.visual.is_image else f"{len(merged.pictures)} of {merged.visual.total_frames}"
    rows = [
        ("visual tokens", _share(merged)),
        ("frames", frames),
        ("new tokens", f"{made.new_tokens}{per_s}"),
        ("time", _time(total_s)),
        ("cache of visual tokens", f"{_size(made.cache_bytes)}{saved}"),
    ]
    if made.memory_bytes is not None:
        rows.append(("memory in use", _size(made.memory_bytes)))
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows)
    return (
        f'<section class="aurora-figures"><h4>{escape(name)}</h4><div class="aurora-bar">{bar}</div>'
        f'<p class="aurora-phases">{phases}</p><dl>{listed}</dl></section>'
    )


def _keeps_more_than_asked(merged: Merged) -> bool:
    merge = merged.prefix.features.merges[0]
    asked = 1.0 if merge.visual_token_budget is not None else merge.token_kept_ratio
    return merged.num_tokens / merged.num_patches > asked + 0.02


def _share(merged: Merged) -> str:
    tokens, patches = merged.num_tokens, merged.num_patches
    return f"{tokens:,} of {patches:,} ({tokens / patches:.0%})"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def _png(picture: Picture) -> str:
    return _data_url(picture, "PNG")


def _jpeg(picture: Picture) -> str:
    return _data_url(picture, "JPEG", quality=88)


def _data_url(picture: Picture, form: str, **options: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format=form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
