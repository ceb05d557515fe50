"""The memory estimate: what it grows with, and that it is above what a row really takes."""

import subprocess
import sys

import pytest
import torch

from aurora.generation.memory import available_bytes, row_bytes
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.vision import VisionConfig

MIB = 2**20


def model(**text: int) -> AuroraModel:
    vision = VisionConfig(hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, patch_size=8, image_size=32)
    with torch.device("meta"):
        return AuroraModel(AuroraConfig(vision=vision, text=LlamaConfig(num_layers=2, **text)))


def test_it_grows_with_what_a_row_has() -> None:
    one = {"prompt_tokens": 500, "new_tokens": 100, "num_pixels": 1000}
    seven = model()
    base = row_bytes(seven, **one)
    for key, more in {"prompt_tokens": 1000, "new_tokens": 200, "num_pixels": 10**6, "num_beams": 4}.items():
        assert row_bytes(seven, **{**one, key: more}) > base
    assert row_bytes(seven.half(), **one) < 0.6 * base
    full = {**one, "prompt_tokens": 4000}
    assert row_bytes(seven, **{**full, "new_tokens": 96}) == row_bytes(seven, **{**full, "new_tokens": 10**6})


def test_a_7b_row_is_what_its_cache_says() -> None:
    """32 layers of 2 x 4096 half-precision values for 1,600 tokens are 0.8 GB; the estimate covers its growth."""
    with torch.device("meta"):
        big = AuroraModel(AuroraConfig()).half()
    estimate = row_bytes(big, prompt_tokens=1400, new_tokens=200, num_pixels=8 * 3 * 378**2)
    assert 0.8e9 < estimate < 3e9


def test_available_memory_is_a_share_of_what_is_free() -> None:
    free = available_bytes(torch.device("cpu"))
    assert free is not None
    assert 10 * MIB < free < 2**46
    assert available_bytes(torch.device("meta")) is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_row_takes_no_more_than_was_estimated() -> None:
    code = """
import torch
from aurora.generation import SamplingConfig, generate
from aurora.generation.memory import row_bytes
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.vision import VisionConfig
torch.set_num_threads(1)
vision = VisionConfig(hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, patch_size=8, image_size=32)
text = LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=1024, num_layers=8, num_heads=8, num_kv_heads=8)
model = AuroraModel(AuroraConfig(vision=vision, text=text)).eval()
def run(tokens, rows):
    ids = torch.randint(3, 1000, (rows, tokens))
    with torch.no_grad():
        spliced = model.splice(ids, None, padding_side="left")
    generate(model, spliced, SamplingConfig(max_new_tokens=40, eos_token_id=-1))
    status = open("/proc/self/status").read()
    # Not ru_maxrss: exec carries pytest's own peak over into it.
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
before = run(16, 1)
after = run(1200, 4)
print(after - before, 4 * row_bytes(model, prompt_tokens=1200, new_tokens=40, num_pixels=0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    taken, estimated = map(int, done.stdout.split())
    assert taken < estimated
    assert estimated < 8 * max(taken, MIB)
