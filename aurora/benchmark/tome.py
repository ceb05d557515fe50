"""The anchor: token merging as the paper's formulas are usually written, which our kernels must beat.

Token Merging (Bolya et al., 2023), section 3, put into tensors step by step: cosine scores of all pairs in one
matrix, a sort of every row maximum, x * size and size each merged by gather, scatter and concatenation, a division,
and the log of the sizes added to the attention scores of the keys. Written from the paper. Scores are made in the
dtype of the keys; in float32 the result equals ours wherever no two scores are equal.

Shape letters: B frames, N tokens, C width, H heads, D head width, A = ceil(N / 2), R merged pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from aurora.model.merge import MergePlan
from aurora.model.vision import VisionBlock, VisionTower


class TomePairs(NamedTuple):
    """Which tokens merge, each an index column within its own set, (B, count, 1) int64."""

    unmerged: Tensor
    source: Tensor
    destination: Tensor


def tome_match(metric: Tensor, r: int, *, class_token: bool) -> TomePairs:
    """Pair the `r` most similar tokens of the two sets.

    Args:
        metric: Similarity features, (B, N, D).
        r: Pairs to merge.
        class_token: Protect position 0.

    Returns:
        The pairs.
    """
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, 0::2] @ unit[:, 1::2].mT  # (B, A, N - A)
    if class_token:
        scores[:, 0, :] = -torch.inf
    best_score, best_partner = scores.max(dim=2)
    ranking = torch.argsort(best_score, dim=1, descending=True).unsqueeze(2)  # (B, A, 1)
    source, unmerged = ranking[:, :r], ranking[:, r:]
    destination = torch.gather(best_partner.unsqueeze(2), 1, source)
    if class_token:
        unmerged = torch.sort(unmerged, dim=1).values
    return TomePairs(unmerged, source, destination)


def tome_sum(x: Tensor, pairs: TomePairs) -> Tensor:
    """Add merged sources onto their destinations: (B, N, C) to (B, N - R, C), unmerged sources first."""
    even, odd = x[:, 0::2], x[:, 1::2]
    width = x.shape[2]
    unmerged = torch.gather(even, 1, pairs.unmerged.expand(-1, -1, width))
    moved = torch.gather(even, 1, pairs.source.expand(-1, -1, width))
    summed = odd.scatter_reduce(1, pairs.destination.expand(-1, -1, width), moved, reduce="sum")
    return torch.cat([unmerged, summed], dim=1)


def tome_merge(x: Tensor, size: Tensor, pairs: TomePairs) -> tuple[Tensor, Tensor]:
    """Average merged tokens by size.

    Args:
        x: Tokens, (B, N, C).
        size: Patches per token, (B, N, 1).
        pairs: From `tome_match`.

    Returns:
        Tokens (B, N - R, C) in x.dtype and sizes (B, N - R, 1).
    """
    weight = size.to(x.dtype)
    total, size = tome_sum(x * weight, pairs), tome_sum(size, pairs)
    return total / size.to(x.dtype), size


def tome_step(keys: Tensor, x: Tensor, size: Tensor, r: int, *, class_token: bool) -> tuple[Tensor, Tensor]:
    """Match on the head mean of the keys (B, N, H, D) and merge: one layer's whole merging."""
    return tome_merge(x, size, tome_match(keys.mean(dim=2), r, class_token=class_token))


def tome_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """Proportional attention with its score matrix: softmax(q k^T / sqrt(D) + log size) v.

    Args:
        q: Queries, (B, N, H, D).
        k: Keys, alike.
        v: Values, alike.
        size: Patches per token, (B, N, 1).

    Returns:
        (B, N, H, D).
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, N, D)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    scores = scores + size.log()[:, None, None, :, 0].to(scores.dtype)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def tome_tower(tower: VisionTower, pixel_values: Tensor, plan: MergePlan) -> Tensor:
    """Run our tower's weights with this merging and its proportional attention.

    Args:
        tower: Supplies weights and layers.
        pixel_values: Frames, (B, 3, height, width).
        plan: Merges per layer.

    Returns:
        Tokens after the last layer of the plan, (B, N, C).
    """
    x, _ = tower.embed(pixel_values)
    size = torch.ones(*x.shape[:2], 1, dtype=x.dtype, device=x.device)
    for block, r in zip(tower.blocks[: len(plan.r)], plan.r, strict=True):
        assert isinstance(block, VisionBlock)
        q, k, v = block.attn.project(block.norm1(x))
        x = x + block.attn.out_proj(tome_attention(q, k, v, size).flatten(2))
        if r > 0:
            x, size = tome_step(k, x, size, r, class_token=block.class_token)
        x = x + block.mlp(block.norm2(x))
    return x
