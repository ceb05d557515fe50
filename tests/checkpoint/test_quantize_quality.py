"""What quantising costs: agreement and perplexity of int8, and the memory of loading in 8 and 4 bits."""

import copy
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from aurora.captioning import BUNDLED_MODEL
from aurora.checkpoint.gguf import load_llama
from aurora.checkpoint.quantization import Int8Config
from aurora.checkpoint.quantize import quantize_model
from aurora.data.tinyworld import Category, caption_prompts, render_clip, sample_scene
from aurora.model.int8 import Int8Linear
from aurora.model.llama import Llama
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.gguf_tokenizer import load_gguf_tokenizer
from aurora.processing.processor import AuroraProcessor
from tests.checkpoint.test_gguf import TEXT, logits
from tests.checkpoint.test_memory import measured
from tests.smollm2 import needs_smollm2, smollm2_file

ROOT = Path(__file__).parents[2]
NUM_CLIPS = 12
FULL_BYTES = 1.105e9
"""Float16 weights of the model that is loaded in fewer bits."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_int8_chooses_the_tokens_of_bfloat16_in_captions() -> None:
    """Both read the same text so far: after one other word two free captions cannot be compared token by token."""
    model = AuroraForConditionalGeneration.from_pretrained(BUNDLED_MODEL, torch_dtype=torch.bfloat16).eval()
    processor = AuroraProcessor.from_pretrained(BUNDLED_MODEL)
    int8 = copy.deepcopy(model)
    quantize_model(int8.model.language_model, Int8Config())
    assert any(isinstance(module, Int8Linear) for module in int8.modules())
    same: list[bool] = []
    questions = [caption_prompts(category)[0] for category in Category]
    for seed in range(NUM_CLIPS):
        clip = list(np.asarray(render_clip(sample_scene(seed, "test"))))
        for question in questions:
            prompt = processor.build_prompt(question, num_frames=len(clip))
            inputs = processor(videos=clip, text=prompt).to(model.device, model.dtype)
            ids = model.generate(**inputs, max_new_tokens=80, token_kept_ratio=0.4)
            whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], ids], dim=1)}
            whole.pop("attention_mask", None)
            with torch.inference_mode():
                scores = int8(**whole, token_kept_ratio=0.4).logits[0, -ids.shape[1] - 1 : -1]
            same += (scores.argmax(dim=-1) == ids[0]).tolist()
    print(f"int8 agrees on {np.mean(same):.2%} of {len(same)} tokens")
    assert len(same) > 1000
    assert np.mean(same) >= 0.97


def perplexity(llama: Llama, texts: list[torch.Tensor]) -> float:
    total, count = 0.0, 0
    for ids in texts:
        with torch.inference_mode():
            scores = logits(llama, ids).float()[0, :-1]
        total += torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


@needs_smollm2
def test_int8_raises_the_perplexity_of_a_real_model_by_at_most_one_percent() -> None:
    llama = load_llama(smollm2_file()).to(torch.bfloat16)
    tokenizer = load_gguf_tokenizer(smollm2_file())
    written = [TEXT, (ROOT / "LICENSE").read_text()[:4000], (ROOT / "README.md").read_text()[:4000]]
    texts = [torch.tensor([tokenizer.encode(text)]) for text in written]
    before = perplexity(llama, texts)
    quantize_model(llama, Int8Config())
    after = perplexity(llama, texts)
    print(f"perplexity bfloat16 {before:.4f}, int8 {after:.4f}: {after / before - 1:+.2%}")
    assert after / before <= 1.01


@pytest.fixture(scope="module")
def one_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random float16 checkpoint of 1 GB in the xtuner layout, in shards of 250 MB."""
    root = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(root).free < 3e9:
        pytest.skip("wants 3 GB of disk")
    settings = {"size": "1gb", "dtype": "float16", "layout": "xtuner", "max_shard_size": "250MB"}
    done = measured("write", folder=str(root / "model"), **settings)
    assert done["bytes"] == pytest.approx(FULL_BYTES, rel=1e-2)
    yield root / "model"
    shutil.rmtree(root)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_loading_in_four_bits_holds_no_full_weights(one_gigabyte: Path, kind: str) -> None:
    done = measured("load_quantized", folder=str(one_gigabyte), kind=kind)
    assert done["bytes"] < 0.4e9
    assert done["peak"] - done["base"] <= 0.5 * FULL_BYTES + 300e6


def test_loading_in_eight_bits_holds_no_full_weights(one_gigabyte: Path) -> None:
    done = measured("load_quantized", folder=str(one_gigabyte), kind="int8")
    assert 0.4e9 < done["bytes"] < 0.75e9
    assert done["peak"] - done["base"] <= 0.75 * FULL_BYTES + 300e6
