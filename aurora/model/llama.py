"""Llama decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Touvron et al., 2023; grouped-query attention from Ainslie et al., 2023. Weight names are Hugging Face's below `model.`.

Shape letters: B rows, T positions, S keys, C width, H heads, K key heads, D head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aurora.kernels.linear import linear as multiply_linear
from aurora.model.attention import attention, causal_mask
from aurora.model.linear import Linear
from aurora.model.products import Decoding, InferenceProducts, LayerProducts

if TYPE_CHECKING:
    from aurora.model.cache import KVCache


@dataclass(kw_only=True, slots=True)
class RopeScaling:
    """Stretching of rotary positions to a longer context."""

    rope_type: str = "linear"
    """linear: positions divided by factor (Vicuna 16k). llama3: low frequencies divided, high ones kept (Llama 3.1)."""
    factor: float = 1.0
    """How much longer the context became."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_seq_len / this are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_seq_len / this are kept."""
    original_max_seq_len: int = 8192
    """llama3: context in tokens before stretching."""

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise ValueError(f"text.rope_scaling.rope_type={self.rope_type!r}: want linear or llama3")
        if self.factor <= 0:
            raise ValueError(f"text.rope_scaling.factor={self.factor}: want a positive number")


@dataclass(kw_only=True, slots=True)
class LlamaConfig:
    """Sizes of the language model; the defaults are Llama-7B's."""

    vocab_size: int = 32000
    """Token ids V."""
    hidden_size: int = 4096
    """Width C."""
    intermediate_size: int = 11008
    """Width of the MLP."""
    num_layers: int = 32
    """Decoder layers."""
    num_heads: int = 32
    """Query heads H; divides hidden_size."""
    num_kv_heads: int = 32
    """Key and value heads K; divides num_heads."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary positions, or none."""
    max_seq_len: int = 4096
    """Context in tokens, stretching included."""
    tie_word_embeddings: bool = False
    """Use the input embeddings as the output head."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"text.num_heads={self.num_heads}: want a divisor of text.hidden_size={self.hidden_size}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"text.num_kv_heads={self.num_kv_heads}: want a divisor of text.num_heads={self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


def rotary_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair of channels, (D / 2,) float32, scaling included."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return stretched
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # full turns within the original context
    blend = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return torch.lerp(stretched, frequencies, blend)


def rotary_table(config: LlamaConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, (B, T, 1, D) float32 each; of the sine the first half is negative."""
    angles = (position_ids[..., None].float() * rotary_frequencies(config, position_ids.device))[:, :, None]
    cos, sin = angles.cos(), angles.sin()  # (B, T, 1, D / 2)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i of the first half with channel i of the second, in float32; (B, T, heads, D)."""
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, scaled by a weight (Zhang and Sennrich, 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of (..., C)."""
        # The result is rounded before it is scaled, as in the released code; rms_norm's own weight comes before.
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # What rms_norm does on a CPU, in half the operations: a token's layers start a hundred of these.
            if x.numel() == x.shape[-1]:  # one token: its mean square is a number, and half of these are left
                wide = x.float().view(-1)
                return self.weight * (x * (wide.dot(wide).item() / len(wide) + self.eps) ** -0.5)
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            scale = (norm.square_().div_(x.shape[-1])).add_(self.eps).rsqrt_()
            return self.weight * (x * scale).to(x.dtype)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


class Pass(NamedTuple):
    """What all layers share in one forward pass."""

    rotary: tuple[Tensor, Tensor]
    """From `rotary_table`."""
    mask: Tensor | None
    """True where a query may look, (B, T, S) bool; None: the causal rule."""
    key_bias: Tensor | None
    """Added to the scores of each key, (B, S) float32."""
    backend: str
    """Of attention."""
    cache: KVCache | None
    """Keys and values of earlier positions; new ones are added."""


class LlamaAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, run: Pass, layer: int, products: LayerProducts | None) -> Tensor:
        """Attend from (B, T, C) to cached tokens and these."""
        split = (-1, self.head_dim)
        if products is not None:
            heads = products.qkv(x).unflatten(-1, split)  # (B, T, H + 2 K, D)
            rotated = self.num_heads + self.num_kv_heads
            qk = apply_rotary(heads[:, :, :rotated], *run.rotary)
            q, k, v = qk[:, :, : self.num_heads], qk[:, :, self.num_heads :], heads[:, :, rotated:]
        else:
            q, k, v = (proj(x).unflatten(-1, split) for proj in (self.q_proj, self.k_proj, self.v_proj))
            q, k = apply_rotary(q, *run.rotary), apply_rotary(k, *run.rotary)
        if run.cache is not None:
            out = run.cache.attend(layer, q, k, v, mask=run.mask, key_bias=run.key_bias, backend=run.backend)
        else:
            causal = run.mask is None
            out = attention(q, k, v, causal=causal, mask=run.mask, key_bias=run.key_bias, backend=run.backend)
        out = out.flatten(2)  # (B, T, C)
        return self.o_proj(out) if products is None else products.o(out)


class LlamaMLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, products: LayerProducts | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        if products is None:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        gate, up = products.gate_up(x).chunk(2, dim=-1)
        return products.down(F.silu(gate).mul_(up))


class LlamaLayer(nn.Module):
    """Attention and MLP, pre-norm with residuals."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, run: Pass, layer: int, products: LayerProducts | None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), run, layer, products)
        return x + self.mlp(self.post_attention_layernorm(x), products)

    def linears(self) -> tuple[tuple[nn.Module, ...], ...]:
        """Linears that have one input, in the order of `LayerProducts`."""
        attn, mlp = self.self_attn, self.mlp
        return (attn.q_proj, attn.k_proj, attn.v_proj), (attn.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


class Llama(nn.Module):
    """Token embeddings, decoder layers, final norm and output head."""

    def __init__(self, config: LlamaConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend: str = backend
        self.activation_checkpointing = False
        self.decoding = Decoding.recorded
        self.products = InferenceProducts()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed token ids (B, T) as (B, T, C)."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        inputs_embeds: Tensor,
        *,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        key_bias: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Predict the next token at each position.

        Args:
            inputs_embeds: Embedded tokens, (B, T, C).
            position_ids: Rotary position of each, (B, T) int64.
            attention_mask: True for keys that exist, (B, S) bool, combined with the causal rule; or True where a
                query may look, (B, T, S) bool, used as it stands. S counts the cached tokens too. None: all exist,
                causal.
            key_bias: Added to every score of a key, (B, S) float32. None: `cache.key_bias`, if there is one.
            cache: Read and extended in place.
            logits_to_keep: Only the last so many positions get logits; 0 is all.

        Returns:
            Logits, (B, T or logits_to_keep, V), in the dtype of the model.

        Raises:
            ValueError: if the mask or the bias does not cover the keys.
        """
        products = self._products(cache, inputs_embeds.shape[1])
        x = self._layers(inputs_embeds, position_ids, attention_mask, key_bias, cache, products)
        x = self.norm(x[:, -logits_to_keep:])
        if products is not None and products.head is not None:
            return products.head(x)
        return multiply_linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    def hidden(
        self,
        inputs_embeds: Tensor,
        *,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """Return what the output head reads, (B, T, C): for a loss that never holds all logits; see `forward`."""
        x: Tensor = self.norm(self._layers(inputs_embeds, position_ids, attention_mask, key_bias, None, None))
        return x

    @property
    def head_weight(self) -> Tensor:
        """Of the output head, (V, C)."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def _layers(
        self,
        x: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        key_bias: Tensor | None,
        cache: KVCache | None,
        products: InferenceProducts | None,
    ) -> Tensor:
        """Run the decoder layers over (B, T, C)."""
        num_queries = x.shape[1]
        num_keys = num_queries + (cache.length if cache is not None else 0)
        mask = _full_mask(attention_mask, num_queries, num_keys)
        if key_bias is None and cache is not None and cache.key_bias is not None:
            key_bias = cache.key_bias[:, :num_keys]
        if key_bias is not None and key_bias.shape[-1] != num_keys:
            raise ValueError(f"key_bias: covers {key_bias.shape[-1]} keys, want {num_keys} (cached ones included)")
        run = Pass(rotary_table(self.config, position_ids), mask, key_bias, self.backend, cache)
        for index, layer in enumerate(self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, run, index, None, use_reentrant=False)
            else:
                x = layer(x, run, index, products.layers[index] if products else None)  # (B, T, C)
        if cache is not None:
            cache.advance(num_queries)
        return x

    def train(self, mode: bool = True) -> Llama:
        """Switch between training and evaluation; training needs no products for inference."""
        if mode:
            self.products.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Llama:
        self.products.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _products(self, cache: KVCache | None, num_queries: int) -> InferenceProducts | None:
        """Fused products where tokens are generated; else None, and every linear runs by itself."""
        if cache is None or self.training or torch.is_grad_enabled():
            return None
        # Weights may have changed since the last prompt, but not between two tokens of an answer.
        if num_queries > 1 or not self.products.ready:
            head = self.embed_tokens if self.lm_head is None else self.lm_head
            layers = [layer.linears() for layer in self.layers if isinstance(layer, LlamaLayer)]
            self.products.refresh(layers, head)
        return self.products


def _full_mask(attention_mask: Tensor | None, num_queries: int, num_keys: int) -> Tensor | None:
    """Fold key validity into the causal rule: (B, T, S) bool, or None where the causal rule is all there is."""
    if attention_mask is None:
        return None
    if attention_mask.shape[-1] != num_keys:
        raise ValueError(
            f"attention_mask: covers {attention_mask.shape[-1]} keys, want {num_keys} (cached ones included)"
        )
    attention_mask = attention_mask.bool()
    if attention_mask.ndim == 3:
        return attention_mask
    causal = causal_mask(num_queries, num_keys, device=attention_mask.device)
    # A padding query sees itself, so that no row of the softmax is empty.
    itself = torch.eye(num_keys, dtype=torch.bool, device=causal.device)[num_keys - num_queries :]
    return (causal & attention_mask[:, None]) | itself
