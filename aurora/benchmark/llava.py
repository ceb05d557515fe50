"""The time of a whole caption: our merged captioner against transformers' LLaVA, which keeps every patch.

One random LLaVA of ViT-L/14-336 and the small language model, saved in the llava_hf layout and read by transformers.
The bound is the ratio of the arithmetic of both ways: what merging could give if arithmetic took all the time.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aurora.benchmark.decode import smollm2
from aurora.benchmark.encoder import gflop_per_frame
from aurora.benchmark.harness import Row, WrongResultError, compare
from aurora.checkpoint.pretrained import save_model
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import Llama, LlamaConfig
from aurora.model.merge import MergeConfig, Schedule, plan_merge
from aurora.model.vision import Activation, VisionConfig, num_active_layers
from aurora.modeling import AuroraForConditionalGeneration
from aurora.runtime import define_missing_torchvision_ops, num_cores
from aurora.training.init import init_tower

VIT_L = VisionConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, patch_size=14, image_size=336,
    hidden_act=Activation.quick_gelu, norm_eps=1e-5,
)  # fmt: skip
TINY_TOWER = VisionConfig(
    hidden_size=32, intermediate_size=64, num_layers=4, num_heads=2, patch_size=14, image_size=56,
    hidden_act=Activation.quick_gelu, norm_eps=1e-5,
)  # fmt: skip
PEER = "transformers LLaVA"
WANTED = {"ours 0.2 constant": 1.7, "ours 0.2 linear": 2.1}
"""Ratios of latency to the peer that we want."""


def build_captioner(llama: Llama, *, quick: bool = False) -> AuroraModel:
    """A captioner of ViT-L/14-336 (quick: a tiny tower) with random weights and this language model."""
    vision = TINY_TOWER if quick else VIT_L
    # A placeholder inside the vocabulary: the export then adds no rows.
    placeholder = llama.config.vocab_size - 1
    model = AuroraModel(AuroraConfig(vision=vision, text=llama.config, image_token_index=placeholder, eos_token_id=2))
    init_tower(model.vision_tower)
    model.language_model = llama
    return model.eval()


def measure_llava(device: torch.device, *, quick: bool, threads: int, progress: Callable[[str], None]) -> list[Row]:
    """Time captions of eight frames and 64 new tokens in float32.

    Args:
        device: Where.
        quick: A tiny model, two frames, few tokens.
        threads: Of every side; 0 is all cores.
        progress: Told what happens.

    Returns:
        A row per side: latency, its ratio to the peer, and the ratio that arithmetic allows.

    Raises:
        WrongResultError: if unmerged greedy ids differ from the peer's.
    """
    num_frames, num_tokens = (2, 4) if quick else (8, 64)
    llama, weights = smollm2(quick=quick)
    model = AuroraForConditionalGeneration(build_captioner(llama, quick=quick)).to(device).eval()
    config = model.config
    side = config.vision.image_size
    pixels = torch.randn(1, num_frames, 3, side, side, device=device)
    text = torch.randint(5, 60, (24,), device=device)
    placeholder = torch.full((num_frames,), config.image_token_index, device=device)
    input_ids = torch.cat([text[:8], placeholder, text[8:]])[None]

    def ours(**merging: Any) -> Callable[[], Tensor]:
        def caption() -> Tensor:
            out = model.generate(
                input_ids, pixel_values_videos=pixels, max_new_tokens=num_tokens, eos_token_id=-1, **merging
            )
            assert isinstance(out, Tensor)
            return out

        return caption

    sides: dict[str, Callable[[], Tensor]] = {}
    peer = transformers_llava(model, device)
    if peer is not None:
        sides[PEER] = _their_caption(peer, input_ids, pixels, num_tokens)
        progress("comparing unmerged ids")
        if not torch.equal(sides[PEER](), ours(token_kept_ratio=1.0)()):
            raise WrongResultError(f"ours unmerged: other ids than {PEER}")
    sides["ours 0.2 constant"] = ours(token_kept_ratio=0.2, schedule="constant")
    sides["ours 0.2 linear"] = ours(token_kept_ratio=0.2, schedule="linear")
    rows = compare(
        sides,
        repeats=2 if device.type == "cpu" else 10,
        warmup=1,
        # Teraflops of matrix products: all idle cores are best for both, and trying one costs a minute.
        threads_per_side=(threads or (1 if quick else num_cores()),),
        device=device,
        progress=progress,
    )
    whole = _gflop(config, 1.0, "constant", num_frames, len(text), num_tokens, every_layer=True)
    for row in rows:
        row |= {"op": f"caption, {num_frames} frames", "model": f"ViT-L/14-336 + {weights}" if not quick else weights}
        if row["side"] != PEER:
            schedule = row["side"].split()[-1]
            own = _gflop(config, 0.2, schedule, num_frames, len(text), num_tokens)
            row |= {"flop_bound": whole / own}
            row["ratio"] = row["ratio"] if peer is not None else None
            row["wanted"] = f"ratio >= {WANTED[row['side']]}"
    return rows


def transformers_llava(model: AuroraForConditionalGeneration, device: torch.device) -> Any:
    """Build the LlavaForConditionalGeneration of transformers with our weights, or None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    define_missing_torchvision_ops()
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model.model, folder, "llava_hf")
        peer = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=model.dtype)
        return peer.to(device).eval()


def _their_caption(peer: Any, input_ids: Tensor, pixels: Tensor, num_tokens: int) -> Callable[[], Tensor]:
    """One placeholder for each patch, as transformers wants them."""
    index = peer.config.image_token_index
    patches = (peer.config.vision_config.image_size // peer.config.vision_config.patch_size) ** 2
    repeats = torch.where(input_ids[0] == index, patches, 1)
    ids = input_ids[0].repeat_interleave(repeats)[None]
    mask = torch.ones_like(ids)

    def caption() -> Tensor:
        with torch.inference_mode():
            out: Tensor = peer.generate(
                input_ids=ids, attention_mask=mask, pixel_values=pixels[0], do_sample=False,
                max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[:, ids.shape[1] :]

    return caption


def _gflop(
    config: AuroraConfig,
    ratio: float,
    schedule: str,
    num_frames: int,
    text: int,
    new: int,
    *,
    every_layer: bool = False,
) -> float:
    """Arithmetic of a caption in 1e9: encoder, projector, prompt and answer."""
    side = config.vision.image_size
    plan = plan_merge(
        MergeConfig(token_kept_ratio=ratio, schedule=Schedule[schedule]),
        height_px=side,
        width_px=side,
        vision=config.vision,
        num_active_layers=num_active_layers(config.vision, config.feature_layer),
    )
    tokens = plan.num_visual_tokens
    language, vision = config.text, config.vision
    projector = 2.0 * tokens * language.hidden_size * (vision.hidden_size + language.hidden_size) / 1e9
    frames = num_frames * (gflop_per_frame(vision, plan, whole=every_layer) + projector)
    prompt = num_frames * tokens + text
    return frames + language_gflop(language, prompt, prompt) + language_gflop(language, new, prompt + new // 2)


def language_gflop(config: LlamaConfig, num_tokens: int, context: int) -> float:
    """Arithmetic of `num_tokens` tokens in 1e9, each seeing half of `context` where it is their own, else all of it."""
    kv_size = config.num_kv_heads * config.head_dim
    layer = 2.0 * config.hidden_size * (2 * config.hidden_size + 2 * kv_size + 3 * config.intermediate_size)
    seen = context / 2 if num_tokens == context else context
    layer += 4.0 * config.hidden_size * seen
    head = 2.0 * config.hidden_size * config.vocab_size * (1 if num_tokens == context else num_tokens)
    return (num_tokens * config.num_layers * layer + head) / 1e9
