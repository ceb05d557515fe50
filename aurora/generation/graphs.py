"""Decoding on a GPU without waiting for the host: a step of fixed shape, recorded once as a CUDA graph and replayed.

A step of a 7B model starts some hundred kernels; starting them from Python takes longer than running them. The step
here therefore has no size and no number in it that changes: the cache is a whole bucket of slots, where to write and
how far to look are tensors on the device, and a recorded graph serves every answer of the same number of rows and the
same bucket. On a CPU the same step runs directly, which is how it is tested.

Shape letters: B rows, L prompt positions, S slots of a bucket, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from aurora.generation.sampling import if_finite
from aurora.generation.state import Decoder, PromptState
from aurora.model.attention import attention
from aurora.model.cache import KVCache, SharedKVCache
from aurora.model.captioner import AuroraModel
from aurora.model.llama import Llama, LlamaConfig
from aurora.model.products import Decoding

SMALL_BUCKETS = 512
"""Buckets are multiples of this up to four of them, then of twice as much: reading empty slots costs bandwidth."""
MOST_STEPS_KEPT = 4
"""Recorded steps a model keeps; each holds a cache."""
LOOK_AHEAD = 256
"""Tokens for which a bucket must have room when an answer begins in it: changing buckets means recording again."""
_MOST_COMPILED = 4096
_WITHOUT_MASK = ("flash_attention_2", "sdpa_flash")


class Stepper(Protocol):
    """Runs one token per row and step behind prompts that were read."""

    def step(self, ids: Tensor) -> Tensor:
        """Run one more token per row, (B,); logits of the next one, (B, V)."""

    def step_greedily(self, ids: Tensor | None) -> Tensor:
        """Run one more token per row, (B,), None: those chosen last; the likeliest next ones, (B,), -1 for none."""

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] has generated, (B,) int64; both behind the same prompt."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, (B_new,) int64."""


def make_stepper(model: AuroraModel, state: PromptState, num_steps: int) -> Stepper:
    """Choose how to decode: on CUDA as `language_model.decoding` says, directly elsewhere.

    Args:
        model: The captioner.
        state: The prompts; their cache is used up.
        num_steps: Steps at most.

    Returns:
        The stepper. On CUDA, too, some decode directly: rows of very different lengths, whose caches are apart, and
        attention that takes no mask (flash_attention_2, sdpa_flash), which is how a static step knows its length.
    """
    if state.logits.device.type == "cuda" and is_recordable(model.language_model, state.cache):
        return GraphDecoder(model, state, num_steps)
    return Decoder(model, state, num_steps)


def is_recordable(language_model: Llama, cache: KVCache) -> bool:
    """Whether a step behind a cache can be one of fixed shape, if there were a device that records it."""
    if language_model.decoding is Decoding.direct or language_model.backend in _WITHOUT_MASK:
        return False
    return type(cache) in (KVCache, SharedKVCache)


def bucket_of(num_tokens: int) -> int:
    """Slots of the smallest bucket that holds so many tokens."""
    size = SMALL_BUCKETS if num_tokens <= 4 * SMALL_BUCKETS else 2 * SMALL_BUCKETS
    return -(-num_tokens // size) * size


class StaticKVCache(KVCache):
    """A cache that is read whole in every step; a tensor says where the next token goes."""

    def __init__(
        self, config: LlamaConfig, *, batch_size: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        """Allocate a cache of zeros; the arguments are those of `KVCache`."""
        super().__init__(config, batch_size=batch_size, max_length=max_length, device=device, dtype=dtype)
        self.length = max_length - 1  # a step of one token sees every slot; its mask says which are filled
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        """Tokens cached: the slot of the next one."""

    def load(self, cache: KVCache) -> None:
        """Take over what another cache of as many rows holds; a shared prompt is written out for each row."""
        for mine, theirs, prompt in (
            (self.keys, cache.keys, getattr(cache, "prompt_keys", None)),
            (self.values, cache.values, getattr(cache, "prompt_values", None)),
        ):
            start = 0
            if isinstance(cache, SharedKVCache) and prompt is not None:
                start = prompt.shape[3]
                mine[:, :, :, :start] = prompt.index_select(1, cache.row_of)
            mine[:, :, :, start : cache.length] = theirs[:, :, :, : cache.length - start]
        self.fill(cache.length)

    def fill(self, num_tokens: int) -> None:
        """Let the first slots be those that hold tokens, and clear the others."""
        # An answer that failed may have left NaN there, which no mask hides: 0 * NaN is NaN.
        self.keys[:, :, :, num_tokens:] = 0
        self.values[:, :, :, num_tokens:] = 0
        self.slot.fill_(num_tokens)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        key_bias: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Cache the keys and values of one position and attend to all slots that the mask shows; see `KVCache`."""
        self.keys[layer].index_copy_(2, self.slot, k.transpose(1, 2))
        self.values[layer].index_copy_(2, self.slot, v.transpose(1, 2))
        keys, values = self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2)
        return attention(q, keys, values, mask=mask, key_bias=key_bias, backend=backend)

    def advance(self, num_tokens: int) -> None:
        """Move on, on the device."""
        self.slot.add_(num_tokens)


class StaticStep:
    """One step for B rows and a bucket of S slots: inputs and outputs are always the same memory."""

    def __init__(self, language_model: Llama, *, batch_size: int, num_slots: int, biased: bool) -> None:
        """Allocate.

        Args:
            language_model: The decoder.
            batch_size: Rows B.
            num_slots: Slots S.
            biased: Whether keys have a bias.
        """
        weight: Tensor = language_model.embed_tokens.weight
        device = weight.device
        self.cache = StaticKVCache(
            language_model.config, batch_size=batch_size, max_length=num_slots, device=device, dtype=weight.dtype
        )
        if biased:
            self.cache.key_bias = torch.zeros(batch_size, num_slots, device=device)
        self.ids = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """Tokens to run; behind a step, the likeliest next ones."""
        self.chosen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """The same, with -1 where the logits are not finite."""
        self.position = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.valid = torch.ones(batch_size, num_slots, dtype=torch.bool, device=device)
        self.slots = torch.arange(num_slots, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self._forward: Callable[..., Tensor] = language_model.__call__
        self._embed = language_model.embed
        self._warming_up = language_model.products.warming_up
        if language_model.decoding is Decoding.compiled:
            self._forward = _compiled(language_model, batch_size)

    def run(self) -> Tensor:
        """Run the step that the buffers describe, and move them on; logits (B, V), which the next run overwrites."""
        if self.ids.device.type != "cuda":
            return self._run()
        if self.graph is None:
            self._record()
        assert self.graph is not None
        assert self.logits is not None
        self.graph.replay()
        return self.logits

    def _run(self) -> Tensor:
        mask = (self.valid & (self.slots <= self.cache.slot))[:, None]  # (B, 1, S)
        logits = self._forward(
            self._embed(self.ids[:, None]),
            position_ids=self.position,
            attention_mask=mask,
            cache=self.cache,
            logits_to_keep=1,
        )[:, -1]
        self.position.add_(1)
        torch.argmax(logits, dim=-1, out=self.ids)
        self.chosen.copy_(if_finite(self.ids, logits))
        return logits

    def _record(self) -> None:
        """Record the step; the buffers are as before."""
        with self._warming_up():
            self._record_once()
            torch.cuda.synchronize()

    def _record_once(self) -> None:
        before = [(buffer, buffer.clone()) for buffer in (self.ids, self.position, self.cache.slot)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate and compile in the first runs, which a graph cannot
            for _ in range(2):
                self._run()
                _restore(before)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: a server's, or one that reads the next clips.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = self._run()
        _restore(before)


class GraphDecoder:
    """Like `Decoder`, over static steps."""

    def __init__(self, model: AuroraModel, state: PromptState, num_steps: int) -> None:
        """Go on from prompts.

        Args:
            model: The captioner.
            state: The prompts; their cache is copied.
            num_steps: Steps at most.
        """
        self._language_model = model.language_model
        self._length = self._prompt_length = state.cache.length
        self._most_tokens = state.cache.length + num_steps
        self._valid = state.mask
        self._take(len(state.mask), biased=state.cache.key_bias is not None)
        self._static.cache.load(state.cache)
        self._fill(state.next_position, state.cache.key_bias)

    def __del__(self) -> None:
        """Hand the step on to the next answer."""
        if hasattr(self, "_static"):
            self._give_back()

    def step(self, ids: Tensor) -> Tensor:
        """Run one more token per row, (B,); logits of the next one, (B, V)."""
        return self._step(ids).clone()

    def step_greedily(self, ids: Tensor | None) -> Tensor:
        """Run one more token per row, (B,), None: those chosen last; the likeliest next ones, (B,), -1 for none."""
        self._step(ids)
        return self._static.chosen.clone()

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] has generated, (B,) int64; both behind the same prompt."""
        for tensor in (self._static.cache.keys, self._static.cache.values):
            own = tensor[:, :, :, self._prompt_length : self._length]
            own.copy_(own.index_select(1, rows))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, (B_new,) int64."""
        self._move(rows)

    def _step(self, ids: Tensor | None) -> Tensor:
        """Logits, until the next step."""
        if self._length == self._static.cache.max_length:
            self._move(torch.arange(len(self._valid), device=self._valid.device))
        if ids is not None:
            self._static.ids.copy_(ids)
        self._length += 1
        return self._static.run()

    def _move(self, rows: Tensor) -> None:
        """Go on with some rows in the step for so many, and in the bucket that fits."""
        old = self._static
        ids, position, bias = old.ids[rows], old.position[rows], old.cache.key_bias
        bias = None if bias is None else bias[rows]
        held = [tensor[:, rows, :, : self._length] for tensor in (old.cache.keys, old.cache.values)]
        self._valid = self._valid[rows]
        self._give_back()
        self._take(len(rows), biased=bias is not None)
        for tensor, values in zip((self._static.cache.keys, self._static.cache.values), held, strict=True):
            tensor[:, :, :, : self._length] = values
        self._static.cache.fill(self._length)
        self._static.ids.copy_(ids)
        self._fill(position, bias)

    def _fill(self, position: Tensor, bias: Tensor | None) -> None:
        static = self._static
        static.position.copy_(position)
        static.valid.fill_(True)
        static.valid[:, : self._valid.shape[1]] = self._valid
        if bias is not None and static.cache.key_bias is not None:
            shared = min(bias.shape[1], static.cache.max_length)
            static.cache.key_bias.zero_()
            static.cache.key_bias[:, :shared] = bias[:, :shared]

    def _take(self, batch_size: int, *, biased: bool) -> None:
        """Take a step for these sizes from those that answers before have recorded, or make one."""
        wanted = min(self._most_tokens, self._length + LOOK_AHEAD)
        num_slots = bucket_of(max(wanted, self._length + 1))
        self._key = (batch_size, num_slots, biased, self._language_model.decoding)
        step = self._language_model.products.steps.pop(self._key, None)
        if not isinstance(step, StaticStep):
            # Made for any mode: in inference mode they would be of use nowhere else.
            with torch.inference_mode(False), torch.no_grad():
                step = StaticStep(self._language_model, batch_size=batch_size, num_slots=num_slots, biased=biased)
        self._static = step

    def _give_back(self) -> None:
        steps = self._language_model.products.steps
        while len(steps) >= MOST_STEPS_KEPT:
            del steps[next(iter(steps))]  # the one that was not used for longest
        steps[self._key] = self._static


def _compiled(language_model: Llama, batch_size: int) -> Callable[..., Tensor]:
    """The language model compiled for one size of step."""
    # The tuning is what makes a product with one row a reduction, into which the conversion of int8 weights is fused;
    # else they are written out in the model's dtype before every product.
    compiled = torch.compile(
        language_model.__call__, fullgraph=True, dynamic=False,
        options={"coordinate_descent_tuning": True} if batch_size == 1 else {},
    )  # fmt: skip

    def forward(*args: object, **kwargs: object) -> Tensor:
        # Every number of rows and bucket is a graph of its own, of which 8 are allowed.
        dynamo = importlib.import_module("torch._dynamo")  # slow to import, and needed here alone
        with dynamo.config.patch(recompile_limit=_MOST_COMPILED, accumulated_recompile_limit=_MOST_COMPILED):
            out: Tensor = compiled(*args, **kwargs)
        return out

    return forward


def _restore(saved: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in saved:
        buffer.copy_(value)
