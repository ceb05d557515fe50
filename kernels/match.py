"""Bipartite soft matching: which tokens merge, found without sorting and without a score matrix on a GPU.

Rules, order and precision are those of `aurora.kernels.merge`, which also says what the shape letters mean.

The Triton path runs two kernels. One scores tiles of A tokens against tiles of B tokens and keeps the running maximum
of each A token, as attention would, so that scores never reach memory. The other ranks A tokens by counting those that
beat them, which is a stable descending order without a sort. Both are in `match_triton`. The matching carries no
gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora.kernels.common import dtype_reason, on_device
from aurora.kernels.dispatch import choose
from aurora.kernels.linear import scores as token_scores

MAX_METRIC_WIDTH = 256
"""Widest metric a kernel takes: a tile of tokens has to fit into registers."""
MAX_KERNEL_TOKENS = 8192
"""Most tokens the select kernel takes: one program ranks all A tokens of a row."""


class Matching(NamedTuple):
    """Which tokens merge; every index counts within its own set (A: even positions, B: odd positions)."""

    unmerged_idx: Tensor
    """A tokens that stay, in output order, (B, A - R) int64."""
    src_idx: Tensor
    """A tokens that merge, best scored first, (B, R) int64."""
    dst_idx: Tensor
    """B token that each of them merges into, (B, R) int64."""
    scores: Tensor
    """Cosine similarity of each merged pair, (B, R) float32."""
    num_tokens: int
    """N, the token count the matching was built for."""


def max_merges(num_tokens: int, *, class_token: bool) -> int:
    """Largest `r` that one merge of `num_tokens` tokens can remove: half of the tokens that are not protected."""
    return max(0, (num_tokens - 1) // 2 if class_token else num_tokens // 2)


@torch.no_grad()
def key_metric(keys: Tensor) -> Tensor:
    """Average attention keys over their heads: what Token Merging compares tokens by.

    Args:
        keys: (B, N, H, D), any float dtype.

    Returns:
        (B, N, D) float32, without gradient.

    Raises:
        ValueError: if `keys` does not have four dimensions.
    """
    if keys.ndim != 4:
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, want (rows, tokens, heads, head width)")
    if keys.device.type != "cpu" or torch.compiler.is_compiling() or keys.numel() == 0:
        return keys.mean(dim=2, dtype=torch.float32)  # one kernel on a GPU, without a float32 copy
    if keys.dtype == torch.float32:
        return _head_mean(keys)
    # Row by row the float32 copy stays in the cache, where PyTorch's own mixed reduction is twice as slow.
    return torch.cat([_head_mean(row.float()) for row in keys.split(1)])


def _head_mean(keys: Tensor) -> Tensor:
    """Mean over heads on a CPU: as bags of rows, which are fetched ahead, it takes 0.6 of the time of `mean`."""
    rows, num_tokens, heads, width = keys.shape
    bags = torch.arange(rows * num_tokens * heads).view(-1, heads)
    return F.embedding_bag(bags, keys.reshape(-1, width), mode="sum").div_(heads).view(rows, num_tokens, width)


@torch.no_grad()
def match_tokens(metric: Tensor, r: int, *, class_token: bool, backend: str | None = None) -> Matching:
    """Pick the `r` most similar pairs between the even and the odd tokens.

    A token whose metric is zero has similarity 0 with everything, so no NaN arises.

    Args:
        metric: Similarity features, (B, N, C), any float dtype; computed with in float32.
        r: Pairs to merge; clamped to [0, `max_merges(N)`].
        class_token: Protect position 0.
        backend: auto | torch | triton; None takes what `aurora.kernels.use` or AURORA_KERNELS say.

    Returns:
        The matching; carries no gradient.

    Raises:
        ValueError: if `metric` does not have three dimensions.
        KernelUnavailable: if Triton was asked for and cannot run.
    """
    if metric.ndim != 3:
        raise ValueError(f"metric: got shape {tuple(metric.shape)}, want (rows, tokens, width)")
    num_tokens = metric.shape[1]
    r = min(max(r, 0), max_merges(num_tokens, class_token=class_token))
    if choose("match_tokens", device=metric.device, reason_against=_match_reason(metric), backend=backend) == "triton":
        unmerged, src, dst, scores = _match_op(metric, r, class_token)
        return Matching(unmerged, src, dst, scores, num_tokens)
    return match_reference(metric, r, class_token=class_token)


def match_reference(metric: Tensor, r: int, *, class_token: bool) -> Matching:
    """Define `match_tokens` in PyTorch, for an `r` that is within its bounds already.

    Only the merged rows look for their partner, and the maximum alone is several times faster than one with indices.
    """
    num_tokens = metric.shape[1]
    metric = metric.float()
    norm = metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    even, odd = metric[:, ::2] / norm[:, ::2], metric[:, 1::2] / norm[:, 1::2]
    if num_tokens < 2:  # nothing to match against
        rank = torch.arange(even.shape[1], device=metric.device).expand(metric.shape[0], -1)
        nothing = rank[:, :0]
        return Matching(rank, nothing, nothing, metric.new_zeros(nothing.shape), num_tokens)
    with torch.autocast(metric.device.type, enabled=False):  # would round the scores to bfloat16
        scores = token_scores(even, odd)  # (B, A, N - A)
    best = scores.amax(dim=-1)  # (B, A)
    if class_token:
        best[:, 0] = -torch.inf
    rank = best.sort(dim=-1, descending=True, stable=True).indices

    src_idx, unmerged_idx = rank[:, :r], rank[:, r:]
    if class_token:
        unmerged_idx = unmerged_idx.sort(dim=-1).values
    first_row = even.shape[1] * torch.arange(even.shape[0], device=metric.device)[:, None]
    # By whole rows, which costs a fifth of the same by `gather` on a CPU.
    src_scores = scores.flatten(0, 1).index_select(0, (src_idx + first_row).flatten())  # (B * R, N - A)
    merged, partner = src_scores.max(dim=-1)  # torch.max returns the first of equal maxima
    return Matching(unmerged_idx, src_idx, partner.view_as(src_idx), merged.view_as(src_idx), num_tokens)


def merged_positions(match: Matching) -> Tensor:
    """Output position of each input token, (B, N) int64: what source tracking and unmerging gather with."""
    rows, r = match.src_idx.shape
    device = match.src_idx.device
    if r == 0:
        return torch.arange(match.num_tokens, device=device).expand(rows, -1)
    num_kept = match.unmerged_idx.shape[1]
    positions = torch.empty(rows, match.num_tokens, dtype=torch.int64, device=device)
    positions[:, 1::2] = torch.arange(num_kept, match.num_tokens - r, device=device)
    positions.scatter_(1, 2 * match.unmerged_idx, torch.arange(num_kept, device=device).expand(rows, -1))
    return positions.scatter_(1, 2 * match.src_idx, num_kept + match.dst_idx)


def _match_reason(metric: Tensor) -> str | None:
    if metric.shape[2] > MAX_METRIC_WIDTH:
        return f"a metric wider than {MAX_METRIC_WIDTH} does not fit the kernel"
    if metric.shape[1] > MAX_KERNEL_TOKENS:
        return f"more than {MAX_KERNEL_TOKENS} tokens do not fit the kernel"
    return dtype_reason({"metric": metric})


@torch.library.custom_op("aurora::match_tokens", mutates_args=())
def _match_op(metric: Tensor, r: int, class_token: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from aurora.kernels.match_triton import launch_match

    with on_device(metric):
        return launch_match(metric, r, class_token=class_token)


@_match_op.register_fake
def _match_shapes(metric: Tensor, r: int, class_token: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, num_tokens = metric.shape[:2]
    indices = metric.new_empty((rows, (num_tokens + 1) // 2 - r), dtype=torch.int64)
    pairs = [metric.new_empty((rows, r), dtype=torch.int64) for _ in range(2)]
    return indices, pairs[0], pairs[1], metric.new_empty((rows, r), dtype=torch.float32)
