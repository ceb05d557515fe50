"""AuroraCap: encode and merge frames, project them, splice them into the text, decode.

Chai et al., 2024. Shape letters: B rows, F frames, T text positions with placeholders, L positions after splicing, N
visual tokens of a frame, C width of the language model, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aurora.model.attention import BACKENDS
from aurora.model.llama import Llama, LlamaConfig
from aurora.model.merge import MergeConfig, MergePlan, plan_clip
from aurora.model.projector import Projector, ProjectorConfig
from aurora.model.vision import VisionConfig, VisionTower, VisionTrace, num_active_layers

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""
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


class VisualFeatures(NamedTuple):
    """Projected visual tokens of a batch of clips."""

    frames: list[list[Tensor]]
    """For each clip, for each frame, (N, C); N is the same for all frames of one plan."""
    plans: tuple[MergePlan, ...]
    """Plan of each frame, the same for every clip."""
    traces: list[tuple[list[tuple[int, int]], VisionTrace]]
    """With trace=True: (clip, frame) of each row of a trace, and the trace; one entry per tower run."""

    @property
    def counts(self) -> list[list[int]]:
        """Visual tokens delivered, per clip and frame."""
        return [[frame.shape[0] for frame in clip] for clip in self.frames]


class Spliced(NamedTuple):
    """Text with the visual tokens in place of their placeholders."""

    inputs_embeds: Tensor
    """(B, L, C); padding is zero."""
    attention_mask: Tensor
    """True where a token is, (B, L) bool."""
    position_ids: Tensor
    """(B, L) int64, counted over tokens alone."""
    labels: Tensor | None
    """(B, L) int64; visual tokens and padding are ignored."""


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

    def encode(self, pixel_values: Tensor, *, merge: MergeConfig | None = None, trace: bool = False) -> VisualFeatures:
        """Encode clips into projected visual tokens.

        Args:
            pixel_values: Normalised frames, (B, F, 3, height, width).
            merge: How to merge; None is the configuration's.
            trace: Also record what merged with what.

        Returns:
            The tokens of each frame, merged as planned.

        Raises:
            ValueError: if the shape does not fit, a value is not finite, or the plan is impossible.
        """
        if pixel_values.ndim != 5:
            raise ValueError(
                f"pixel_values: got shape {tuple(pixel_values.shape)}, want (clips, frames, channels, height, width)"
            )
        if not torch.isfinite(pixel_values).all():
            raise ValueError("pixel_values: got NaN or infinite pixels, want finite ones")
        merge = merge or self.config.merge
        num_clips, num_frames, _, height, width = pixel_values.shape
        plans = self.plan(num_frames, height, width, merge)
        num_dropped = 0 if self.config.feature_select_strategy == "full" else self.config.vision.num_prefix_tokens
        clips: list[list[Tensor]] = [[] for _ in range(num_clips)]
        traces: list[tuple[list[tuple[int, int]], VisionTrace]] = []
        for plan in dict.fromkeys(plans):  # at most two; the unmerged first frame of slowfast comes first
            indices = [index for index, other in enumerate(plans) if other == plan]
            frames = rearrange(pixel_values[:, indices], "b f c h w -> (b f) c h w")
            rows = [(clip, index) for clip in range(num_clips) for index in indices]
            features = []
            for start in range(0, len(rows), FRAMES_PER_CHUNK):
                chunk = frames[start : start + FRAMES_PER_CHUNK]
                out = self.vision_tower(
                    chunk.to(self.vision_tower.patch_embed.weight.dtype),
                    plan=plan,
                    feature_layer=self.config.feature_layer,
                    size_bias=merge.size_bias,
                    trace=trace,
                )
                features.append(self.projector(out.hidden[:, num_dropped:]))  # (frames, N, C)
                if out.trace is not None:
                    traces.append((rows[start : start + FRAMES_PER_CHUNK], out.trace))
            for (clip, _), merged in zip(rows, torch.cat(features), strict=True):
                clips[clip].append(merged)
        return VisualFeatures(clips, plans, traces)

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
            clip = visual.frames[row] if visual is not None else []
            rows.append(self._splice_row(row, ids[keep], clip, None if labels is None else labels[row][keep]))
        return _pad_rows(rows, padding_side, with_labels=labels is not None)

    def _splice_row(self, row: int, ids: Tensor, clip: list[Tensor], labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings (L, C) and labels (L,) of one row."""
        config = self.config
        is_placeholder = ids == config.image_token_index
        num_placeholders = int(is_placeholder.sum())
        if num_placeholders not in (0, 1, len(clip)) or (num_placeholders and not clip):
            raise ValueError(
                f"row {row}: {num_placeholders} placeholder{'s' * (num_placeholders != 1)} in input_ids and "
                f"{len(clip)} frame{'s' * (len(clip) != 1)} in pixel_values; want one placeholder per frame, or one "
                f"for the whole clip"
            )
        text = ids[~is_placeholder]
        if text.numel() and (int(text.min()) < 0 or int(text.max()) >= config.text.vocab_size):
            wrong = next(i for i in text.tolist() if not 0 <= i < config.text.vocab_size)
            raise ValueError(
                f"row {row}: token id {wrong} in input_ids; want 0 to {config.text.vocab_size - 1}, or "
                f"{config.image_token_index} for a placeholder"
            )
        embeds = self.language_model.embed(ids.masked_fill(is_placeholder, 0))  # (T, C)
        labels = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels
        if num_placeholders == 0:
            return embeds, labels
        runs = clip if num_placeholders == len(clip) else [torch.cat(clip)]
        parts, targets, start = [], [], 0
        for end, run in zip(is_placeholder.nonzero()[:, 0].tolist(), runs, strict=True):
            parts += [embeds[start:end], run.to(embeds.dtype)]
            targets += [labels[start:end], labels.new_full((run.shape[0],), IGNORE_INDEX)]
            start = end + 1
        return torch.cat([*parts, embeds[start:]]), torch.cat([*targets, labels[start:]])

    def forward(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        merge: MergeConfig | None = None,
    ) -> AuroraOutput:
        """Predict the next token at each position of text with clips in it.

        Args:
            input_ids: Token ids with placeholders, (B, T).
            pixel_values: One clip for each row, (B, F, 3, height, width); rows without a placeholder ignore theirs.
            attention_mask: True where a token is, (B, T).
            labels: Target ids, (B, T); -100 is ignored.
            merge: How to merge; None is the configuration's.

        Returns:
            Loss (if there are labels), logits, delivered counts, and mask and labels over the spliced sequence.

        Raises:
            ValueError: as `encode` and `splice`.
        """
        visual = None if pixel_values is None else self.encode(pixel_values, merge=merge)
        spliced = self.splice(input_ids, visual, attention_mask=attention_mask, labels=labels)
        padded = not bool(spliced.attention_mask.all())
        logits = self.language_model(
            spliced.inputs_embeds,
            position_ids=spliced.position_ids,
            attention_mask=spliced.attention_mask if padded else None,
        )
        loss = None if spliced.labels is None else next_token_loss(logits, spliced.labels)
        counts = [] if visual is None else visual.counts
        return AuroraOutput(loss, logits, counts, spliced.attention_mask, spliced.labels)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of logits (B, L, V) against the labels (B, L) one position later.

    Raises:
        ValueError: if no position carries a label, where the mean would be NaN.
    """
    targets = labels[:, 1:].flatten()
    if not bool((targets != IGNORE_INDEX).any()):
        raise ValueError("labels: every position is ignored (-100), want at least one target after the first position")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX)


def _pad_rows(rows: list[tuple[Tensor, Tensor]], padding_side: str, *, with_labels: bool) -> Spliced:
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}: want left or right")
    lengths = [embeds.shape[0] for embeds, _ in rows]
    longest = max(lengths)
    embeds_rows, mask_rows, label_rows = [], [], []
    for (embeds, labels), length in zip(rows, lengths, strict=True):
        pad = (longest - length, 0) if padding_side == "left" else (0, longest - length)
        embeds_rows.append(F.pad(embeds, (0, 0, *pad)))
        mask_rows.append(F.pad(torch.ones_like(labels, dtype=torch.bool), pad))
        label_rows.append(F.pad(labels, pad, value=IGNORE_INDEX))
    mask = torch.stack(mask_rows)
    position_ids = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return Spliced(torch.stack(embeds_rows), mask, position_ids, torch.stack(label_rows) if with_labels else None)
