"""`AuroraForConditionalGeneration`: the captioner with loading, saving and generation. A facade; others do the work.

Calls carry their own merging wish: `token_kept_ratio`, `visual_token_budget`, `slowfast` and the rest change a copy of
`config.merge`, so nothing of one call is left for the next.

Shape letters: B rows, F frames, T text positions, L positions with visual tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from aurora.checkpoint.pretrained import load_pretrained, save_model
from aurora.checkpoint.public_config import AuroraConfig, public_config
from aurora.checkpoint.store import DEFAULT_SHARD_SIZE
from aurora.generation.engine import Streamer, check_context, generate, synchronized_s
from aurora.generation.options import GenerateOptions, MergeOptions, merge_for_call, split_options
from aurora.model import captioner
from aurora.model.attention import BACKENDS
from aurora.model.cache import KVCache
from aurora.model.captioner import AuroraModel, VisualFeatures, next_token_loss
from aurora.model.merge import MergeConfig, MergePlan


@dataclass(kw_only=True, slots=True)
class ForwardOutput:
    """Result of a forward pass."""

    loss: Tensor | None
    """Mean cross-entropy over labelled positions, a float32 scalar; None without labels."""
    logits: Tensor
    """(B, L, V) over the expanded sequence."""
    past_key_values: KVCache | None
    """With use_cache: keys and values of the L positions."""
    visual_token_counts: list[list[int]]
    """Visual tokens delivered, per row and frame; empty for a text-only row."""
    attention_mask: Tensor
    """(B, L) bool, padding on the right."""
    labels: Tensor | None
    """(B, L) int64."""


@dataclass(kw_only=True, slots=True)
class GenerateOutput:
    """Result of `generate(..., return_dict=True)`."""

    sequences: Tensor
    """New ids only, (B, T_new) int64; a finished row is filled with the pad id."""
    visual_token_counts: list[list[int]]
    """Visual tokens delivered, per row and frame; empty for a text-only row."""
    plans: tuple[MergePlan, ...]
    """Plan of each frame."""
    seconds: dict[str, float]
    """encode, prefill and decode."""
    num_generated: list[int]
    """Tokens of each row, end-of-text included."""
    stopped_by: list[str]
    """eos, length or context, for each row."""
    logits: Tensor | None
    """With output_logits: (B, T_new, V) float32."""


@dataclass(kw_only=True, slots=True)
class VisualPrefix:
    """Encoded clips, for several prompts; see `AuroraForConditionalGeneration.encode`."""

    features: VisualFeatures
    """Projected visual tokens."""
    seconds: float
    """How long encoding took."""


class AuroraForConditionalGeneration(nn.Module):
    """AuroraCap, with the interface of the published snippets."""

    def __init__(self, config: captioner.AuroraConfig | AuroraModel) -> None:
        """Build a model with fresh weights, or wrap one.

        Args:
            config: What to build, or the model to wrap.
        """
        super().__init__()
        self.model = config if isinstance(config, AuroraModel) else AuroraModel(config)
        self.model.config = public_config(self.model.config)
        self.image_aspect_ratio: str | None = None

    @property
    def config(self) -> AuroraConfig:
        """Configuration of the model."""
        return cast(AuroraConfig, self.model.config)  # made one in __init__

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the language model."""
        return self.model.dtype

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        low_cpu_mem_usage: bool = True,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        attn_implementation: str = "auto",
        use_flash_attention_2: bool = False,
        quantization_config: object | None = None,
    ) -> AuroraForConditionalGeneration:
        """Load a checkpoint of any known layout.

        Args:
            path: Checkpoint folder or hub id.
            torch_dtype: float32, float16 or bfloat16 (or its name), "auto" for the recorded one; None is float32.
            low_cpu_mem_usage: Accepted for compatibility; loading never holds a second copy.
            device_map: A device, or "auto" for CUDA where there is one; None is the CPU.
            attn_implementation: auto, eager or sdpa.
            use_flash_attention_2: The same as attn_implementation="flash_attention_2".
            quantization_config: Not available in this version.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: for an option this version does not have, or a checkpoint that cannot be loaded.
        """
        if quantization_config is not None:
            kind = type(quantization_config).__name__
            raise ValueError(
                f"quantization_config={kind}: quantised loading is not available in this version, want None"
            )
        backend = _attention_backend("flash_attention_2" if use_flash_attention_2 else attn_implementation)
        device = _device_of(device_map)
        loaded = load_pretrained(path, dtype=torch_dtype, device=device, attn_implementation=backend)
        model = cls(loaded.model)
        model.image_aspect_ratio = loaded.image_aspect_ratio
        return model.eval()

    def save_pretrained(
        self, path: str | Path, layout: str = "aurora", *, max_shard_size: int | str = DEFAULT_SHARD_SIZE
    ) -> None:
        """Save weights and configuration; either all files appear or none.

        Args:
            path: Folder, made when missing; other files in it stay.
            layout: aurora, xtuner, llava_hf or llava.
            max_shard_size: Split the weights beyond this.

        Raises:
            ValueError: for an unknown layout, or if the disk refuses.
        """
        save_model(self.model, path, layout, max_shard_size=max_shard_size, image_aspect_ratio=self.image_aspect_ratio)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        **options: Unpack[MergeOptions],
    ) -> ForwardOutput:
        """Predict the next token at each position.

        Args:
            input_ids: Token ids with placeholders, (B, T).
            pixel_values: Images, (B, 3, H, W), or frames, (B, F, 3, H, W).
            pixel_values_videos: Frames, (B, F, 3, H, W); one of the two.
            attention_mask: True where a token is, (B, T); with past_key_values (B, L_past + T).
            labels: Target ids, (B, T); -100 is ignored.
            past_key_values: Continue with text behind these positions; they are extended in place.
            use_cache: Return keys and values; without gradients only.
            **options: Merging, see `MergeOptions`.

        Returns:
            Loss, logits and what was delivered.

        Raises:
            ValueError: if shapes, placeholders or options do not fit.
        """
        if use_cache and torch.is_grad_enabled():
            raise ValueError("use_cache=True: the cache is written in place, want torch.no_grad() around the call")
        pixels = _as_clips(pixel_values, pixel_values_videos)
        if past_key_values is not None:
            if pixels is not None or labels is not None:
                raise ValueError("past_key_values: got pixels or labels as well, want text alone")
            return self._continue(input_ids, past_key_values, attention_mask)
        visual = None if pixels is None else self.model.encode(pixels, merge=self.merge_config(**options))
        spliced = self.model.splice(input_ids, visual, attention_mask=attention_mask, labels=labels)
        rows, length = spliced.attention_mask.shape
        cache = None
        if use_cache:
            cache = KVCache(self.config.text, batch_size=rows, max_length=length, device=self.device, dtype=self.dtype)
        padded = not bool(spliced.attention_mask.all())
        logits = self.model.language_model(
            spliced.inputs_embeds,
            position_ids=spliced.position_ids,
            attention_mask=spliced.attention_mask if padded else None,
            cache=cache,
        )
        return ForwardOutput(
            loss=None if spliced.labels is None else next_token_loss(logits, spliced.labels),
            logits=logits,
            past_key_values=cache,
            visual_token_counts=self._delivered(input_ids, attention_mask, visual),
            attention_mask=spliced.attention_mask,
            labels=spliced.labels,
        )

    def _continue(self, input_ids: Tensor, cache: KVCache, attention_mask: Tensor | None) -> ForwardOutput:
        rows, num_new = input_ids.shape
        mask = input_ids.new_ones(rows, cache.length + num_new, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != mask.shape:
                want = tuple(mask.shape)
                raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, want {want}, past included")
            mask = attention_mask.bool()
        position_ids = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -num_new:]
        cache.grow(cache.length + num_new)
        logits = self.model.language_model(
            self.model.language_model.embed(input_ids),
            position_ids=position_ids,
            attention_mask=None if bool(mask.all()) else mask,
            cache=cache,
        )
        return ForwardOutput(
            loss=None, logits=logits, past_key_values=cache, visual_token_counts=[], attention_mask=mask, labels=None
        )

    @torch.inference_mode()
    def encode(
        self,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        *,
        trace: bool = False,
        **options: Unpack[MergeOptions],
    ) -> VisualPrefix:
        """Encode clips once, to answer several prompts over them with `generate(prefix=...)`.

        Args:
            pixel_values: Images, (B, 3, H, W), or frames, (B, F, 3, H, W).
            pixel_values_videos: Frames, (B, F, 3, H, W); one of the two.
            trace: Also record what merged with what.
            **options: Merging, see `MergeOptions`.

        Returns:
            The prefix.

        Raises:
            ValueError: if there are no pixels, or they or the options do not fit.
        """
        pixels = _as_clips(pixel_values, pixel_values_videos)
        if pixels is None:
            raise ValueError("encode: got no pixels, want pixel_values or pixel_values_videos")
        start = synchronized_s(self.device)
        features = self.model.encode(pixels, merge=self.merge_config(**options), trace=trace)
        return VisualPrefix(features=features, seconds=synchronized_s(self.device) - start)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        prefix: VisualPrefix | None = None,
        streamer: Streamer | None = None,
        return_dict: bool = False,
        output_logits: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Tensor | GenerateOutput:
        """Answer prompts over images or clips.

        Args:
            input_ids: Token ids with placeholders, (B, T), padded on either side.
            pixel_values: Images, (B, 3, H, W), or frames, (B, F, 3, H, W).
            pixel_values_videos: Frames, (B, F, 3, H, W); one of the two.
            attention_mask: True where a token is, (B, T); needed if there is padding.
            prefix: Clips encoded before, instead of pixels; a single clip serves all rows.
            streamer: Gets tokens as they come.
            return_dict: Return a `GenerateOutput` instead of the ids.
            output_logits: Keep the logits in it.
            **options: max_new_tokens, temperature, top_p, top_k, repetition_penalty, eos_token_id, seed and num_beams
                as in `SamplingConfig`; token_kept_ratio and its kin as in `MergeOptions`.

        Returns:
            New ids only, (B, T_new) int64, or everything.

        Raises:
            ValueError: if an option is wrong, or prompt and visual tokens do not fit; before anything is computed.
        """
        sampling, merging = split_options(options)
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, want (rows, tokens)")
        pixels = _as_clips(pixel_values, pixel_values_videos)
        plans: tuple[MergePlan, ...] = ()
        if prefix is not None:
            if pixels is not None or any(value is not None for value in merging.values()):
                raise ValueError("prefix: got pixels or merging options as well, want them in encode() alone")
            plans = prefix.features.plans
        elif pixels is not None:
            plans = self.model.plan(pixels.shape[1], pixels.shape[3], pixels.shape[4], self.merge_config(**merging))
        self._check_prompt(input_ids, attention_mask, plans)
        if pixels is not None:
            prefix = self.encode(pixels, **merging)
        visual = None if prefix is None else _repeat_clip(prefix.features, len(input_ids))
        spliced = self.model.splice(input_ids, visual, attention_mask=attention_mask, padding_side="left")
        result = generate(self.model, spliced, sampling, streamer=streamer, keep_logits=output_logits)
        if not return_dict:
            return result.sequences
        return GenerateOutput(
            sequences=result.sequences,
            visual_token_counts=self._delivered(input_ids, attention_mask, visual),
            plans=plans,
            seconds={"encode": 0.0 if prefix is None else prefix.seconds, **result.seconds},
            num_generated=result.num_generated,
            stopped_by=result.stopped_by,
            logits=result.logits,
        )

    def merge_config(self, **options: Unpack[MergeOptions]) -> MergeConfig:
        """What one call asks of merging: `config.merge` with its options in place; see `merge_for_call`."""
        return merge_for_call(self.config.merge, options)

    def _check_prompt(self, input_ids: Tensor, attention_mask: Tensor | None, plans: tuple[MergePlan, ...]) -> None:
        """Refuse a prompt that cannot fit or does not match its frames, before the encoder runs."""
        kept_prefix = self.config.vision.num_prefix_tokens if self.config.feature_select_strategy == "full" else 0
        num_visual = sum(plan.num_visual_tokens + kept_prefix for plan in plans)
        placeholders = self._count_placeholders(input_ids, attention_mask)
        for row, count in enumerate(placeholders):
            if count not in (0, 1, len(plans)) or (count and not plans):
                raise ValueError(
                    f"row {row}: {count} placeholders in input_ids and {len(plans)} frames in the pixels; want one "
                    "placeholder per frame, or one for the whole clip"
                )
        total = [input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.sum(dim=1).tolist()
        text = [tokens - count for tokens, count in zip(total, placeholders, strict=True)]
        check_context(text, [num_visual if count else 0 for count in placeholders], self.config.text.max_seq_len)

    def _count_placeholders(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
        found = input_ids == self.config.image_token_index
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                want = tuple(input_ids.shape)
                raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, want {want} as input_ids")
            found = found & attention_mask.bool()
        counts: list[int] = found.sum(dim=1).tolist()
        return counts

    def _delivered(
        self, input_ids: Tensor, attention_mask: Tensor | None, visual: VisualFeatures | None
    ) -> list[list[int]]:
        if visual is None:
            return [[] for _ in range(len(input_ids))]
        placeholders = self._count_placeholders(input_ids, attention_mask)
        return [counts if count else [] for counts, count in zip(visual.counts, placeholders, strict=True)]


def _as_clips(pixel_values: Tensor | None, pixel_values_videos: Tensor | None) -> Tensor | None:
    """One (B, F, 3, H, W) tensor from either argument; an image is a clip of one frame."""
    if pixel_values is not None and pixel_values_videos is not None:
        raise ValueError("got pixel_values and pixel_values_videos, want one of them")
    if pixel_values is not None and pixel_values.ndim == 4:
        return pixel_values[:, None]
    pixels = pixel_values if pixel_values is not None else pixel_values_videos
    if pixels is not None and pixels.ndim != 5:
        name = "pixel_values" if pixel_values is not None else "pixel_values_videos"
        raise ValueError(f"{name}: got shape {tuple(pixels.shape)}, want (rows, frames, 3, height, width)")
    return pixels


def _repeat_clip(features: VisualFeatures, num_rows: int) -> VisualFeatures:
    return features._replace(frames=features.frames * num_rows) if len(features.frames) == 1 else features


def _attention_backend(name: str) -> str:
    if name in BACKENDS:
        return name
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            f'attn_implementation="{name}": flash-attn is not installed; want one of {", ".join(BACKENDS)}'
        )
    raise ValueError(f"attn_implementation={name!r}: not available in this version, want one of {', '.join(BACKENDS)}")


def _device_of(device_map: str | int | torch.device | dict[str, Any] | None) -> torch.device:
    if isinstance(device_map, dict):
        if list(device_map) != [""]:
            raise ValueError(
                f'device_map={device_map!r}: want one device for the whole model, such as {{"": "cuda:0"}}'
            )
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(cast("str | int | torch.device", device_map))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map={device_map!r}: want auto or a device such as cpu or cuda:0") from error
