"""The xtuner directory that the original exporter writes, from the golden weights; configs as the hub shows them."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden import load_index, load_tensors


def root_config(name: str) -> dict[str, Any]:
    """config.json at the root: LlamaForCausalLM."""
    llm = load_index("full_index")[name]["llm_config"]
    return {
        "_name_or_path": "vicuna-7b-v1.5-16k",
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "transformers_version": "4.42.4",
        "use_cache": False,
        "pretraining_tp": 1,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "mlp_bias": False,
        "max_sequence_length": 1024,
        **llm,
    }


def encoder_config(name: str) -> dict[str, Any]:
    """visual_encoder/config.json, with the class name of before the release."""
    return {
        "architectures": ["PikaVidEncoder"],
        "dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": "clip_vision_model",
        "torch_dtype": "float32",
        "transformers_version": "4.42.4",
        **load_index("full_index")[name]["vision_config"],
    }


def projector_config(name: str) -> dict[str, Any]:
    """projector/config.json."""
    return {
        "architectures": ["ProjectorModel"],
        "auto_map": {"AutoModel": "modeling_projector.ProjectorModel"},
        "model_type": "projector",
        "torch_dtype": "float32",
        **load_index("full_index")[name]["projector_config"],
    }


def write_sharded(folder: Path, tensors: dict[str, Tensor], num_shards: int) -> None:
    """Split round robin, so that the index is needed."""
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        shard = {key: tensors[key] for key in sorted(tensors)[number::num_shards]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_xtuner(root: Path, name: str = "kv4", *, num_shards: int = 1) -> Path:
    """Write the directory `root` from the golden model kv2 or kv4; above one shard, LLM and encoder get an index."""
    parts = {
        "": (root_config(name), load_tensors(f"full_{name}_llm")),
        "visual_encoder": (encoder_config(name), load_tensors(f"full_{name}_visual_encoder")),
        "projector": (projector_config(name), load_tensors(f"full_{name}_projector")),
    }
    for folder, (config, tensors) in parts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "config.json").write_text(json.dumps(config))
        if num_shards > 1 and folder != "projector":
            write_sharded(root / folder, tensors, num_shards)
        else:
            save_file(tensors, root / folder / "model.safetensors", metadata={"format": "pt"})
    (root / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    return root


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; the value `...` removes one."""
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(path: Path, **changes: Any) -> None:
    """Change tensors of a safetensors file by name; the value `...` removes one."""
    content = {**load_file(path), **changes}
    save_file({key: value.clone() for key, value in content.items() if value is not ...}, path)
