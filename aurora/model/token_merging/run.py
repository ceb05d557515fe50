"""What happens inside a foreign tower: sizes and sources that travel beside its tokens, and the block that merges.

A tower passes nothing but tokens from block to block, so the sizes go through a `MergeRun` that its blocks share. The
run begins where the pixels enter the tower and is filled in block by block.

Shape letters: B rows, N tokens, C width, P tokens before the patches.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aurora.kernels.merge import key_metric, match_tokens, merge_tokens
from aurora.model.merge import SizeBias, merge_source
from aurora.model.token_merging.blocks import KeyTap
from aurora.model.vision import VisionTrace

if TYPE_CHECKING:
    from aurora.model.token_merging.merging import TokenMerging


class MergeRun:
    """State of the forward pass under way, or of the last one."""

    def __init__(self) -> None:
        self.grid = (0, 0)
        """Rows and columns of patches."""
        self.r: tuple[int, ...] = ()
        """Tokens to merge in each block."""
        self.size: Tensor | None = None
        """Patches per token, (B, N, 1) float32; None until the first merge."""
        self.source: Tensor | None = None
        """Token that holds each input token, (B, P + patches) int64."""
        self.sizes: list[Tensor] = []
        """Sizes after each block that may merge."""
        self.sources: list[Tensor] = []
        """Sources after each block that may merge."""
        self.similarities: list[Tensor] = []
        """Cosine similarities of what each block merged, (B, r) float32."""
        self.traced = False
        """Whether sizes, sources and similarities are kept."""
        self.tap = KeyTap()

    def begin(self, x: Tensor, num_tokens: int) -> None:
        """Start with the tokens that enter the first block.

        Raises:
            ValueError: if they are not the `num_tokens` that the image gives.
        """
        if not self.r or x.shape[1] != num_tokens:
            raise ValueError(
                f"token merging: the first block got {x.shape[1]} tokens, want {num_tokens} of an image of "
                f"{self.grid[0]}x{self.grid[1]} patches; it needs the whole tower to run, without patch dropout"
            )
        self.size = None
        self.sizes, self.sources, self.similarities = [], [], []
        self.source = torch.arange(num_tokens, device=x.device).expand(x.shape[0], -1) if self.traced else None

    def trace(self, num_prefix_tokens: int) -> VisionTrace:
        """Collect what was kept."""
        return VisionTrace(self.grid, num_prefix_tokens, list(self.sizes), list(self.sources), list(self.similarities))


def note_pixels(merging: TokenMerging, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Plan the merges of the image that enters the tower; a forward pre-hook of the patch embedding."""
    height, width = args[0].shape[-2:]
    if torch.compiler.is_compiling():
        # A plan is constant in a graph: a walk over a range binds a size that the compiler holds variable, and the
        # text of the wish is what it compares to see whether the plan, which it does not look into, still stands.
        height, width = len(list(range(height))), len(list(range(width)))
        if not merging.wish:
            raise AssertionError
    run = merging.run
    rows, columns, *r = (int(number) for number in merging.written_plan(height, width).split())
    run.grid, run.r, run.traced = (rows, columns), tuple(r), merging.tracing


def merged_forward(block: Any, merging: TokenMerging, layer: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a block with its merge between attention and MLP; stands in for the block's own forward.

    Args:
        block: The block.
        merging: Whose plan it follows.
        layer: Its place.
        x: Tokens, (B, N, C).
        args: Further arguments of the block, none of them a mask.
        kwargs: As args.

    Returns:
        Tokens, (B, N - r, C).

    Raises:
        ValueError: if a mask is given, or the tower recomputes blocks by itself.
    """
    run, num_prefix = merging.run, merging.tower.num_prefix_tokens
    if layer == 0:
        _refuse_recomputing(merging)
        run.begin(x, num_prefix + run.grid[0] * run.grid[1])
    r, size = run.r[layer], run.size
    biased = size is not None and merging.config.size_bias is SizeBias.keys
    recompute = _recomputing(block, merging)
    similarity = None
    if r == 0 and not biased:
        own = partial(type(block).forward, block)
        # transformers checkpoints inside its own forward.
        x = recompute(own, x) if merging.activation_checkpointing and recompute else own(x, *args, **kwargs)
    else:
        if kwargs.get("is_causal") or any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise ValueError("token merging: got an attention mask or causal attention, want neither")
        if size is None:
            size = torch.ones(x.shape[0], x.shape[1], 1, dtype=torch.float32, device=x.device)
        body = partial(_attend_merge_feed, block, merging, r, biased, kwargs)
        source = run.source
        x, size, source, similarity = recompute(body, x, size, source) if recompute else body(x, size, source)
        # Re-entrant checkpointing marks every float it returns as one with a gradient.
        run.size, run.source = size.detach(), source
    if run.traced and layer < merging.num_active_layers:
        _record(run, x, similarity)
    return x


def _attend_merge_feed(
    block: Any,
    merging: TokenMerging,
    r: int,
    biased: bool,
    options: dict[str, Any],
    x: Tensor,
    size: Tensor,
    source: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run a block; sizes go in and out, so that recomputing it gives the same again."""
    parts, num_prefix = merging.tower.parts, merging.tower.num_prefix_tokens
    key_bias = size[..., 0].log() if biased else None  # (B, N)
    attended, keys = parts.attend(block, x, key_bias, merging.run.tap, options)
    x, similarity = x + attended, None
    if r > 0:
        # The matching protects one token. Of several, the others stand aside, and the last is first of the rest.
        aside = max(0, num_prefix - 1)
        match = match_tokens(key_metric(keys)[:, aside:], r, class_token=num_prefix > 0)
        merged, merged_size = merge_tokens(x[:, aside:], size[:, aside:], match)
        if aside:
            merged, merged_size = torch.cat([x[:, :aside], merged], 1), torch.cat([size[:, :aside], merged_size], 1)
        if source is not None:
            rest = merge_source(source[:, aside:] - aside, match) + aside
            source, similarity = torch.cat([source[:, :aside], rest], 1), match.scores
        x, size = merged, merged_size  # (B, N - r, C)
    return x + parts.feed(block, x), size, source, similarity


def _record(run: MergeRun, x: Tensor, similarity: Tensor | None) -> None:
    rows, num_tokens = x.shape[:2]
    size = run.size
    assert run.source is not None
    ones = torch.ones(rows, num_tokens, 1, dtype=torch.float32, device=x.device)
    run.sizes.append(ones if size is None else size)
    run.sources.append(run.source)
    run.similarities.append(ones.new_zeros(rows, 0) if similarity is None else similarity)


def _recomputing(block: Any, merging: TokenMerging) -> Any:
    """The function that checkpoints this block's activations, or None."""
    if not (block.training and torch.is_grad_enabled()):
        return None
    if merging.activation_checkpointing:
        return partial(checkpoint, use_reentrant=False)
    if getattr(block, "gradient_checkpointing", False):
        return block._gradient_checkpointing_func
    return None


def _refuse_recomputing(merging: TokenMerging) -> None:
    module = merging.tower.module
    if getattr(merging.tower.checkpointing, "grad_checkpointing", False) and module.training:
        raise ValueError(
            f"grad_checkpointing=True on {type(module).__name__}: a block that the tower recomputes has lost its token "
            "sizes; want set_grad_checkpointing(False), and activation_checkpointing = True on the merging instead"
        )


def unmerged_intermediates(tower: Any, merging: TokenMerging, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stand in for `forward_intermediates` of timm and open_clip: give every patch of a map its token's features.

    Merged tokens fill no map, and the reshape of the original would mix them up where their number divides. In the
    format NLC tokens stay merged.

    Args:
        tower: The tower.
        merging: Its merging.
        x: Images, (B, 3, height, width).
        args: As the original.
        kwargs: As the original.

    Returns:
        As the original.
    """
    original = type(tower).forward_intermediates
    kwargs |= dict(zip(merging.intermediates_arguments, args, strict=False))
    if kwargs.get("output_fmt", "NCHW") != "NCHW":
        return original(tower, x, **kwargs)
    run, before = merging.run, merging.tracing
    merging.tracing = True
    try:
        result = original(tower, x, **{**kwargs, "output_fmt": "NLC"})
        if isinstance(result, dict):
            return {**result, "image_intermediates": [_as_map(merging, y) for y in result["image_intermediates"]]}
        if isinstance(result, list):
            return [_as_map(merging, y) for y in result]
        final, intermediates = result
        return final, [_as_map(merging, y) for y in intermediates]
    finally:
        merging.tracing = before
        if not before:
            run.source, run.sizes, run.sources, run.similarities = None, [], [], []


def _as_map(merging: TokenMerging, y: Any) -> Any:
    if isinstance(y, tuple):  # with the prefix tokens
        return (_as_map(merging, y[0]), *y[1:])
    run, num_prefix = merging.run, merging.tower.num_prefix_tokens
    rows, columns = run.grid
    # As many tokens mean the same tokens: a layer without a merge changes neither.
    source = next(
        (s for s, size in zip(run.sources, run.sizes, strict=True) if size.shape[1] - num_prefix == y.shape[1]), None
    )
    if source is not None:
        index = source[:, num_prefix:] - num_prefix  # (B, patches)
        y = y.gather(1, index[..., None].expand(-1, -1, y.shape[-1]))
    return y.reshape(y.shape[0], rows, columns, -1).permute(0, 3, 1, 2).contiguous()  # (B, C, rows, columns)
