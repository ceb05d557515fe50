"""On CUDA, a random Llama of 7B and the released captioner's sizes: decode against the bandwidth, and the first token.

Decoding one token of a 7B model is limited by reading its weights, so what counts is the share of the bandwidth that
this device was measured to have, here, just before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from aurora.benchmark.decode import QUICK, our_decode, transformers_decode, transformers_llama
from aurora.benchmark.harness import Row, compare, time_once
from aurora.benchmark.llava import TINY_TOWER
from aurora.checkpoint.quantization import Int8Config
from aurora.checkpoint.quantize import quantize_model
from aurora.generation.engine import prefill
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import Llama, LlamaConfig
from aurora.model.merge import MergeConfig
from aurora.model.products import Decoding
from aurora.model.vision import VisionConfig

CONTEXT = 1532
"""Eight frames of 171 tokens and some text."""
WANTED = {"ours compiled": 0.70, "ours int8 compiled": 0.55}
"""Shares of the measured bandwidth that we want."""


def measure_gpu(device: torch.device, dtype: torch.dtype, *, quick: bool, progress: Callable[[str], None]) -> list[Row]:
    """Measure decoding of one row, and the time to the first token.

    Args:
        device: CUDA.
        dtype: bfloat16 or float16.
        quick: Tiny models.
        progress: Told what happens.

    Returns:
        Rows of decoding (tokens_s, gb_per_s, bandwidth_share, ratio to transformers) and of first tokens.
    """
    with torch.device(device):
        llama = Llama(QUICK if quick else LlamaConfig()).to(dtype).eval()
    rows = _decode(llama, quick=quick, progress=progress)
    return rows + _first_token(llama, quick=quick, progress=progress)


def _decode(llama: Llama, *, quick: bool, progress: Callable[[str], None]) -> list[Row]:
    device = llama.embed_tokens.weight.device
    context, num_tokens = (24, 4) if quick else (CONTEXT, 64)
    prompt = torch.randint(5, llama.config.vocab_size, (1, context), device=device)
    bandwidth = read_bandwidth(device, num_bytes=2**20 if quick else 2**32)
    int8 = copy.deepcopy(llama)
    quantize_model(int8, Int8Config())
    sides: dict[str, Callable[[], Tensor]] = {}
    peer = transformers_llama(llama)
    if peer is not None:
        sides["transformers generate"] = transformers_decode(peer, prompt, num_tokens)
    for mode in Decoding:
        sides[f"ours {mode.value}"] = _in_mode(mode, llama, our_decode(llama, prompt, num_tokens))
    sides["ours int8 compiled"] = _in_mode(Decoding.compiled, int8, our_decode(int8, prompt, num_tokens))
    rows = compare(sides, repeats=3 if quick else 10, warmup=2, device=device, progress=progress)
    for row in rows:
        name = row["side"]
        moved = _bytes_per_step(int8 if "int8" in name else llama, context + num_tokens // 2)
        per_step_s = row["p50_ms"] / 1e3 / num_tokens
        row |= {
            "op": f"decode, context {context}", "tokens_s": 1 / per_step_s, "gb_per_s": moved / per_step_s / 1e9,
            "bandwidth_share": moved / per_step_s / bandwidth, "bandwidth_gb_per_s": bandwidth / 1e9,
        }  # fmt: skip
        if name in WANTED:
            row["wanted"] = f"bandwidth_share >= {WANTED[name]}, ratio >= 4"
    return rows


def _first_token(llama: Llama, *, quick: bool, progress: Callable[[str], None]) -> list[Row]:
    device = llama.embed_tokens.weight.device
    with torch.device(device):
        model = AuroraModel(AuroraConfig(vision=TINY_TOWER if quick else VisionConfig(), text=llama.config))
    model = model.to(llama.embed_tokens.weight.dtype).eval()
    model.language_model = llama
    side, num_frames = model.config.vision.image_size, 2 if quick else 8
    pixels = torch.randn(1, num_frames, 3, side, side, device=device)
    placeholders = torch.full((num_frames,), model.config.image_token_index, device=device)
    ids = torch.cat([placeholders, torch.randint(5, 90, (64,), device=device)])[None]

    def first(ratio: float) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def run() -> Tensor:
            visual = model.encode(pixels, merge=MergeConfig(token_kept_ratio=ratio))
            state = prefill(model, model.splice(ids, visual, padding_side="left"))
            return state.logits.argmax(dim=-1)

        return run

    sides = {f"kept ratio {ratio}": first(ratio) for ratio in (1.0, 0.5, 0.2, 0.1)}
    rows = compare(sides, repeats=3 if quick else 20, warmup=3, device=device, progress=progress)
    for row in rows:
        row["op"] = f"first token, {num_frames} frames"
        if row["side"] == "kept ratio 0.2":
            row["wanted"] = "p50_ms <= 50"
    return rows


def read_bandwidth(device: torch.device, *, num_bytes: int) -> float:
    """Bytes per second that summing a large tensor reads, the best of ten runs."""
    data = torch.ones(num_bytes // 4, device=device, dtype=torch.float32)
    best_ms = min(time_once(data.sum, device) for _ in range(10))
    return num_bytes / best_ms * 1e3


def _bytes_per_step(llama: Llama, context: int) -> float:
    """What decoding one token must read: every weight but the embeddings, and the keys and values."""
    embeddings = 0 if llama.lm_head is None else llama.embed_tokens.weight.numel()
    tensors = [*llama.parameters(), *llama.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    item = llama.embed_tokens.weight.element_size()
    config = llama.config
    return (
        weights - embeddings * item + 2.0 * config.num_layers * config.num_kv_heads * config.head_dim * context * item
    )


def _in_mode(mode: Decoding, llama: Llama, decode: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        before, llama.decoding = llama.decoding, mode
        try:
            return decode()
        finally:
            llama.decoding = before

    return run
