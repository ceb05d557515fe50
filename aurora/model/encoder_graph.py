"""CUDA graphs of the whole vision tower: one recorded launch instead of some hundred small ones.

A graph holds fixed shapes, so there is one for each (frames, frame size, merges per layer, ...); the few that a program
uses are kept, the least recently used one goes. Replaying wins most at small batches, where the host cannot queue
kernels as fast as the device runs them.

Shape letters: B frames, N tokens, C width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aurora.kernels import dispatch as kernels
from aurora.model.merge import MergePlan, SizeBias
from aurora.model.vision import VisionOutput, VisionTower

Replay = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Frames (B, 3, height, width) to tokens (B, N, C) and sizes (B, N, 1), the caller's to keep."""

_NUM_WARMUP_RUNS = 3
"""Runs before a capture: libraries choose algorithms, Triton tunes and torch.compile compiles in these."""


class GraphKey(NamedTuple):
    """Everything a recorded graph depends on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    r: tuple[int, ...]
    feature_layer: int
    size_bias: SizeBias
    backend: str
    kernels: str
    """Of merging, as `aurora.kernels` has it set: auto, torch or triton."""
    autocast: torch.dtype | None
    weights: tuple[int, ...]
    """Addresses of the parameters: moved or replaced weights need a new graph, changed values do not."""


class EncoderGraphs:
    """Runs a tower through CUDA graphs, recorded at first use.

    For inference alone: no gradients, no traces. Results equal those of the tower, and are copies that the next call
    does not overwrite.
    """

    def __init__(self, tower: VisionTower, *, max_graphs: int = 8) -> None:
        """Prepare to record.

        Args:
            tower: On a CUDA device, in eval mode.
            max_graphs: Graphs to keep; each holds the activations of one run.

        Raises:
            ValueError: if max_graphs is not positive.
        """
        if max_graphs < 1:
            raise ValueError(f"max_graphs={max_graphs}: want at least 1")
        self.tower = tower
        self.max_graphs = max_graphs
        self._graphs: OrderedDict[GraphKey, Replay] = OrderedDict()

    @torch.no_grad()
    def __call__(
        self,
        pixel_values: Tensor,
        *,
        plan: MergePlan | None = None,
        feature_layer: int = -2,
        size_bias: SizeBias = SizeBias.off,
    ) -> VisionOutput:
        """Encode frames as `VisionTower.forward` does.

        Args:
            pixel_values: Normalised frames, (B, 3, height, width), on the tower's CUDA device.
            plan: Merges per layer for this frame size; None merges nothing.
            feature_layer: Hidden state to return.
            size_bias: Whether log(size) biases the attention keys.

        Returns:
            Tokens and sizes, without a trace.

        Raises:
            ValueError: if the frames are not on a CUDA device, or as `VisionTower.forward`.
        """
        key = self.key(pixel_values, plan=plan, feature_layer=feature_layer, size_bias=size_bias)
        replay = self._graphs.get(key)
        if replay is None:
            replay = self.record(pixel_values, plan=plan, feature_layer=feature_layer, size_bias=size_bias)
            self._graphs[key] = replay
            while len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        hidden, size = replay(pixel_values)
        return VisionOutput(hidden, size, None)

    def __len__(self) -> int:
        return len(self._graphs)

    def key(self, pixel_values: Tensor, *, plan: MergePlan | None, feature_layer: int, size_bias: SizeBias) -> GraphKey:
        """Say which graph serves these arguments; those of `__call__`."""
        return GraphKey(
            tuple(pixel_values.shape),
            pixel_values.dtype,
            pixel_values.device,
            plan.r if plan is not None else (),
            feature_layer,
            size_bias,
            self.tower.backend,
            kernels.setting(),
            torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
            tuple(parameter.data_ptr() for parameter in self.tower.parameters()),
        )

    def record(
        self, pixel_values: Tensor, *, plan: MergePlan | None, feature_layer: int, size_bias: SizeBias
    ) -> Replay:
        """Record one graph; arguments as for `__call__`, errors, too."""
        device = pixel_values.device
        if device.type != "cuda":
            raise ValueError(f"EncoderGraphs: got frames on {device}, want a CUDA device; call the tower itself")
        frames = frames_buffer(pixel_values)
        with torch.cuda.device(device):  # which a capture takes place on
            return self._capture(frames, plan=plan, feature_layer=feature_layer, size_bias=size_bias)

    def _capture(self, frames: Tensor, *, plan: MergePlan | None, feature_layer: int, size_bias: SizeBias) -> Replay:
        device = frames.device
        side_stream = torch.cuda.Stream(device)
        side_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side_stream):
            for _ in range(_NUM_WARMUP_RUNS):
                self.tower(frames, plan=plan, feature_layer=feature_layer, size_bias=size_bias)
        torch.cuda.current_stream(device).wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # beside threads that load and decode
            out = self.tower(frames, plan=plan, feature_layer=feature_layer, size_bias=size_bias)

        def replay(pixels: Tensor) -> tuple[Tensor, Tensor]:
            frames.copy_(pixels)
            graph.replay()
            return out.hidden.clone(), out.size.clone()

        return replay


def frames_buffer(pixel_values: Tensor) -> Tensor:
    """Copy frames into memory that later calls may overwrite, also those outside of an inference mode of the first."""
    with torch.inference_mode(False), torch.no_grad():
        return pixel_values.clone()
