"""The flash-attn package (Dao, 2023), version 2: dense calls, and padded batches without their padding.

It takes no mask, so a padded batch goes in as one ragged row of the tokens that exist.

Shape letters: B rows, T queries, S keys, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Ragged(NamedTuple):
    version: int
    """Counter of in-place changes of the mask when it was read; always 0 in inference mode, which counts none."""
    queries: Tensor
    """Queries that exist, as indices into B * T, int64."""
    keys: Tensor
    """Keys that exist, as indices into B * S, int64."""
    query_ends: Tensor
    """Where each row's queries begin, and the end, (B + 1,) int32."""
    key_ends: Tensor
    """Where each row's keys begin, and the end, (B + 1,) int32."""
    max_queries: int
    max_keys: int


_ragged_masks = WeakTensorKeyDictionary()


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """Run flash-attn 2.

    Args:
        q: Queries, (B, T, H, D), float16 or bfloat16.
        k: Keys, (B, S, K, D).
        v: Values, (B, S, K, D).
        scale: Of the scores.
        causal: The T queries are the last T of the S keys and see no key after themselves.
        mask: The causal rule on a padded batch, (B, T, S) bool: True where a query may look. A query of the padding,
            which sees at most itself, gets zeros. Read from the device once for each mask, not in every layer.

    Returns:
        (B, T, H, D) in the dtype of q.

    Raises:
        ValueError: if the mask is anything but the causal rule and padding.
    """
    import flash_attn  # type: ignore[import-not-found]

    if mask is None:
        dense: Tensor = flash_attn.flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
        return dense
    ragged = _ragged(mask)
    packed = flash_attn.flash_attn_varlen_func(
        q.flatten(0, 1)[ragged.queries],
        k.flatten(0, 1)[ragged.keys],
        v.flatten(0, 1)[ragged.keys],
        cu_seqlens_q=ragged.query_ends,
        cu_seqlens_k=ragged.key_ends,
        max_seqlen_q=ragged.max_queries,
        max_seqlen_k=ragged.max_keys,
        softmax_scale=scale,
        causal=True,
    )
    out = packed.new_zeros(q.shape[0] * q.shape[1], *packed.shape[1:])
    return out.index_copy(0, ragged.queries, packed).unflatten(0, q.shape[:2])


def _ragged(mask: Tensor) -> _Ragged:
    found: _Ragged | None = _ragged_masks.get(mask)
    if found is None or found.version != _version(mask):
        found = _read_mask(mask)
        _ragged_masks[mask] = found
    return found


def _read_mask(mask: Tensor) -> _Ragged:
    num_queries, num_keys = mask.shape[1:]
    past = num_keys - num_queries
    # Whatever exists is seen by the last query; the last token itself may count as padding or not, nobody else sees it.
    exists = mask[:, -1]  # (B, S)
    queries_exist = exists[:, past:]  # (B, T)
    positions = torch.arange(num_keys, device=mask.device)
    wanted = (positions[None] <= positions[past:, None]) & exists[:, None]  # (B, T, S)
    if not bool(torch.where(queries_exist[:, :, None], mask == wanted, True).all()):
        raise ValueError(
            "attn_implementation=flash_attention_2: the mask is not the causal rule on padded rows; want sdpa or eager"
        )
    query_counts, key_counts = queries_exist.sum(1), exists.sum(1)
    return _Ragged(
        version=_version(mask),
        queries=queries_exist.flatten().nonzero()[:, 0],
        keys=exists.flatten().nonzero()[:, 0],
        query_ends=_ends(query_counts),
        key_ends=_ends(key_counts),
        max_queries=int(query_counts.max()),
        max_keys=int(key_counts.max()),
    )


def _version(mask: Tensor) -> int:
    return 0 if mask.is_inference() else mask._version


def _ends(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
