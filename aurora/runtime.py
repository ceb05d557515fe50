"""Where and how things run: device, dtype, threads, seed, and a report of the environment.

This is the only file that reads environment variables (but for AURORA_KERNELS, which the kernels read).
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import random
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

import numpy as np
import torch


class Dtype(Enum):
    """Floating-point type of the weights; `auto` chooses by device."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """How a script runs."""

    device: str = "auto"
    """Where to run: auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps."""
    dtype: Dtype = Dtype.auto
    """Type of the weights: float32, float16, bfloat16, or auto (float32 on a CPU; bfloat16 on CUDA from sm80)."""
    threads: int = 0
    """CPU threads; 0 takes OMP_NUM_THREADS, or as many cores as are idle."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.threads < 0:
            raise ValueError(f"threads={self.threads}: want 0 (automatic) or a positive number")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: want 0 or a positive number")


def resolve_device(name: str = "auto") -> torch.device:
    """Turn a device name into a device that exists here.

    Args:
        name: `auto`, or a torch device string.

    Raises:
        ValueError: if torch does not know the name or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device={name}: want auto, cpu, cuda, cuda:N or mps")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: want auto, cpu, cuda, cuda:N or mps") from None
    if kind == "cuda":
        available = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= available:
            raise ValueError(f"device={name}: this machine has {available} CUDA devices; want device=cpu or auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name}: this machine has no MPS device; want device=cpu or auto")
    return device


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Choose the weights' type: float32 on a CPU; bfloat16 on CUDA from sm80 on, float16 on other accelerators."""
    if dtype is not Dtype.auto:
        return {
            Dtype.float32: torch.float32,
            Dtype.float16: torch.float16,
            Dtype.bfloat16: torch.bfloat16,
        }[dtype]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float16


def set_threads(threads: int = 0) -> int:
    """Set the number of CPU threads torch uses and return it.

    Two spinning threads on a busy machine are slower than one, so the automatic choice leaves busy cores alone.

    Args:
        threads: Number of threads; 0 takes OMP_NUM_THREADS where it is set, else the idle cores of this process.
    """
    if threads == 0:
        if os.environ.get("OMP_NUM_THREADS", "").isdigit():
            return torch.get_num_threads()
        cores = num_cores()
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        threads = max(1, cores - round(busy))
    torch.set_num_threads(threads)
    return threads


def num_cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def debug_enabled() -> bool:
    """Whether AURORA_DEBUG asks for tracebacks instead of one-line errors."""
    return os.environ.get("AURORA_DEBUG", "0") not in ("", "0")


def describe_error(error: Exception) -> str:
    """Put an error on one line; an operating-system error names its file first."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror.lower()}"
    return " ".join(text.split()) or type(error).__name__


def read_key(setting: str, path: str | None) -> str:
    """Read a secret from its file.

    Args:
        setting: Key of the configuration, for messages.
        path: The file; None gives an empty text.

    Raises:
        ValueError: if it holds anything but one word.
        OSError: if it cannot be read.
    """
    if path is None:
        return ""
    key = Path(path).expanduser().read_text(encoding="utf-8").strip()
    if not key or not key.isascii() or any(letter.isspace() for letter in key):
        raise ValueError(f"{setting}={path}: want a file with one key on one line")
    return key


def environment_report() -> dict[str, str]:
    """Describe what a result was made with: versions, commit, machine; values are short strings for a JSON file."""
    report = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("aurora-captioner", "torch", "triton", "numpy", "av", "pillow"):
        try:
            report[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            report[package] = "not installed"
    report["commit"] = _commit()
    report["threads"] = str(torch.get_num_threads())
    report["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        report["cuda"] = str(torch.version.cuda)
    return report


def process_bytes(key: str) -> int | None:
    """Return what Linux says about this process's memory, in bytes; None on a system that does not say it so.

    Args:
        key: `VmRSS`, the memory held now, or `VmHWM`, the most held so far. Not `ru_maxrss`: a new program inherits
            the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(status.read_text().split(f"{key}:")[1].split()[0]) * 1024


def release_free_memory() -> None:
    """Give back to the system what was freed: glibc keeps freed blocks of up to 32 MB, among them those of weights.

    Does nothing where the C library has no `malloc_trim`.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@functools.cache
def define_missing_torchvision_ops() -> None:
    """Define the two operator schemas without which torchvision's wheel does not import beside CPU torch.

    Call it before the first import of torchvision, or of timm and transformers, which import it. Where torchvision
    brings its own operators, or is not installed, this does nothing.
    """
    try:
        package = metadata.distribution("torchvision")
    except metadata.PackageNotFoundError:
        return
    library = next((file for file in package.files or [] if file.match("torchvision/_C*.so")), None)
    if library is not None and _loads(Path(str(package.locate_file(library)))):
        return
    _MISSING_OPS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _MISSING_OPS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# A schema lives as long as the object that defined it.
_MISSING_OPS = torch.library.Library("torchvision", "FRAGMENT")


def _loads(library: Path) -> bool:
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _commit() -> str:
    """Return the commit of this checkout, with `-dirty` where files differ, or `unknown` outside of one."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")
