"""The memory of two training steps, in a process of its own: `python -m aurora.benchmark.training_worker <settings>`.

On a CPU it is the largest resident size, less what the process had before the model; glibc is told to give freed memory
back (`ENVIRONMENT`), so that it is what training needs and not how far its heap has grown. On CUDA it is what PyTorch
has allocated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from typing import Any

import torch

from aurora.benchmark.training_case import CASES, PEER, Ours, Peer, Trainer, batches, build_model, merge_of
from aurora.runtime import process_bytes
from aurora.training.config import Precision

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def build_trainer(case: str, side: str, seed: int, precision: Precision, device: torch.device) -> Trainer:
    """Build one side with its weights.

    Args:
        case: A name of `CASES`.
        side: `PEER`, or a name that `merge_of` takes.
        seed: Of the weights.
        precision: fp32 or bf16.
        device: Where.
    """
    model = build_model(CASES[case], seed, device)
    if side == PEER:
        return Peer(model, CASES[case].lr, precision)
    return Ours(model, merge_of(side), CASES[case].lr, precision)


def peak_bytes(case: str, side: str, precision: Precision, device: torch.device) -> int | None:
    """Measure a side in a fresh process; None where the operating system does not tell."""
    if device.type != "cuda" and process_bytes("VmHWM") is None:
        return None
    settings = {"case": case, "side": side, "precision": precision.value, "device": str(device)}
    done = subprocess.run(
        [sys.executable, "-m", "aurora.benchmark.training_worker", json.dumps(settings)],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{side}: measuring its memory failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def main(settings: dict[str, Any]) -> None:
    """Train for two steps and print the peak."""
    device, precision = torch.device(settings["device"]), Precision(settings["precision"])
    both = list(islice(batches(CASES[settings["case"]], "train", device), 2))
    # What libraries take once is paid before, by a model too small to count.
    build_trainer("quick", settings["side"], 0, precision, device).step(next(batches(CASES["quick"], "train", device)))
    before = _memory("VmRSS", device)
    trainer = build_trainer(settings["case"], settings["side"], 0, precision, device)
    for batch in both:
        trainer.step(batch)
    print(json.dumps({"peak_bytes": _memory("VmHWM", device) - before}))


def _memory(key: str, device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) if key == "VmRSS" else torch.cuda.max_memory_allocated(device)
    found = process_bytes(key)
    assert found is not None, "peak_bytes asks first"
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
