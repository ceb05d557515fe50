"""`AuroraForConditionalGeneration`: the captioner with loading, saving and generation. A facade; others do the work.

Calls carry their own merging wish: `token_kept_ratio`, `visual_token_budget`, `slowfast` and the rest change a copy of
`config.merge`, so nothing of one call is left for the next.

Shape letters: B rows, F frames, T text positions, L positions with visual tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, cast

import torch
from torch import Tensor, nn

from aurora.checkpoint.pretrained import load_pretrained, save_model
from aurora.checkpoint.public_config import AuroraConfig, public_config
from aurora.checkpoint.store import DEFAULT_SHARD_SIZE
from aurora.generation.engine import Streamer, generate
from aurora.generation.options import GenerateOptions, MergeOptions, merge_for_call, split_options
from aurora.generation.outputs import ForwardOutput, GenerateOutput, VisualPrefix
from aurora.generation.prompts import (
    Clips,
    Prompt,
    as_clips,
    check_prompts,
    merge_for_clips,
    read_prompts,
    splice_prompts,
    split_heads,
)
from aurora.generation.state import PromptState, extend, prefill, synchronized_s
from aurora.generation.streaming import make_stopper
from aurora.model import captioner
from aurora.model.attention import BACKENDS
from aurora.model.cache import KVCache
from aurora.model.captioner import AuroraModel, VisualFeatures
from aurora.model.merge import MergeConfig, MergePlan

if TYPE_CHECKING:
    from aurora.processing.processor import AuroraProcessor
    from aurora.processing.text import Tokenizer

__all__ = ["AuroraForConditionalGeneration", "ForwardOutput", "GenerateOutput", "VisualPrefix"]

Pixels: TypeAlias = "Tensor | Sequence[Tensor | None] | None"
"""Pixels of a batch: one tensor, or one for each row."""


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
            torch_dtype: float32, float16 or bfloat16 (or its name), "auto" for the recorded one. None is float32, and
                "auto" for a quantised model.
            low_cpu_mem_usage: Accepted for compatibility; loading never holds a second copy.
            device_map: A device, or "auto" for CUDA where there is one; None is the CPU.
            attn_implementation: A name of `aurora.model.attention.BACKENDS`; one that cannot run here is refused.
            use_flash_attention_2: The same as attn_implementation="flash_attention_2".
            quantization_config: Quantise the language model while it is read, one weight at a time: a
                `BitsAndBytesConfig` (ours or transformers'), an `Int8Config`, or int8, int8_bnb, nf4, fp4. A checkpoint
                that was saved quantised needs none.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: for an unknown option, a package that is missing (with the command that installs it), or a
                checkpoint that cannot be loaded.
        """
        backend = _attention_backend("flash_attention_2" if use_flash_attention_2 else attn_implementation)
        device = _device_of(device_map)
        loaded = load_pretrained(
            path,
            dtype=torch_dtype,
            device=device,
            attn_implementation=backend,
            quantization=quantization_config,
        )
        model = cls(loaded.model)
        model.image_aspect_ratio = loaded.image_aspect_ratio
        return model.eval()

    def save_pretrained(
        self, path: str | Path, layout: str = "aurora", *, max_shard_size: int | str = DEFAULT_SHARD_SIZE
    ) -> None:
        """Save weights and configuration; either all files appear or none. A quantised model is saved quantised.

        Args:
            path: Folder, made when missing; other files in it stay.
            layout: aurora, xtuner, llava_hf or llava; quantised aurora or xtuner.
            max_shard_size: Split the weights beyond this.

        Raises:
            ValueError: for an unknown layout, one that cannot hold quantised weights, or if the disk refuses.
        """
        save_model(self.model, path, layout, max_shard_size=max_shard_size, image_aspect_ratio=self.image_aspect_ratio)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Pixels = None,
        pixel_values_videos: Pixels = None,
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
            pixel_values: Images, (B, 3, H, W), or frames, (B, F, 3, H, W); or a list, see `generate`.
            pixel_values_videos: Frames, (B, F, 3, H, W), or a list; one of the two.
            attention_mask: True where a token is, (B, T); with past_key_values (B, L_past + T).
            labels: Target ids, (B, T); -100 is ignored.
            past_key_values: Continue with text behind these positions; they are extended in place.
            use_cache: Return keys and values; without gradients only.
            **options: Merging, see `MergeOptions`; a list has one value for each row.

        Returns:
            Loss, logits and what was delivered.

        Raises:
            ValueError: if shapes, placeholders or options do not fit.
        """
        if use_cache and torch.is_grad_enabled():
            raise ValueError("use_cache=True: the cache is written in place, want torch.no_grad() around the call")
        clips = as_clips(pixel_values, pixel_values_videos)
        if past_key_values is not None:
            if clips is not None or labels is not None:
                raise ValueError("past_key_values: got pixels or labels as well, want text alone")
            return self._continue(input_ids, past_key_values, attention_mask)
        cache = None
        if use_cache:
            cache = KVCache(
                self.config.text, batch_size=len(input_ids), max_length=0, device=self.device, dtype=self.dtype
            )
        merges = merge_for_clips(self.config.merge, options, len(clips or ()))
        out = self.model(
            input_ids, pixel_values=clips, attention_mask=attention_mask, labels=labels, merge=merges, cache=cache
        )
        placeholders = input_ids == self.config.image_token_index
        if attention_mask is not None:
            placeholders &= attention_mask.bool()
        counts = out.visual_token_counts or [[]] * len(input_ids)
        return ForwardOutput(
            loss=out.loss,
            logits=out.logits,
            past_key_values=cache,
            visual_token_counts=[own if shown else [] for own, shown in zip(counts, placeholders.any(1), strict=True)],
            attention_mask=out.attention_mask,
            labels=out.labels,
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
        pixel_values: Pixels = None,
        pixel_values_videos: Pixels = None,
        *,
        trace: bool = False,
        **options: Unpack[MergeOptions],
    ) -> VisualPrefix:
        """Encode clips once, to answer several prompts over them with `generate(prefix=...)`.

        Args:
            pixel_values: Images, (B, 3, H, W), or frames, (B, F, 3, H, W); or a list, see `generate`.
            pixel_values_videos: Frames, (B, F, 3, H, W), or a list; one of the two.
            trace: Also record what merged with what.
            **options: Merging, see `MergeOptions`; a list has one value for each clip.

        Returns:
            The prefix.

        Raises:
            ValueError: if there are no pixels, or they or the options do not fit.
        """
        clips = as_clips(pixel_values, pixel_values_videos)
        if clips is None:
            raise ValueError("encode: got no pixels, want pixel_values or pixel_values_videos")
        return self._encode(clips, merge_for_clips(self.config.merge, options, len(clips)), trace=trace)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Pixels = None,
        pixel_values_videos: Pixels = None,
        attention_mask: Tensor | None = None,
        *,
        prefix: VisualPrefix | None = None,
        streamer: Streamer | None = None,
        tokenizer: Tokenizer | AuroraProcessor | None = None,
        return_dict: bool = False,
        output_logits: bool = False,
        output_logprobs: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Tensor | GenerateOutput:
        """Answer prompts over images or clips.

        Several prompts over one clip share what the language model reads of it, as long as they begin alike up to the
        last frame. Rows need not be alike in anything: each gets the ids it gets alone.

        Args:
            input_ids: Token ids with placeholders, (B, T), padded on either side.
            pixel_values: Images, (B, 3, H, W), or frames, (B, F, 3, H, W). Or a list of (3, H, W) or (F, 3, H, W),
                which may differ in length and size, with None for a row without any.
            pixel_values_videos: Frames, (B, F, 3, H, W), or a list of (F, 3, H, W); one of the two.
            attention_mask: True where a token is, (B, T); needed if there is padding.
            prefix: Clips encoded before, instead of pixels. Fewer clips than rows serve equally many neighbouring rows
                each, whether in pixels or here.
            streamer: Gets tokens as they come.
            tokenizer: Turns ids into text; the option `stop` needs it. A processor's is taken from it.
            return_dict: Return a `GenerateOutput` instead of the ids.
            output_logits: Keep the logits in it.
            output_logprobs: Keep the log-probabilities of the tokens in it.
            **options: max_new_tokens, temperature, top_p, top_k, repetition_penalty, eos_token_id, seed, num_beams and
                so on as in `SamplingConfig`; token_kept_ratio and its kin as in `MergeOptions`, where a list has one
                value for each clip.

        Returns:
            New ids only, (B, T_new) int64, or everything.

        Raises:
            ValueError: if an option is wrong, or prompt and visual tokens do not fit; before anything is computed.
        """
        sampling, merging = split_options(options)
        stopper = make_stopper(sampling, tokenizer)
        clips = as_clips(pixel_values, pixel_values_videos)
        plans: list[tuple[MergePlan, ...]] = []
        if prefix is None:
            merges = merge_for_clips(self.config.merge, merging, len(clips or ()))
            for clip, wish in zip(clips or (), merges, strict=True):
                plans.append(() if clip is None else self.model.plan(len(clip), clip.shape[2], clip.shape[3], wish))
        else:
            if clips is not None or any(value is not None for value in merging.values()):
                raise ValueError("prefix: got pixels or merging options as well, want them in encode() alone")
            plans, merges = prefix.features.plans, prefix.features.merges
        index = self.config.image_token_index
        prompts = read_prompts(input_ids, attention_mask, num_clips=len(plans), image_token_index=index)
        check_prompts(prompts, plans, merges, self.config, sampling)
        visual, encode_s = None, 0.0
        if clips is not None:
            shown = {prompt.clip for prompt in prompts if prompt.num_placeholders}
            clips = [clip if row in shown else None for row, clip in enumerate(clips)]
            encoded = self._encode(clips, merges) if shown else None
            visual, encode_s = (None, 0.0) if encoded is None else (encoded.features, encoded.seconds)
        state = self._read(prompts, visual, prefix, room=0 if sampling.num_beams > 1 else sampling.max_new_tokens)
        result = generate(
            self.model,
            state,
            sampling,
            streamer=streamer,
            stopper=stopper,
            keep_logits=output_logits,
            keep_logprobs=output_logprobs,
        )
        if not return_dict:
            return result.sequences
        own = [plans[prompt.clip] if prompt.num_placeholders else () for prompt in prompts]
        features = visual if prefix is None else prefix.features
        counts = [] if features is None else features.counts
        return GenerateOutput(
            sequences=result.sequences,
            visual_token_counts=[counts[prompt.clip] if prompt.num_placeholders else [] for prompt in prompts],
            plans=own,
            seconds={"encode": encode_s if prefix is None else prefix.seconds, **result.seconds},
            num_generated=result.num_generated,
            stopped_by=result.stopped_by,
            logits=result.logits,
            logprobs=result.logprobs,
        )

    def _encode(self, clips: Clips, merges: list[MergeConfig], *, trace: bool = False) -> VisualPrefix:
        start = synchronized_s(self.device)
        features = self.model.encode(clips, merge=merges, trace=trace)
        return VisualPrefix(features=features, seconds=synchronized_s(self.device) - start)

    def _read(
        self, prompts: list[Prompt], visual: VisualFeatures | None, prefix: VisualPrefix | None, *, room: int
    ) -> PromptState:
        """Have the language model read the prompts; beginnings that several share, or that it knows, only once."""
        split = split_heads(prompts, self.config.image_token_index)
        if prefix is None and len(split.heads) == len(prompts):
            return prefill(self.model, splice_prompts(self.model, prompts, visual), room=room)
        found = None if prefix is None else prefix.find_state(split.heads)
        if found is None:
            features = visual if prefix is None else prefix.features
            state = prefill(self.model, splice_prompts(self.model, split.heads, features))
            if prefix is not None:
                prefix.keep_state(split.heads, state)
            extended = extend(self.model, state, split.suffixes, split.row_of, room=room)
            extended.seconds += state.seconds
            return extended
        state, rows = found
        return extend(self.model, state, split.suffixes, [rows[head] for head in split.row_of], room=room)

    def merge_config(self, **options: Unpack[MergeOptions]) -> MergeConfig:
        """What one call asks of merging: `config.merge` with its options in place; see `merge_for_call`."""
        return merge_for_call(self.config.merge, options)


def _attention_backend(name: str) -> str:
    """Check a name; whether the backend can run is checked once its device and dtype are known."""
    if name not in BACKENDS:
        raise ValueError(f"attn_implementation={name!r}: want one of {', '.join(BACKENDS)}")
    return name


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
