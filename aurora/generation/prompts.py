"""What a call of `generate` asks: prompts with their clips, merging for each clip, and whether all of it fits.

Everything here is arithmetic on ids and plans, done before the encoder runs.

Shape letters: R rows of text, T text positions with placeholders, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from aurora.generation.context import check_context
from aurora.generation.options import MergeOptions, merge_for_call
from aurora.generation.sampling import SamplingConfig
from aurora.model.captioner import AuroraConfig, AuroraModel, Spliced, VisualFeatures
from aurora.model.merge import MergeConfig, MergePlan, TextPositions, plan_clip
from aurora.model.splice import check_placeholders
from aurora.model.vision import num_active_layers

Clips: TypeAlias = "list[Tensor | None]"
"""Normalised frames of each clip, (F, 3, H, W); None where there is none."""


class Prompt(NamedTuple):
    """One row of text."""

    clip: int
    """Its clip; of no meaning if there are none."""
    ids: tuple[int, ...]
    """Token ids with placeholders, without padding."""
    num_placeholders: int
    """How many of them are placeholders."""


class Heads(NamedTuple):
    """Prompts split behind their last frame, so that prompts over one clip can share what is before."""

    heads: list[Prompt]
    """The different beginnings."""
    row_of: list[int]
    """Beginning of each prompt."""
    suffixes: list[tuple[int, ...]]
    """Ids of each prompt behind its beginning."""


def as_clips(
    pixel_values: Tensor | Sequence[Tensor | None] | None, pixel_values_videos: Tensor | Sequence[Tensor | None] | None
) -> Clips | None:
    """Bring images or videos into one form; an image is a clip of one frame.

    Args:
        pixel_values: Images, (B, 3, H, W), or frames, (B, F, 3, H, W); or a list of (3, H, W) or (F, 3, H, W), which
            may differ, with None where a row has none.
        pixel_values_videos: Frames, (B, F, 3, H, W), or such a list; one of the two.

    Returns:
        The clips; None without any.

    Raises:
        ValueError: if both are given or a shape does not fit.
    """
    if pixel_values is not None and pixel_values_videos is not None:
        raise ValueError("got pixel_values and pixel_values_videos, want one of them")
    pixels = pixel_values if pixel_values is not None else pixel_values_videos
    name = "pixel_values" if pixel_values is not None else "pixel_values_videos"
    if pixels is None:
        return None
    if isinstance(pixels, Tensor):
        if pixels.ndim != 5 and not (pixels.ndim == 4 and pixel_values is not None):
            raise ValueError(f"{name}: got shape {tuple(pixels.shape)}, want (rows, frames, 3, height, width)")
        return list(pixels if pixels.ndim == 5 else pixels[:, None])
    clips: Clips = []
    for index, clip in enumerate(pixels):
        if clip is not None and clip.ndim == 3 and pixel_values is not None:
            clip = clip[None]
        if clip is not None and clip.ndim != 4:
            raise ValueError(f"{name}[{index}]: got shape {tuple(clip.shape)}, want (frames, 3, height, width)")
        clips.append(clip)
    return clips


def merge_for_clips(base: MergeConfig, options: MergeOptions, num_clips: int) -> list[MergeConfig]:
    """The merging of each clip; an option may be a list with a value for each.

    Args:
        base: Defaults of the model.
        options: Of the call.
        num_clips: How many clips there are.

    Returns:
        One config for each clip.

    Raises:
        ValueError: for an unknown option, a value out of range, or a list of another length.
    """
    listed: dict[str, Sequence[Any]] = {}
    for key, value in options.items():
        if isinstance(value, list | tuple) and (key != "r" or any(not isinstance(item, int) for item in value)):
            if len(value) != num_clips:
                raise ValueError(f"{key}: got {len(value)} values for {num_clips} clips, want one for each")
            listed[key] = value
    if not listed:
        return [merge_for_call(base, options)] * num_clips
    return [
        merge_for_call(base, cast(MergeOptions, {**options, **{key: value[clip] for key, value in listed.items()}}))
        for clip in range(num_clips)
    ]


def read_prompts(
    input_ids: Tensor, attention_mask: Tensor | None, *, num_clips: int, image_token_index: int
) -> list[Prompt]:
    """Take the padding off the rows and find their clips.

    Args:
        input_ids: Token ids with placeholders, (R, T).
        attention_mask: True where a token is, (R, T); None: everywhere.
        num_clips: Clips there are: as many as rows, or fewer, each then serving equally many neighbouring rows.
        image_token_index: Id of a placeholder.

    Returns:
        One prompt for each row.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: got {got}, want a tensor of integers, (rows, tokens)")
    if input_ids.ndim != 2 or not len(input_ids):
        raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, want (rows, tokens) with at least one row")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        want = tuple(input_ids.shape)
        raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, want {want} as input_ids")
    rows: list[list[int]] = input_ids.tolist()
    if attention_mask is not None:
        kept = attention_mask.bool().tolist()
        rows = [[token for token, keep in zip(*pair, strict=True) if keep] for pair in zip(rows, kept, strict=True)]
    if num_clips and len(rows) % num_clips:
        raise ValueError(f"input_ids has {len(rows)} rows for {num_clips} clips; want as many, or a multiple of them")
    per_clip = len(rows) // num_clips if num_clips else 1
    return [Prompt(row // per_clip, tuple(ids), ids.count(image_token_index)) for row, ids in enumerate(rows)]


def check_prompts(
    prompts: Sequence[Prompt],
    plans: Sequence[tuple[MergePlan, ...]],
    merges: Sequence[MergeConfig],
    config: AuroraConfig,
    sampling: SamplingConfig,
) -> None:
    """Refuse prompts that do not match their frames, or leave no room for an answer.

    Args:
        prompts: What is asked.
        plans: Of the frames of each clip.
        merges: What led to these plans.
        config: Of the model.
        sampling: How long an answer must and may be.

    Raises:
        ValueError: with the row, the counts, and a budget and a ratio that would fit.
    """
    visual: list[int] = []
    for row, prompt in enumerate(prompts):
        own = plans[prompt.clip] if plans else ()
        check_placeholders(f"row {row}", prompt.num_placeholders, len(own))
        wish = merges[prompt.clip] if plans else config.merge
        visual.append(_context_tokens(own, wish, config) if prompt.num_placeholders else 0)
    text = [len(prompt.ids) - prompt.num_placeholders for prompt in prompts]

    def advice(row: int) -> str:
        if not visual[row]:
            return "shorten the prompt"
        clip = prompts[row].clip
        return what_fits(merges[clip], plans[clip], config.text.max_seq_len - text[row], config, sampling)

    limit = config.text.max_seq_len
    check_context(text, visual, limit, min_new_tokens=sampling.min_new_tokens, advice=advice)


def what_fits(
    merge: MergeConfig, plans: tuple[MergePlan, ...], room: int, config: AuroraConfig, sampling: SamplingConfig
) -> str:
    """Say which budget and which ratio would leave a clip room for the answer asked for, or for a short one.

    Args:
        merge: What was asked.
        plans: What it led to.
        room: Tokens for frames and answer together.
        config: Of the model.
        sampling: How long an answer may be.

    Returns:
        What to change, for an error message.
    """
    if merge.text_positions is TextPositions.original:
        return "text_positions=original counts every patch; want text_positions=merged, or lower num_frm"
    for answer in dict.fromkeys([sampling.max_new_tokens, max(1, sampling.min_new_tokens)]):
        settings = []
        budget = room - answer - _extra_tokens(config) * len(plans)
        if budget > 0 and _delivers(merge, {"visual_token_budget": budget}, plans, config) is not None:
            settings.append(f"visual_token_budget={budget}")
        # Beside a budget a ratio would not be looked at.
        for hundredths in range(99, 0, -1) if merge.visual_token_budget is None else ():
            count = _delivers(merge, {"token_kept_ratio": hundredths / 100}, plans, config)
            if count is not None and count <= room - answer:
                settings.append(f"token_kept_ratio={hundredths / 100}")
                break
        if settings:
            return f"{' or '.join(settings)} leaves room for {answer} new token{'s' * (answer != 1)}"
    return "lower num_frm or shorten the prompt"


def split_heads(prompts: Sequence[Prompt], image_token_index: int) -> Heads:
    """Split prompts behind their last placeholder; one without any is all beginning.

    Args:
        prompts: What is asked.
        image_token_index: Id of a placeholder.

    Returns:
        The different beginnings, and what follows them.
    """
    rows: dict[Prompt, int] = {}
    row_of, suffixes = [], []
    for prompt in prompts:
        cut = len(prompt.ids)
        if prompt.num_placeholders:
            cut -= prompt.ids[::-1].index(image_token_index)
        row_of.append(rows.setdefault(prompt._replace(ids=prompt.ids[:cut]), len(rows)))
        suffixes.append(prompt.ids[cut:])
    return Heads(list(rows), row_of, suffixes)


def splice_prompts(model: AuroraModel, prompts: Sequence[Prompt], visual: VisualFeatures | None) -> Spliced:
    """Put the visual tokens of their clips into prompts, padded on the left; see `AuroraModel.splice`."""
    width = max(len(prompt.ids) for prompt in prompts)
    pad = model.config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in prompts])
    mask = torch.tensor([[False] * (width - len(prompt.ids)) + [True] * len(prompt.ids) for prompt in prompts])
    own = None if visual is None else visual.select([prompt.clip for prompt in prompts])
    return model.splice(
        ids.to(model.device),
        own,
        attention_mask=None if bool(mask.all()) else mask.to(model.device),
        padding_side="left",
    )


def _extra_tokens(config: AuroraConfig) -> int:
    """Tokens of a frame that are neither merged nor dropped: the class token, where it is kept."""
    return config.vision.num_prefix_tokens if config.feature_select_strategy == "full" else 0


def _context_tokens(plans: Sequence[MergePlan], merge: MergeConfig, config: AuroraConfig) -> int:
    """How much of the context frames take."""
    original = merge.text_positions is TextPositions.original
    return sum((plan.num_patches if original else plan.num_visual_tokens) + _extra_tokens(config) for plan in plans)


def _delivers(
    merge: MergeConfig, change: MergeOptions, plans: tuple[MergePlan, ...], config: AuroraConfig
) -> int | None:
    """Visual tokens of a clip under a changed wish; None if that is impossible."""
    patch = config.vision.patch_size
    if "visual_token_budget" in change:
        change = {"schedule": "exact", **change} if merge.r else change
    try:
        changed = plan_clip(
            merge_for_call(merge, change),
            num_frames=len(plans),
            height_px=patch,
            width_px=patch * plans[0].num_patches,  # only the number of patches counts
            vision=config.vision,
            num_active_layers=num_active_layers(config.vision, config.feature_layer),
        )
    except ValueError:
        return None
    return _context_tokens(changed, merge, config)
