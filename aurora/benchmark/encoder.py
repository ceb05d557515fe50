"""suite=encoder: frames per second of the vision tower against kept ratio, and against its peers.

One process, the same random ViT-H weights on every side: our tower unmerged and at several kept ratios, with a
constant and a linear schedule, token merging in the paper's formulation, and transformers' CLIPVisionModel, which runs
all 32 layers where features leave after the 31st. Results are compared before anything is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from aurora.benchmark.config import BenchmarkConfig
from aurora.benchmark.harness import Row, WrongResultError, compare, expect_close
from aurora.benchmark.merging import MERGING, WITHOUT, measure_merging
from aurora.benchmark.tome import tome_tower
from aurora.checkpoint.towers import CLIP
from aurora.model.encoder_graph import EncoderGraphs
from aurora.model.merge import MergeConfig, MergePlan, Schedule, SizeBias, plan_merge
from aurora.model.vision import VisionConfig, VisionTower
from aurora.runtime import define_missing_torchvision_ops, num_cores, resolve_device, resolve_dtype, seed_everything

RATIOS = (0.5, 0.2, 0.1)
UNMERGED = "unmerged"
PEER = "transformers CLIP"
MERGED = "0.2 constant"
TOME = "ToMe formulation 0.2"
"""Names of the sides that others are compared with, and of the one whose merging is timed apart."""

_TINY = VisionConfig(hidden_size=64, intermediate_size=128, num_layers=6, num_heads=4, patch_size=14, image_size=112)


@dataclass(frozen=True, slots=True)
class Side:
    """One way to encode the frames."""

    name: str
    plan: MergePlan
    run: Callable[[], Tensor]
    size_bias: SizeBias = SizeBias.off
    is_ours: bool = True


def run(config: BenchmarkConfig) -> list[Row]:
    """Measure the encoder.

    Args:
        config: quick takes a tiny tower; device and dtype as elsewhere.

    Returns:
        A row per side, and on CUDA per way of running and batch size.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    seed_everything(config.seed)
    console = Console(stderr=True)
    rows: list[Row] = []
    with torch.inference_mode(), strict_recompiles():
        tower, peer = build_towers(_TINY if config.quick else VisionConfig(), device, dtype)
        if peer is None:
            console.print("transformers is not installed: its CLIP encoder is left out")
        batches = (2,) if config.quick else (1, 8, 32) if device.type == "cuda" else (1,)
        for batch in batches:
            side_px = tower.config.image_size
            pixels = torch.randn(batch, tower.config.num_channels, side_px, side_px, device=device, dtype=dtype)
            for mode in _modes(config, device):
                console.print(f"{batch} frames, {mode}")
                rows += measure(tower, peer, pixels, mode, config, console)
    return rows


def build_towers(config: VisionConfig, device: torch.device, dtype: torch.dtype) -> tuple[VisionTower, Any]:
    """Build our tower and transformers' CLIPVisionModel over the same random weights.

    Args:
        config: Sizes.
        device: Where.
        dtype: Of the weights.

    Returns:
        The tower and the peer, or None where transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        with torch.device(device):
            return VisionTower(config).to(dtype).eval(), None
    define_missing_torchvision_ops()
    transformers = importlib.import_module("transformers")  # a development extra, loaded as a peer only
    transformers.logging.set_verbosity_error()
    names = {
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "patch_size": config.patch_size, "image_size": config.image_size, "hidden_act": config.hidden_act.value,
        "layer_norm_eps": config.norm_eps,
    }  # fmt: skip
    with torch.device(device):
        peer = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**names, attn_implementation="sdpa", dtype=dtype)
        )
    peer = peer.to(dtype).eval()
    keys = CLIP.parts[0].keys
    weights = {
        ours.removeprefix("vision_tower."): tensor
        for key, tensor in peer.state_dict().items()
        if (ours := keys.to_ours(key)) is not None
    }
    with torch.device("meta"):
        tower = VisionTower(config)
    tower.load_state_dict(weights, assign=True)  # the same memory: two towers of ViT-H are 5 GB in float32
    return tower.eval(), peer


def measure(
    tower: VisionTower, peer: Any, pixels: Tensor, mode: str, config: BenchmarkConfig, console: Console
) -> list[Row]:
    """Time all sides on these frames.

    Args:
        tower: Ours.
        peer: transformers' CLIPVisionModel, or None.
        pixels: Frames, (B, 3, height, width).
        mode: eager, compile or graph.
        config: Of the run.
        console: For progress.

    Returns:
        A row per side: frames per second, ratios to the unmerged tower and to the peer.
    """
    encode = _encoder(tower, mode)
    sides = list(_sides(tower, peer, encode, pixels, quick=config.quick))
    tolerance = 1e-4 if pixels.dtype == torch.float32 else 5e-2
    on_gpu = pixels.device.type == "cuda"
    repeats = 3 if config.quick else 20 if on_gpu else 5
    # A frame of ViT-H is a teraflop of matrix products: all idle cores are best, and trying one costs a minute.
    threads = config.threads or (1 if config.quick else num_cores())
    rows = compare(
        {side.name: side.run for side in sides},
        repeats=repeats,
        warmup=3 if on_gpu else 1,
        threads_per_side=(threads,),
        baseline=UNMERGED,
        check=_checker(sides, tolerance),
        device=pixels.device,
        progress=lambda line: console.print(f"  {line}", highlight=False),
    )
    peer_ms = next((row["p50_ms"] for row in rows if row["side"] == PEER), None)
    batch = pixels.shape[0]
    for row, side in zip(rows, sides, strict=True):
        row |= {
            "mode": mode if side.is_ours else "eager",
            "frames": batch,
            "dtype": str(pixels.dtype).removeprefix("torch."),
            "tokens": side.plan.num_visual_tokens,
            "frames_per_s": batch / row["p50_ms"] * 1e3,
            "vs_unmerged": row.pop("ratio"),
            "vs_clip": peer_ms / row["p50_ms"] if peer_ms is not None else None,
            "gflop_per_frame": gflop_per_frame(tower.config, side.plan, whole=side.name == PEER),
        }
    if mode == ("graph" if on_gpu else "eager"):
        merged, plan = next((row, side.plan) for row, side in zip(rows, sides, strict=True) if side.name == MERGED)
        merged["merge_ms"] = _merge_ms(tower.config, plan, pixels, repeats=4 * repeats, threads=threads)
        merged["merge_share"] = merged["merge_ms"] / merged["p50_ms"]
    return rows


def _merge_ms(config: VisionConfig, plan: MergePlan, pixels: Tensor, *, repeats: int, threads: int) -> float:
    rows = measure_merging(
        config,
        plan,
        num_frames=pixels.shape[0],
        device=pixels.device,
        dtype=pixels.dtype,
        repeats=repeats,
        threads=threads,
    )
    median = {row["side"]: row["p50_ms"] for row in rows}
    return float(median[MERGING] - median[WITHOUT])


def gflop_per_frame(config: VisionConfig, plan: MergePlan, *, whole: bool = False) -> float:
    """Multiplications and additions of the matrix products and the attention of one frame, in 1e9.

    Args:
        config: Sizes.
        plan: Tokens per layer; the merge stands between a layer's attention and its MLP.
        whole: Also count the last layer, which features of layer -2 do not need.
    """
    width, prefix = config.hidden_size, config.num_prefix_tokens
    tokens = [prefix + count for count in plan.tokens]
    if whole:
        tokens = [tokens[0]] * (config.num_layers + 1)
    total = 2.0 * (tokens[0] - prefix) * width * config.num_channels * config.patch_size**2
    for before, after in itertools.pairwise(tokens):
        total += 8.0 * before * width**2 + 4.0 * before**2 * width + 4.0 * after * width * config.intermediate_size
    return total / 1e9


@contextmanager
def strict_recompiles() -> Iterator[None]:
    """Let torch.compile raise where it would otherwise give up and run eagerly, which would be timed as compiled."""
    dynamo = importlib.import_module("torch._dynamo")
    # Nine plans with r = 0, 1 or more, odd or even counts and two kinds of bias.
    with dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=64):
        yield


def _modes(config: BenchmarkConfig, device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ("eager",)
    return ("eager", "compile", "graph") if config.compile else ("eager", "graph")


def _encoder(tower: VisionTower, mode: str) -> Callable[..., Tensor]:
    """Return encode(pixels, plan=..., size_bias=...) -> hidden, run the way `mode` says."""
    compiled = tower.blocks[0]._compiled_call_impl is not None  # by an earlier mode; compiling again takes a minute
    if mode != "eager" and not compiled:
        tower.compile_blocks()  # a graph then holds their fused kernels, without the cost of launching them
    elif mode == "eager":
        for block in tower.blocks:
            block._compiled_call_impl = None
    if mode == "graph":
        graphs = EncoderGraphs(tower)
        return lambda pixels, **settings: graphs(pixels, **settings).hidden
    return lambda pixels, **settings: tower(pixels, **settings).hidden


def _sides(
    tower: VisionTower, peer: Any, encode: Callable[..., Tensor], pixels: Tensor, *, quick: bool
) -> Iterator[Side]:
    def plan_of(merge: MergeConfig) -> MergePlan:
        return plan_merge(
            merge,
            height_px=pixels.shape[-2],
            width_px=pixels.shape[-1],
            vision=tower.config,
            num_active_layers=tower.config.num_layers - 1,
        )

    def ours(name: str, merge: MergeConfig) -> Side:
        plan = plan_of(merge)
        return Side(name, plan, lambda: encode(pixels, plan=plan, size_bias=merge.size_bias), size_bias=merge.size_bias)

    yield ours(UNMERGED, MergeConfig())
    if peer is not None:
        yield Side(
            PEER,
            plan_of(MergeConfig()),
            lambda: peer(pixels, output_hidden_states=True).hidden_states[-2],
            is_ours=False,
        )
    for ratio in RATIOS:
        constant = MergeConfig(token_kept_ratio=ratio)
        yield ours(f"{ratio} constant", constant)
        yield ours(f"{ratio} linear", replace(constant, schedule=Schedule.linear))
    biased = MergeConfig(token_kept_ratio=0.2, size_bias=SizeBias.keys)
    yield ours("0.2 constant, size bias", biased)
    plan = plan_of(biased)
    yield Side(TOME, plan, lambda: tome_tower(tower, pixels, plan), size_bias=SizeBias.keys, is_ours=False)


def _checker(sides: list[Side], tolerance: float) -> Callable[[str, Any, Any], None]:
    """Peers equal ours; every side delivers the tokens its plan says, all finite."""
    by_name = {side.name: side for side in sides}
    kept: dict[tuple[MergePlan, SizeBias], Tensor] = {}

    def check(name: str, got: Tensor, want: Tensor) -> None:
        side = by_name[name]
        if got.shape[1] != side.plan.num_visual_tokens + 1 or not torch.isfinite(got).all():
            raise WrongResultError(f"{name}: got {tuple(got.shape)}, want {side.plan.num_visual_tokens} + 1 tokens")
        ours = kept.setdefault((side.plan, side.size_bias), got)
        # In half precision the paper's formulation scores in that type and so merges other pairs (KERNELS 0.3).
        if name != TOME or got.dtype == torch.float32:
            expect_close(atol=tolerance)(name, got, ours)

    return check
