"""Bipartite soft matching and the weighted merge of matched tokens.

Token Merging (Bolya et al., 2023), sections 3 and appendix D. Tokens at even positions (set A) may merge into tokens
at odd positions (set B): each A token is scored against every B token by cosine similarity of its metric, keeps its
best partner, and the `r` best scored A tokens disappear into their partners.

Precision contract: metric, norm and scores are float32 whatever the input dtype; sums accumulate in float32; sizes
are float32. Tie rule: the partner is the lowest B index among equal scores; A tokens are ranked by score, equal
scores by lower A index. Order of the result: unmerged A tokens, then every B token. With a class token (position 0,
never merged) the unmerged A tokens stay in ascending order; without one they are ordered by descending score.

Shape letters: B rows, N tokens, C width, A = ceil(N / 2) tokens at even positions, R merged pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
def match_tokens(metric: Tensor, r: int, *, class_token: bool) -> Matching:
    """Pick the `r` most similar pairs between the even and the odd tokens.

    A token whose metric is zero has similarity 0 with everything, so no NaN arises.

    Args:
        metric: Similarity features, (B, N, C), any float dtype; computed with in float32.
        r: Pairs to merge; clamped to [0, `max_merges(N)`].
        class_token: Protect position 0.

    Returns:
        The matching; carries no gradient.

    Raises:
        ValueError: if `metric` does not have three dimensions.
    """
    if metric.ndim != 3:
        raise ValueError(f"metric: got shape {tuple(metric.shape)}, want (rows, tokens, width)")
    num_tokens = metric.shape[1]
    r = min(max(r, 0), max_merges(num_tokens, class_token=class_token))

    metric = metric.float()
    metric = metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    even, odd = metric[:, ::2], metric[:, 1::2]
    if odd.shape[1] == 0:  # one token: nothing to match against
        rank = torch.arange(even.shape[1], device=metric.device).expand(metric.shape[0], -1)
        nothing = rank[:, :0]
        return Matching(rank, nothing, nothing, metric.new_zeros(nothing.shape), num_tokens)
    scores = even @ odd.transpose(1, 2)  # (B, A, N - A)
    if class_token:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)  # torch.max returns the first of equal maxima
    rank = best.argsort(dim=-1, descending=True, stable=True)

    src_idx, unmerged_idx = rank[:, :r], rank[:, r:]
    if class_token:
        unmerged_idx = unmerged_idx.sort(dim=-1).values
    return Matching(unmerged_idx, src_idx, partner.gather(1, src_idx), best.gather(1, src_idx), num_tokens)


def merge_tokens(x: Tensor, size: Tensor, match: Matching) -> tuple[Tensor, Tensor]:
    """Average each merged pair, weighted by how many patches each token stands for.

    With R = 0 the tokens are returned as they are, in their order.

    Args:
        x: Token features, (B, N, C), any float dtype.
        size: Patches per token, (B, N, 1), float32.
        match: Pairs from `match_tokens` on the same N tokens.

    Returns:
        Features (B, N - R, C) in x.dtype and sizes (B, N - R, 1) in float32.

    Raises:
        ValueError: if match was built for another N.
    """
    if x.shape[1] != match.num_tokens:
        raise ValueError(
            f"merge_tokens: got {x.shape[1]} tokens, want the {match.num_tokens} the matching was built for"
        )
    if match.src_idx.shape[1] == 0:
        return x, size
    width = x.shape[-1]
    even, odd = x[:, ::2], x[:, 1::2]
    even_size, odd_size = size[:, ::2], size[:, 1::2]
    src, dst, unmerged = (i[..., None] for i in (match.src_idx, match.dst_idx, match.unmerged_idx))

    src_size = even_size.gather(1, src)  # (B, R, 1)
    merged_size = odd_size.scatter_add(1, dst, src_size)
    weighted = even.gather(1, src.expand(-1, -1, width)).float() * src_size
    total = (odd.float() * odd_size).scatter_add(1, dst.expand(-1, -1, width), weighted)
    merged = (total / merged_size).to(x.dtype)
    kept = even.gather(1, unmerged.expand(-1, -1, width))  # (B, A - R, C)
    return torch.cat([kept, merged], dim=1), torch.cat([even_size.gather(1, unmerged), merged_size], dim=1)


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
