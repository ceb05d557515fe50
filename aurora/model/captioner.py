"""AuroraCap: encode and merge frames, project them, splice them into the text, decode.

Chai et al., 2024. Shape letters: B rows, F frames, T text positions with placeholders, L positions after splicing, N
visual tokens of a frame, C width of the language model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aurora.model.attention import BACKENDS
from aurora.model.llama import Llama, LlamaConfig
from aurora.model.merge import MergeConfig, MergePlan, SizeBias, TextPositions, plan_clip
from aurora.model.projector import Projector, ProjectorConfig
from aurora.model.splice import (
    IGNORE_INDEX,
    Spliced,
    SplicedRow,
    VisualFeatures,
    check_placeholders,
    pad_rows,
    splice_row,
)
from aurora.model.vision import VisionConfig, VisionOutput, VisionTower, VisionTrace, num_active_layers

if TYPE_CHECKING:
    from aurora.model.cache import KVCache

__all__ = [
    "FRAMES_PER_CHUNK",
    "IGNORE_INDEX",
    "AuroraConfig",
    "AuroraModel",
    "AuroraOutput",
    "Spliced",
    "VisualFeatures",
    "next_token_loss",
]

FRAMES_PER_CHUNK = 32
"""Frames that go through the tower at once; bounds its activations."""


@dataclass(kw_only=True, slots=True)
class AuroraConfig:
    """The whole model; the defaults are AuroraCap-7B's."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Vision tower."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """Projector."""
    text: LlamaConfig = field(default_factory=LlamaConfig)
    """Language model."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    """Merging where a call does not say otherwise."""
    feature_layer: int = -2
    """Hidden state of the tower that is projected, counted from the end."""
    feature_select_strategy: str = "default"
    """default drops the class token of each frame, full keeps it."""
    image_token_index: int = -200
    """Placeholder of visual tokens in input_ids."""
    bos_token_id: int = 1
    """Begins every prompt."""
    eos_token_id: int = 2
    """Ends every answer."""
    pad_token_id: int = 0
    """Fills batches."""
    attn_implementation: str = "auto"
    """Attention backend: auto, eager or sdpa."""

    def __post_init__(self) -> None:
        if self.feature_select_strategy not in ("default", "full"):
            raise ValueError(f"feature_select_strategy={self.feature_select_strategy!r}: want default or full")
        if self.attn_implementation not in BACKENDS:
            raise ValueError(f"attn_implementation={self.attn_implementation!r}: want one of {', '.join(BACKENDS)}")
        num_active_layers(self.vision, self.feature_layer)


class AuroraOutput(NamedTuple):
    """Result of a forward pass."""

    loss: Tensor | None
    """Mean cross-entropy over labelled positions, a float32 scalar."""
    logits: Tensor
    """(B, L, V) over the spliced sequence."""
    visual_token_counts: list[list[int]]
    """Visual tokens delivered, per clip and frame."""
    attention_mask: Tensor
    """(B, L) bool."""
    labels: Tensor | None
    """(B, L) int64."""


class AuroraModel(nn.Module):
    """Vision tower, projector and language model."""

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision, backend=config.attn_implementation)
        self.projector = Projector(config.vision.hidden_size, config.text.hidden_size, config.projector)
        self.language_model = Llama(config.text, backend=config.attn_implementation)

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's embeddings."""
        return self.language_model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the language model's embeddings."""
        return self.language_model.embed_tokens.weight.device

    def plan(
        self, num_frames: int, height_px: int, width_px: int, merge: MergeConfig | None = None
    ) -> tuple[MergePlan, ...]:
        """What merging will deliver for each frame of a clip, before anything runs; see `plan_clip`."""
        return plan_clip(
            merge or self.config.merge,
            num_frames=num_frames,
            height_px=height_px,
            width_px=width_px,
            vision=self.config.vision,
            num_active_layers=num_active_layers(self.config.vision, self.config.feature_layer),
        )

    def encode(
        self,
        pixel_values: Tensor | Sequence[Tensor | None],
        *,
        merge: MergeConfig | Sequence[MergeConfig] | None = None,
        trace: bool = False,
    ) -> VisualFeatures:
        """Encode clips into projected visual tokens.

        Frames of the same size and plan go through the tower together, whatever clips they are from.

        Args:
            pixel_values: Normalised frames, (B, F, 3, height, width); or one (F, 3, height, width) for each clip, which
                may then differ in length and size, or None where a row has no clip.
            merge: How to merge, for all clips or for each; None is the configuration's.
            trace: Also record what merged with what.

        Returns:
            The tokens of each frame, merged as planned.

        Raises:
            ValueError: if a shape does not fit, a value is not finite, or a plan is impossible.
        """
        clips = _as_list(pixel_values)
        merges = _per_clip(merge or self.config.merge, len(clips))
        plans: list[tuple[MergePlan, ...]] = []
        groups: dict[tuple[MergePlan, int, int, SizeBias, bool], list[tuple[int, int]]] = {}
        for index, (clip, wish) in enumerate(zip(clips, merges, strict=True)):
            if clip is None:
                plans.append(())
                continue
            height, width = clip.shape[2:]
            plans.append(self.plan(len(clip), height, width, wish))
            spread = wish.text_positions is TextPositions.original
            for frame, plan in enumerate(plans[-1]):
                groups.setdefault((plan, height, width, wish.size_bias, spread), []).append((index, frame))
        found: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor | None]] = {}
        traces: list[tuple[list[tuple[int, int]], VisionTrace]] = []
        for (plan, _, _, size_bias, spread), rows in groups.items():
            for start in range(0, len(rows), FRAMES_PER_CHUNK):
                chunk = rows[start : start + FRAMES_PER_CHUNK]
                frames = torch.stack([cast(Tensor, clips[clip])[frame] for clip, frame in chunk])
                out = self._run_tower(frames, plan, size_bias, trace=trace or spread)
                if trace and out.trace is not None:
                    traces.append((chunk, out.trace))
                found |= zip(chunk, self._project(out, spread=spread), strict=True)
        shape = [range(len(clip_plans)) for clip_plans in plans]
        return VisualFeatures(
            frames=[[found[clip, frame][0] for frame in frames] for clip, frames in enumerate(shape)],
            plans=plans,
            traces=traces,
            sizes=[[found[clip, frame][1] for frame in frames] for clip, frames in enumerate(shape)],
            centres=[
                [centre for frame in frames if (centre := found[clip, frame][2]) is not None]
                for clip, frames in enumerate(shape)
            ],
            merges=merges,
        )

    def _run_tower(self, frames: Tensor, plan: MergePlan, size_bias: SizeBias, *, trace: bool) -> VisionOutput:
        out: VisionOutput = self.vision_tower(
            frames.to(self.vision_tower.patch_embed.weight.dtype),
            plan=plan,
            feature_layer=self.config.feature_layer,
            size_bias=size_bias,
            trace=trace,
        )
        return out

    def _project(self, out: VisionOutput, *, spread: bool) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """For each frame its tokens (N, C), their sizes (N,) and, if asked, the mean index of their patches (N,)."""
        num_dropped = 0 if self.config.feature_select_strategy == "full" else self.config.vision.num_prefix_tokens
        tokens: Tensor = self.projector(out.hidden[:, num_dropped:])  # (frames, N, C)
        sizes = out.size[:, num_dropped:, 0]
        centres: list[Tensor | None] = [None] * len(tokens)
        if spread:
            assert out.trace is not None
            centres = list(_patch_centres(out)[:, num_dropped:] - num_dropped)
        return list(zip(tokens, sizes, centres, strict=True))

    def splice(
        self,
        input_ids: Tensor,
        visual: VisualFeatures | None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str = "right",
    ) -> Spliced:
        """Put visual tokens where the placeholders are.

        A row holds one placeholder for each frame, or one for the whole clip, or none (text only).

        Args:
            input_ids: Token ids with `config.image_token_index` as placeholder, (B, T).
            visual: One clip for each row; None if there is none in any.
            attention_mask: True where a token is, (B, T); padding may be on either side. None: everywhere.
            labels: Target ids, (B, T); -100 is ignored.
            padding_side: Of the result, right or left.

        Returns:
            The spliced sequence.

        Raises:
            ValueError: if rows and clips, or placeholders and frames, do not agree.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, want (rows, tokens)")
        if visual is not None and len(visual.frames) != len(input_ids):
            raise ValueError(
                f"input_ids has {len(input_ids)} rows, pixel_values {len(visual.frames)} clips; want as many"
            )
        for name, other in (("attention_mask", attention_mask), ("labels", labels)):
            if other is not None and other.shape != input_ids.shape:
                raise ValueError(f"{name}: got shape {tuple(other.shape)}, want {tuple(input_ids.shape)} as input_ids")
        rows = []
        for row, ids in enumerate(input_ids):
            keep = slice(None) if attention_mask is None else attention_mask[row].bool()
            targets = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels[row]
            rows.append(self._splice_row(row, ids[keep], targets[keep], visual))
        return pad_rows(rows, padding_side, with_labels=labels is not None)

    def _splice_row(self, row: int, ids: Tensor, labels: Tensor, visual: VisualFeatures | None) -> SplicedRow:
        config = self.config
        is_placeholder = ids == config.image_token_index
        num_frames = 0 if visual is None else len(visual.frames[row])
        check_placeholders(f"row {row}", int(is_placeholder.sum()), num_frames)
        text = ids[~is_placeholder]
        if text.numel() and (int(text.min()) < 0 or int(text.max()) >= config.text.vocab_size):
            wrong = next(i for i in text.tolist() if not 0 <= i < config.text.vocab_size)
            raise ValueError(
                f"row {row}: token id {wrong} in input_ids; want 0 to {config.text.vocab_size - 1}, or "
                f"{config.image_token_index} for a placeholder"
            )
        embeds = self.language_model.embed(ids.masked_fill(is_placeholder, 0))  # (T, C)
        return splice_row(ids, embeds, labels, visual, row, config.image_token_index)

    def forward(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | Sequence[Tensor | None] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        merge: MergeConfig | Sequence[MergeConfig] | None = None,
        cache: KVCache | None = None,
    ) -> AuroraOutput:
        """Predict the next token at each position of text with clips in it.

        Args:
            input_ids: Token ids with placeholders, (B, T).
            pixel_values: One clip for each row, see `encode`; rows without a placeholder ignore theirs.
            attention_mask: True where a token is, (B, T).
            labels: Target ids, (B, T); -100 is ignored.
            merge: How to merge, for all clips or for each; None is the configuration's.
            cache: An empty one, which then holds keys and values of the spliced positions; it grows as needed.

        Returns:
            Loss (if there are labels), logits, delivered counts, and mask and labels over the spliced sequence.

        Raises:
            ValueError: as `encode` and `splice`.
        """
        visual = None if pixel_values is None else self.encode(pixel_values, merge=merge)
        spliced = self.splice(input_ids, visual, attention_mask=attention_mask, labels=labels)
        if cache is not None:
            cache.grow(spliced.attention_mask.shape[1])
        logits = self.run_language_model(spliced, cache=cache)
        loss = None if spliced.labels is None else next_token_loss(logits, spliced.labels)
        counts = [] if visual is None else visual.counts
        return AuroraOutput(loss, logits, counts, spliced.attention_mask, spliced.labels)

    def run_language_model(self, spliced: Spliced, *, cache: KVCache | None = None, logits_to_keep: int = 0) -> Tensor:
        """Run the language model over a whole spliced batch.

        Args:
            spliced: The batch.
            cache: Where keys and values go; empty, with room for them.
            logits_to_keep: Only the last so many positions get logits; 0 is all.

        Returns:
            Logits, (B, L or logits_to_keep, V).
        """
        padded = not bool(spliced.attention_mask.all())
        bias = {} if spliced.key_bias is None else {"key_bias": spliced.key_bias}
        logits: Tensor = self.language_model(
            spliced.inputs_embeds,
            position_ids=spliced.position_ids,
            attention_mask=spliced.attention_mask if padded else None,
            cache=cache,
            logits_to_keep=logits_to_keep,
            **bias,
        )
        return logits


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of logits (B, L, V) against the labels (B, L) one position later.

    Raises:
        ValueError: if no position carries a label, where the mean would be NaN.
    """
    targets = labels[:, 1:].flatten()
    if not bool((targets != IGNORE_INDEX).any()):
        raise ValueError("labels: every position is ignored (-100), want at least one target after the first position")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX)


def _as_list(pixel_values: Tensor | Sequence[Tensor | None]) -> list[Tensor | None]:
    """One (F, 3, H, W) for each clip."""
    whole = isinstance(pixel_values, Tensor)
    if isinstance(pixel_values, Tensor) and pixel_values.ndim != 5:
        raise ValueError(
            f"pixel_values: got shape {tuple(pixel_values.shape)}, want (clips, frames, channels, height, width)"
        )
    clips = list(pixel_values)
    for index, clip in enumerate(clips):
        name = "pixel_values" if whole else f"pixel_values[{index}]"
        if clip is not None and clip.ndim != 4:
            raise ValueError(f"{name}: got shape {tuple(clip.shape)}, want (frames, channels, height, width)")
        if clip is not None and not torch.isfinite(clip).all():
            raise ValueError(f"{name}: got NaN or infinite pixels, want finite ones")
    return clips


def _per_clip(merge: MergeConfig | Sequence[MergeConfig], num_clips: int) -> list[MergeConfig]:
    if isinstance(merge, MergeConfig):
        return [merge] * num_clips
    if len(merge) != num_clips:
        raise ValueError(f"merge: got {len(merge)} configs for {num_clips} clips, want as many")
    return list(merge)


def _patch_centres(out: VisionOutput) -> Tensor:
    """Mean index of the input tokens that each token stands for, (frames, N) float32."""
    assert out.trace is not None
    num_tokens, num_inputs = out.hidden.shape[1], out.trace.num_prefix_tokens + math.prod(out.trace.grid)
    indices = torch.arange(num_inputs, dtype=torch.float32, device=out.hidden.device).expand(len(out.hidden), -1)
    source = out.trace.sources[-1] if out.trace.sources else indices.long()
    total = indices.new_zeros(len(indices), num_tokens)
    counts = total.scatter_add(1, source, torch.ones_like(indices))
    return total.scatter_add(1, source, indices) / counts
