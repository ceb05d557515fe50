"""Several captions of each clip, with every clip encoded once and read once.

The five structured captions of VDC differ in their question alone, which stands behind the frames. So the language
model reads the prompt up to the last frame once per clip, and its keys and values then serve every question: at 8
frames of 144 tokens this is five times less to read than one `generate` per caption, with the same ids.

Shape letters: B clips, Q questions, T question positions, L cached positions, F frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aurora.generation.engine import check_context
from aurora.generation.options import MergeOptions
from aurora.model.cache import KVCache
from aurora.model.captioner import AuroraModel, VisualFeatures
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.chat import tokenize_prompt
from aurora.processing.processor import AuroraProcessor


class ClipCaptions(NamedTuple):
    """What was written about one clip."""

    captions: dict[str, str]
    """Name of the question -> caption."""
    visual_tokens: list[int]
    """Visual tokens the language model read, per frame."""


class StructuredCaptioner:
    """Answers a fixed set of questions about clips, greedily."""

    def __init__(
        self,
        model: AuroraForConditionalGeneration,
        processor: AuroraProcessor,
        questions: Mapping[str, str],
        *,
        max_new_tokens: int = 160,
    ) -> None:
        """Keep a model with its processor.

        Args:
            model: The captioner.
            processor: Of the same checkpoint.
            questions: Name -> what to ask.
            max_new_tokens: At most so many tokens for a caption.
        """
        self.model = model.eval()
        self.processor = processor
        self.questions = dict(questions)
        self.max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def caption(self, clips: Sequence[NDArray[np.uint8]], **merging: Unpack[MergeOptions]) -> list[ClipCaptions]:
        """Answer every question about every clip.

        Args:
            clips: Frames of each clip, (F, H, W, 3) uint8 RGB; F is the same for all.
            **merging: See `MergeOptions`.

        Returns:
            One entry for each clip.

        Raises:
            ValueError: if the clips differ in length, or the prompt does not fit the model.
        """
        if len({len(frames) for frames in clips}) != 1:
            raise ValueError(f"clips of {[len(frames) for frames in clips]} frames: want at least one, all alike")
        pixels = torch.stack([self.processor.image_processor.preprocess_frames(frames) for frames in clips])
        features = self.model.encode(
            pixel_values_videos=pixels.to(self.model.device, self.model.dtype), **merging
        ).features
        shared, rest = self._split_prompts(len(clips[0]))
        cache = read_clips(self.model.model, shared, features, [len(ids) for ids in rest])
        answers = answer(self.model.model, cache, rest, max_new_tokens=self.max_new_tokens)
        return [
            ClipCaptions(
                {
                    name: self.processor.decode(ids, skip_special_tokens=True).strip()
                    for name, ids in zip(self.questions, row, strict=True)
                },
                counts,
            )
            for row, counts in zip(answers, features.counts, strict=True)
        ]

    def _split_prompts(self, num_frames: int) -> tuple[list[int], list[list[int]]]:
        """Ids up to the last frame, the same for every question, and those behind it."""
        index = self.processor.image_token_index
        prompts = [
            tokenize_prompt(self.processor.build_prompt(question, num_frames), self.processor.tokenizer, index)
            for question in self.questions.values()
        ]
        cut = len(prompts[0]) - prompts[0][::-1].index(index)
        assert all(ids[:cut] == prompts[0][:cut] and index not in ids[cut:] for ids in prompts)
        return prompts[0][:cut], [ids[cut:] for ids in prompts]


def read_clips(
    model: AuroraModel, shared_ids: Sequence[int], features: VisualFeatures, question_lengths: Sequence[int]
) -> KVCache:
    """Run the common part of the prompts over B clips.

    Args:
        model: The captioner.
        shared_ids: Ids with placeholders, the same for all clips.
        features: The encoded clips.
        question_lengths: Tokens of each question that will follow.

    Returns:
        Keys and values, one row for each clip.

    Raises:
        ValueError: if placeholders and frames disagree, or a question leaves no room for its answer.
    """
    num_visual = sum(features.counts[0])
    num_text = len(shared_ids) - sum(token == model.config.image_token_index for token in shared_ids)
    check_context(
        [num_text + length for length in question_lengths],
        [num_visual] * len(question_lengths),
        model.config.text.max_seq_len,
    )
    ids = torch.tensor([list(shared_ids)] * len(features.frames), device=model.device)
    spliced = model.splice(ids, features)  # no padding: every clip has the same plan
    rows, length = spliced.attention_mask.shape
    cache = KVCache(model.config.text, batch_size=rows, max_length=length, device=model.device, dtype=model.dtype)
    model.language_model(spliced.inputs_embeds, position_ids=spliced.position_ids, cache=cache, logits_to_keep=1)
    return cache


def answer(
    model: AuroraModel, cache: KVCache, questions: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[list[list[int]]]:
    """Continue each of B cached prompts with each of Q questions, greedily.

    Args:
        model: The captioner.
        cache: One row for each prompt; not changed.
        questions: Ids behind the cached ones.
        max_new_tokens: At most so many new tokens; the context of the model may allow fewer.

    Returns:
        For each prompt, for each question, the new ids without end-of-text.
    """
    config, device = model.config, model.device
    width = max(map(len, questions))
    limit = min(max_new_tokens, config.text.max_seq_len - cache.length - width)
    padded = [[config.pad_token_id] * (width - len(ids)) + list(ids) for ids in questions]
    ids = torch.tensor(padded, device=device).repeat(cache.keys.shape[1], 1)  # (B Q, T), a clip's rows together
    valid = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in questions], device=device)
    valid = valid.repeat(cache.keys.shape[1], 1)
    mask = torch.cat([valid.new_ones(len(ids), cache.length), valid, valid.new_ones(len(ids), limit)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)  # (B Q, L + T + limit), padding not counted
    cache = _repeat_rows(model, cache, len(questions), cache.length + width + limit)

    written: list[list[int]] = [[] for _ in range(len(ids))]
    running = list(range(len(ids)))  # which answer each row of the batch is
    for _ in range(limit):
        start, end = cache.length, cache.length + ids.shape[1]
        logits: Tensor = model.language_model(
            model.language_model.embed(ids),
            position_ids=positions[:, start:end],
            attention_mask=mask[:, :end],
            cache=cache,
            logits_to_keep=1,
        )
        ids = logits.argmax(dim=-1)  # (rows, 1)
        ended = []
        for row, token in zip(running, ids[:, 0].tolist(), strict=True):
            if not written[row] or written[row][-1] != config.eos_token_id:
                written[row].append(token)
            ended.append(written[row][-1] == config.eos_token_id)
        if all(ended):
            break
        if 2 * sum(ended) >= len(ended):  # a long answer does not carry the short ones along
            keep = torch.tensor([not done for done in ended], device=device)
            running = [row for row, done in zip(running, ended, strict=True) if not done]
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
            cache.keys, cache.values = cache.keys[:, keep], cache.values[:, keep]
    texts = [row[:-1] if row[-1] == config.eos_token_id else row for row in written]
    return [texts[start : start + len(questions)] for start in range(0, len(texts), len(questions))]


def _repeat_rows(model: AuroraModel, cache: KVCache, times: int, max_length: int) -> KVCache:
    """A longer cache with each row `times` times in a row."""
    repeated = KVCache(
        model.config.text,
        batch_size=cache.keys.shape[1] * times,
        max_length=max_length,
        device=cache.keys.device,
        dtype=cache.keys.dtype,
    )
    for new, old in ((repeated.keys, cache.keys), (repeated.values, cache.values)):
        new[:, :, :, : cache.length] = old[:, :, :, : cache.length].repeat_interleave(times, dim=1)
    repeated.length = cache.length
    return repeated
