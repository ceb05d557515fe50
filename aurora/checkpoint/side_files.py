"""The files beside the weights (tokenizer, processors, generation settings), which a conversion takes along.

LLaVA as Hugging Face stores it has `<image>` and `<pad>` as tokens: they are added to the tokenizer, and taken out
again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aurora.checkpoint.keys import Layout
from aurora.checkpoint.llava import ADDED_TOKENS
from aurora.checkpoint.store import CheckpointError, JsonDict, read_json, write_json
from aurora.checkpoint.timm import OPENAI_MEAN, OPENAI_STD
from aurora.model.captioner import AuroraConfig

TEXT_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "processor_config.json",
)
PREPROCESSOR = "preprocessor_config.json"
_ASPECT_OF = {"squash": "squash", "longest": "pad", "border": "pad"}


def copy_text_files(source: Path, target: Path) -> list[str]:
    """Copy what a language model has beside its weights.

    Args:
        source: Folder of the language model.
        target: Existing folder.

    Returns:
        Names of the files copied.
    """
    names = [name for name in TEXT_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def write_preprocessor(source: Path, configs: Mapping[str, JsonDict], target: Path, config: AuroraConfig) -> bool:
    """Copy preprocessor_config.json, or make one from what timm and open_clip say about preprocessing.

    Args:
        source: Folder of the checkpoint the tower comes from.
        configs: Its parsed config files.
        target: Existing folder.
        config: The model.

    Returns:
        Whether there is one now.
    """
    for file in (source / PREPROCESSOR, source / "visual_encoder" / PREPROCESSOR):
        if file.is_file():
            shutil.copyfile(file, target / PREPROCESSOR)
            return True
    recipe = configs.get("open_clip_config.json", {}).get("preprocess_cfg")
    mode = recipe.get("resize_mode") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict):
        recipe = configs.get("", {}).get("pretrained_cfg")
        mode = recipe.get("crop_mode") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict):
        return False
    write_json(target / PREPROCESSOR, _preprocessor(recipe, _ASPECT_OF.get(str(mode), "crop"), config))
    return True


def add_tokens(folder: Path, config: AuroraConfig, target: Layout) -> None:
    """Tell the tokenizer in `folder` about the tokens that an export puts behind the vocabulary.

    The processor keeps its placeholder: read here, the model has its own again, and other readers go by the token.
    """
    if not target.rows_to_add(config):
        return
    first = config.text.vocab_size
    ids = {token: first + number for number, token in enumerate(ADDED_TOKENS)}
    entries = {str(number): _token(token) for token, number in ids.items()}
    if (folder / "tokenizer.json").is_file():
        content = _editable(folder / "tokenizer.json", "added_tokens", list)
        content["added_tokens"] += [{"id": ids[token], **_token(token)} for token in ADDED_TOKENS]
        write_json(folder / "tokenizer.json", content)
    if (folder / "tokenizer.model").is_file():
        content = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
        write_json(folder / "added_tokens.json", content | ids)
    if (folder / "tokenizer_config.json").is_file():
        content = _editable(folder / "tokenizer_config.json", "added_tokens_decoder", dict)
        content["added_tokens_decoder"] |= entries
        write_json(folder / "tokenizer_config.json", content)


def remove_tokens(folder: Path, config: AuroraConfig) -> None:
    """Undo `add_tokens` for a model whose added vocabulary rows were dropped.

    Args:
        folder: Folder with the copied files.
        config: The model, without the added rows.
    """
    first = config.text.vocab_size
    if (folder / "tokenizer.json").is_file():
        content = _editable(folder / "tokenizer.json", "added_tokens", list)
        content["added_tokens"] = [entry for entry in content["added_tokens"] if _id_of(entry) < first]
        write_json(folder / "tokenizer.json", content)
    if (folder / "added_tokens.json").is_file():
        content = read_json(folder / "added_tokens.json")
        kept = {token: number for token, number in content.items() if token not in ADDED_TOKENS}
        write_json(folder / "added_tokens.json", kept)
        if not kept:
            (folder / "added_tokens.json").unlink()
    if (folder / "tokenizer_config.json").is_file():
        content = read_json(folder / "tokenizer_config.json")
        entries = content.get("added_tokens_decoder")
        if isinstance(entries, dict):
            entries = {
                number: entry for number, entry in entries.items() if not number.isdigit() or int(number) < first
            }
            content["added_tokens_decoder"] = entries
            if not entries:
                del content["added_tokens_decoder"]
        write_json(folder / "tokenizer_config.json", content)
    if (folder / "processor_config.json").is_file():
        content = read_json(folder / "processor_config.json")
        if "image_token_index" in content:
            content["image_token_index"] = config.image_token_index
        write_json(folder / "processor_config.json", content)


def _token(text: str) -> JsonDict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": text, **flags}


def _id_of(entry: Any) -> int:
    number = entry.get("id") if isinstance(entry, dict) else None
    return number if isinstance(number, int) else -1


def _editable(path: Path, key: str, kind: type) -> JsonDict:
    content = read_json(path)
    value = content.setdefault(key, kind())
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: {key} is a {type(value).__name__}, want a {kind.__name__}")
    return content


def _preprocessor(recipe: JsonDict, aspect: str, config: AuroraConfig) -> JsonDict:
    """Fields of CLIPImageProcessor, with `image_aspect_ratio`."""
    side = config.vision.image_size
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "image_aspect_ratio": aspect,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if aspect == "crop" else square,
        "resample": 3,
        "do_center_crop": aspect == "crop",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(recipe.get("mean") or OPENAI_MEAN),
        "image_std": list(recipe.get("std") or OPENAI_STD),
    }
