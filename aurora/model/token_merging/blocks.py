"""The two halves of a transformer block in each library, between which tokens merge.

A block is recognised by the function that is its `forward`, not by its class, so that subclasses which only add
something (FSDP's, a user's) are served, and ones that compute something else are refused by name.

Shape letters: B rows, N tokens, C width, H heads, D head width.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from aurora.model.attention import attention


class KeyTap:
    """Takes the keys of one attention; it is a forward hook on the layer that makes them.

    It keeps what comes only while it is open, so that no keys, and no graph behind them, outlive their block.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.keys: Tensor | None = None

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        """Note the keys."""
        if self.is_open:
            self.keys = output

    def run(self, attention: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run an attention; returns its result and its keys as the layer made them.

        Raises:
            ValueError: if it made none.
        """
        self.is_open = True
        out = attention(*args, **kwargs)
        self.is_open = False
        keys, self.keys = self.keys, None
        if keys is None:
            raise ValueError("token merging: the attention made no keys; want a block whose attention runs as usual")
        return out, keys


class BlockParts(Protocol):
    """What the merge needs of a kind of block; stateless, so that models copy and pickle."""

    def key_layer(self, block: Any) -> nn.Module | None:
        """Return the layer whose output is the keys, or None where `attend` computes them itself."""

    def refusal(self, block: Any) -> str | None:
        """Say why this block cannot be served, or None."""

    def attend(
        self, block: Any, x: Tensor, key_bias: Tensor | None, tap: KeyTap, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return what attention adds to x, (B, N, C), and the keys, (B, N, H, D).

        Args:
            block: The block.
            x: Tokens, (B, N, C).
            key_bias: Added to each score of a key, (B, N) float32; None runs the block's own attention.
            tap: Where the hook on `key_layer` puts the keys.
            options: Keyword arguments the block was called with.
        """

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """Return what the MLP adds to x, (B, N, C)."""


class TimmParts:
    """`timm.models.vision_transformer.Block`; its keys are those after k_norm, which attention sees."""

    def key_layer(self, block: Any) -> nn.Module | None:
        """Tap k_norm, an identity without qk norm."""
        return block.attn.k_norm

    def refusal(self, block: Any) -> str | None:
        """Refuse attention that is not timm's plain one."""
        name = type(block.attn).__name__
        return None if forward_name(block.attn) in _TIMM_ATTENTION else f"attention of class {name}, want Attention"

    def attend(
        self, block: Any, x: Tensor, key_bias: Tensor | None, tap: KeyTap, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Run norm, attention, layer scale and drop path."""
        attn, x = block.attn, block.norm1(x)
        if key_bias is None:
            out, keys = tap.run(attn, x)
            keys = keys.transpose(1, 2)  # (B, N, H, D)
        else:
            _refuse_dropout("attn_drop", attn.attn_drop.p, attn.training)
            gate = getattr(attn, "gate", None)
            gates = None if gate is None else gate(x).sigmoid()
            q, keys, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # (B, N, H, D)
            q, keys = attn.q_norm(q), attn.k_norm(keys)
            backend = "auto" if attn.fused_attn else "eager"
            out = attention(q, keys, v, key_bias=key_bias, backend=backend).flatten(2)  # (B, N, C)
            out = attn.norm(out) if hasattr(attn, "norm") else out
            out = out if gates is None else out * gates
            out = attn.proj_drop(attn.proj(out))
        return block.drop_path1(block.ls1(out)), keys

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """Run norm, MLP, layer scale and drop path."""
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class HuggingFaceParts:
    """`CLIPEncoderLayer` and `SiglipEncoderLayer` of transformers; any of their attention implementations."""

    def key_layer(self, block: Any) -> nn.Module | None:
        """Tap the key projection, which quantisation may have replaced."""
        return block.self_attn.k_proj

    def refusal(self, block: Any) -> str | None:
        """Refuse layers that return tuples, those of transformers 4."""
        names = inspect.signature(type(block).forward).parameters
        return "a layer of transformers 4, want transformers >= 5" if "output_attentions" in names else None

    def attend(
        self, block: Any, x: Tensor, key_bias: Tensor | None, tap: KeyTap, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Run norm and attention."""
        attn, x = block.self_attn, block.layer_norm1(x)
        heads = (attn.num_heads, attn.head_dim)
        if key_bias is None:
            (out, _), keys = tap.run(attn, hidden_states=x, attention_mask=None, **options)
            return out, keys.unflatten(-1, heads)
        _refuse_dropout("attention_dropout", attn.dropout, attn.training)
        q, keys, v = (proj(x).unflatten(-1, heads) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        backend = "eager" if attn.config._attn_implementation == "eager" else "auto"
        return attn.out_proj(attention(q, keys, v, key_bias=key_bias, backend=backend).flatten(2)), keys

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """Run norm and MLP."""
        return block.mlp(block.layer_norm2(x))


class OpenClipParts:
    """`open_clip.transformer.ResidualAttentionBlock`, whose nn.MultiheadAttention hands out no keys."""

    def key_layer(self, block: Any) -> nn.Module | None:
        """There is none: q, k and v are one matrix inside nn.MultiheadAttention."""
        return None

    def refusal(self, block: Any) -> str | None:
        """Refuse attention of other layouts."""
        attn = block.attn
        plain = attn.batch_first and attn.in_proj_weight is not None and attn.bias_k is None
        return None if plain else "its attention is not batch-first with one projection for q, k and v"

    def attend(
        self, block: Any, x: Tensor, key_bias: Tensor | None, tap: KeyTap, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Run norm, attention and layer scale."""
        attn, x = block.attn, block.ln_1(x)
        _refuse_dropout("dropout", attn.dropout, attn.training)
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        q, keys, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # (B, N, H, D)
        out = attention(q, keys, v, key_bias=key_bias).flatten(2)
        return block.ls_1(attn.out_proj(out)), keys

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """Run norm, MLP and layer scale."""
        return block.ls_2(block.mlp(block.ln_2(x)))


_TIMM_ATTENTION = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
PARTS: dict[str, BlockParts] = {
    "timm.models.vision_transformer.Block": TimmParts(),
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer": HuggingFaceParts(),
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": HuggingFaceParts(),
    "open_clip.transformer.ResidualAttentionBlock": OpenClipParts(),
}
"""Block classes that are served, by the class that defines their forward."""


def forward_name(module: nn.Module) -> str:
    """Module and class that define the forward of `module`, whatever is laid over it on the instance."""
    forward = type(module).forward
    return f"{forward.__module__}.{forward.__qualname__}".removesuffix(".forward")


def parts_of(block: nn.Module, where: str) -> BlockParts:
    """Look up how to run a block.

    Args:
        block: A block of a tower.
        where: Its name, for messages.

    Raises:
        ValueError: for a class of block or of attention that cannot merge.
    """
    parts = PARTS.get(forward_name(block))
    if parts is None:
        known = ", ".join(name.rpartition(".")[2] for name in PARTS)
        raise ValueError(f"{where}: got a block of class {type(block).__name__}, want one of {known}")
    refusal = parts.refusal(block)
    if refusal is not None:
        raise ValueError(f"{where}: got {refusal}")
    return parts


def _refuse_dropout(name: str, probability: float, training: bool) -> None:
    if training and probability > 0:
        raise ValueError(f"{name}={probability}: want 0; here attention has no dropout beside token merging")
