"""Ways to show a clip to the language model with fewer visual tokens, by name: what the ablation compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from aurora.evaluation.baselines import BASELINES, encode_reduced
from aurora.generation.options import MergeOptions
from aurora.model.merge import TextPositions
from aurora.modeling import AuroraForConditionalGeneration, VisualPrefix

REFERENCE = "exact"
"""Merging inside the encoder that delivers the share asked for; the others are compared with it."""
UNMERGED = 1.0

MERGING: dict[str, MergeOptions] = {
    REFERENCE: {"schedule": "exact"},
    "constant": {"schedule": "constant"},
    "linear": {"schedule": "linear", "inflection": -1.0},
    "size_bias": {"schedule": "exact", "size_bias": "keys"},
    "text_size_bias": {"schedule": "exact", "text_size_bias": "visual"},
    "raster_order": {"schedule": "exact", "text_positions": "original"},
    "original_positions": {"schedule": "exact", "text_positions": "original"},
}
"""Merging inside the encoder; `raster_order` then numbers the sorted tokens one after the other."""

MEANINGS: dict[str, str] = {
    REFERENCE: "merging in every layer, delivers the share asked for",
    "constant": "the published rule: the same number in every layer, keeps more than asked",
    "linear": "as many as constant, most in the first layers",
    "size_bias": "exact, with log(size) on the keys of the tower",
    "text_size_bias": "exact, with log(size) on the visual keys of the language model",
    "raster_order": "exact, tokens sorted by the mean index of their patches",
    "original_positions": "exact, sorted, and each at the position of its patches",
    "average_pooling": "means of rectangular windows",
    "random_drop": "random patches",
    "uniform_drop": "patches at even distances",
    "class_attention": "patches that the class token attends to most",
    "mean_attention": "patches that all tokens attend to most",
    "merging_after_encoder": "the same merging, once behind the tower",
}
"""Every variant, in the order of the tables."""

EQUAL_COUNT = tuple(name for name in MEANINGS if name not in ("constant", "linear"))
"""Variants that deliver as many tokens as `exact` does."""


def encode_variant(
    model: AuroraForConditionalGeneration,
    variant: str,
    ratio: float,
    pixel_values: Sequence[Tensor],
    seeds: Sequence[int],
) -> VisualPrefix:
    """Encode clips in one of the ways of `MEANINGS`.

    Args:
        model: The captioner.
        variant: Its name.
        ratio: Share of visual tokens to keep, in (0, 1].
        pixel_values: Normalised frames of each clip, (F, 3, H, W), all of one size.
        seeds: For each clip, of random choices.

    Returns:
        What `generate(prefix=...)` takes.

    Raises:
        ValueError: for an unknown variant, or if it cannot deliver that share.
    """
    if variant in MERGING:
        options: MergeOptions = {**MERGING[variant], "token_kept_ratio": ratio}
        prefix = model.encode(pixel_values_videos=list(pixel_values), **options)
        return _in_sequence(prefix) if variant == "raster_order" else prefix
    if variant not in MEANINGS:
        raise ValueError(f"variant {variant!r}: want one of {', '.join(MEANINGS)}")
    patch = model.config.vision.patch_size
    num_patches = (pixel_values[0].shape[2] // patch) * (pixel_values[0].shape[3] // patch)
    num_tokens = max(1, round(ratio * num_patches))  # as schedule=exact
    return encode_reduced(model, BASELINES[variant], pixel_values, num_tokens, seeds)


def _in_sequence(prefix: VisualPrefix) -> VisualPrefix:
    """Sort the tokens of each frame by the patches they stand for; positions count them one after the other."""
    old = prefix.features
    frames, sizes = [], []
    for clip, centres in enumerate(old.centres):
        orders = [centre.sort(stable=True).indices for centre in centres]
        frames.append([tokens[order] for tokens, order in zip(old.frames[clip], orders, strict=True)])
        sizes.append([size[order] for size, order in zip(old.sizes[clip], orders, strict=True)])
    merges = [dataclasses.replace(merge, text_positions=TextPositions.merged) for merge in old.merges]
    features = old._replace(frames=frames, sizes=sizes, centres=[[] for _ in frames], merges=merges)
    return VisualPrefix(features=features, seconds=prefix.seconds)
