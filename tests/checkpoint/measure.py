"""One task in a fresh process and the memory it took: `python -m tests.checkpoint.measure <task> <JSON settings>`."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aurora.checkpoint.convert import convert
from aurora.checkpoint.layouts import get_layout
from aurora.checkpoint.lazy import LazyTensor
from aurora.checkpoint.pretrained import load_model
from aurora.checkpoint.quantization import BitsAndBytesConfig
from aurora.checkpoint.store import atomic_folder
from aurora.checkpoint.writing import write_checkpoint
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig, RopeScaling
from aurora.model.vision import VisionConfig
from aurora.modeling import AuroraForConditionalGeneration

CONFIGS = {
    # 1.05 billion parameters: 2.1 GB in half precision.
    "2gb": AuroraConfig(
        vision=VisionConfig(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4),
        text=LlamaConfig(hidden_size=2048, intermediate_size=5632, num_layers=18, num_heads=16, num_kv_heads=16),
    ),
    # 0.52 billion parameters: 1.04 GB in half precision.
    "1gb": AuroraConfig(
        vision=VisionConfig(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4),
        text=LlamaConfig(
            vocab_size=8000, hidden_size=2048, intermediate_size=5632, num_layers=10, num_heads=16, num_kv_heads=16
        ),
    ),
    "7b": AuroraConfig(text=LlamaConfig(rope_scaling=RopeScaling(factor=4.0), max_seq_len=16384)),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def write(*, folder: str, size: str, dtype: str, layout: str, max_shard_size: str) -> dict[str, Any]:
    """Write a random checkpoint, one tensor in memory at a time."""
    config = CONFIGS[size]
    with torch.device("meta"):
        state = AuroraModel(config).state_dict()
    kind = DTYPES[dtype]
    noise = (torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0)) * 0.02).to(kind)

    def fill(shape: torch.Size, number: int) -> torch.Tensor:
        # Slices of one noise table, each tensor from another place: drawing 7 billion numbers takes minutes.
        tensor = torch.empty(shape.numel(), dtype=kind)
        start = number * 7919 % noise.numel()
        for part in tensor.split(noise.numel()):
            part.copy_(noise.roll(-start)[: part.numel()])
        return tensor.reshape(shape)

    tensors = {
        name: LazyTensor(
            shape=tuple(t.shape), dtype=kind, read=lambda t=t, n=n: fill(t.shape, n), file=Path(folder), key=name
        )
        for n, (name, t) in enumerate(state.items())
    }
    with atomic_folder(Path(folder)) as stage:
        write_checkpoint(stage, get_layout(layout), config, tensors, max_shard_size=max_shard_size)
    return {"bytes": sum(tensor.num_bytes for tensor in tensors.values())}


def load(*, folder: str, dtype: str) -> dict[str, Any]:
    """Load as stored and touch every weight."""
    model = load_model(folder, dtype=dtype)
    # One byte of every page: a sum in another dtype would copy, and measure the copy.
    touched = sum(p.detach().reshape(-1).view(torch.uint8)[::4096].sum().item() for p in model.parameters())
    return {"bytes": sum(p.numel() * p.element_size() for p in model.parameters()), "touched": touched}


def transcode(*, folder: str, output: str, layout: str, max_shard_size: str) -> dict[str, Any]:
    """Convert to another layout."""
    return {"bytes": convert(folder, output, layout=layout, max_shard_size=max_shard_size).num_bytes}


def describe(*, folder: str) -> dict[str, Any]:
    """Load, and describe one image with four new tokens."""
    started = time.perf_counter()
    model = AuroraForConditionalGeneration.from_pretrained(folder, torch_dtype="auto")
    loaded = time.perf_counter()
    side = model.config.vision.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    ids = torch.tensor([[1, 3148, 1001, 29901, model.config.image_token_index, 29871, 13, 4002]])
    made = model.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=4, eos_token_id=-1, token_kept_ratio=0.2, return_dict=True
    )
    return {
        "load_s": loaded - started,
        "ids": made.sequences[0].tolist(),
        "visual_tokens": made.visual_token_counts,
        "seconds": made.seconds,
        "dtype": str(model.dtype),
    }


def load_quantized(*, folder: str, kind: str) -> dict[str, Any]:
    """Load a float16 checkpoint in 8 or 4 bits."""
    settings: Any = kind
    if kind in ("nf4", "fp4"):
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
    model = load_model(folder, quantization=settings)
    tensors = [*model.parameters(), *model.buffers()]
    return {"bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors)}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "write": write, "load": load, "convert": transcode, "describe": describe,
    "load_quantized": load_quantized,
}  # fmt: skip


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    # Not ru_maxrss, over which exec carries the peak of the process that started this one.
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    base = peak_bytes()
    begun = time.perf_counter()
    result = TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(result | {"base": base, "peak": peak_bytes(), "wall_s": time.perf_counter() - begun}))
