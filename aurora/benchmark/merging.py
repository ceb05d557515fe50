"""How much of the encoder's time its merging takes: every layer's merge at its real size, with nothing between.

A merge step also adds the attention's residual and makes the MLP's LayerNorm, which an encoder without merging needs
just as much. So both are timed: the steps with merging, and residual and LayerNorm alone; the difference is merging.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora.benchmark.harness import Row, compare
from aurora.kernels.merge import key_metric, match_tokens, merge_tokens_norm
from aurora.model.merge import MergePlan
from aurora.model.vision import VisionConfig

MERGING = "merge steps alone"
WITHOUT = "their residual and norm alone"
"""The two sides."""


def measure_merging(
    config: VisionConfig, plan: MergePlan, *, num_frames: int, device: torch.device, dtype: torch.dtype, repeats: int,
    threads: int,
) -> list[Row]:  # fmt: skip
    """Time all merge steps of a plan; on CUDA as one graph, as the encoder runs them.

    Args:
        config: Widths.
        plan: Tokens and merges per layer.
        num_frames: Batch.
        device: Where.
        dtype: Of tokens and keys.
        repeats: Rounds.
        threads: CPU threads.

    Returns:
        Rows of `compare`: MERGING and WITHOUT.
    """
    on_gpu = device.type == "cuda"
    weight, bias = torch.randn(2, config.hidden_size, device=device, dtype=dtype).unbind()
    layers = []
    for count, r in zip(plan.tokens[:-1], plan.r, strict=True):
        tokens = count + config.num_prefix_tokens
        x, attended = torch.randn(2, num_frames, tokens, config.hidden_size, device=device, dtype=dtype).unbind()
        keys = torch.randn(num_frames, tokens, config.num_heads, config.head_dim, device=device, dtype=dtype)
        layers.append((x, attended, keys, torch.ones(num_frames, tokens, 1, device=device), r))

    def merge_all() -> list[Tensor]:
        normed = []
        for x, attended, keys, size, r in layers:
            match = match_tokens(key_metric(keys), r, class_token=config.class_token)
            normed.append(merge_tokens_norm(x, attended, size, match, weight, bias, config.norm_eps)[1])
        return normed

    def add_and_norm(x: Tensor, attended: Tensor) -> Tensor:
        return F.layer_norm(x + attended, weight.shape, weight, bias, config.norm_eps)

    # Fused by Inductor on a GPU, as in a compiled encoder: otherwise merging would look cheaper than it is.
    norm = torch.compile(add_and_norm, fullgraph=True, dynamic=True) if on_gpu else add_and_norm
    sides: dict[str, Callable[[], object]] = {
        MERGING: merge_all,
        WITHOUT: lambda: [norm(x[:, r:], attended[:, r:]) for x, attended, _, _, r in layers],
    }
    if on_gpu:
        sides = {name: record(run, device) for name, run in sides.items()}
    return compare(sides, repeats=repeats, warmup=2, threads_per_side=(threads,), device=device)


def record(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Record a CUDA graph of a function without arguments, after three runs of it.

    Args:
        run: Launches the same work at each call.
        device: A CUDA device.

    Returns:
        A function that replays it; what it returns is overwritten by the next replay.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
