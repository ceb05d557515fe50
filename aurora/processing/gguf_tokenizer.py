"""The tokenizer inside a GGUF file, as the file a checkpoint would hold: `tokenizer.model` or `tokenizer.json`.

`tokenizer.ggml.model` says which: "llama" is a sentencepiece vocabulary, put back into sentencepiece's own format;
"gpt2" is byte-level BPE, whose way of cutting text into words `tokenizer.ggml.pre` names.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aurora.checkpoint.gguf import GGUFFile
from aurora.checkpoint.store import CheckpointError, JsonDict
from aurora.processing.text import (
    CONFIG_FILES,
    JSON_FILE,
    SENTENCEPIECE_FILE,
    Tokenizer,
    parse_vocabulary,
)

# Role -> metadata key of its id.
_ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # token types, the same numbers in GGUF and in sentencepiece
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# How text is cut into words before merging, by `tokenizer.ggml.pre`.
_GPT2_NAMES = ("default", "gpt-2", "gpt2", "mpt", "olmo")
_DIGIT_NAMES = ("smollm", "starcoder", "refact", "codeshell")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
_BPE = 2  # sentencepiece's model type


def load_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a GGUF file.

    Args:
        path: The file.

    Returns:
        The tokenizer. It has no beginning-of-sequence token where the file says that none is put in front of a text;
        `save_pretrained` writes it as a checkpoint's files.

    Raises:
        ValueError: if the file holds no tokenizer, one of another kind, or a broken one.
    """
    with GGUFFile(path) as file:
        kind = file.text("tokenizer.ggml.model")
        tokens = _texts(file, "tokenizer.ggml.tokens")
        types = _numbers(file, "tokenizer.ggml.token_type", len(tokens), default=1)
        roles = {
            role: tokens[i] for role, key in _ROLES.items() if (i := _token_id(file, key, len(tokens))) is not None
        }
        if kind == "llama":
            prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
            scores = _numbers(file, "tokenizer.ggml.scores", len(tokens))
            name, content = SENTENCEPIECE_FILE, _sentencepiece_model(tokens, scores, types, roles, prefix=prefix)
        elif kind == "gpt2":
            name, content = JSON_FILE, json.dumps(_bpe_json(file, tokens, types)).encode()
        else:
            raise CheckpointError(f"{file.path}: tokenizer.ggml.model={kind!r}: want llama or gpt2")
        if not file.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
            roles.pop("bos_token", None)
        config = {CONFIG_FILES[0]: json.dumps(roles, ensure_ascii=False, indent=2).encode() + b"\n"}
        source = f"{file.path}: tokenizer.ggml.tokens"
        return Tokenizer(
            parse_vocabulary(name, content, source=source),
            config=roles,
            files={name: content, **config},
            source=source,
        )


def _texts(file: GGUFFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or not value:
        raise CheckpointError(f"{file.path}: {key}: got {type(value).__name__}, want a list of texts")
    return value


def _numbers(file: GGUFFile, key: str, count: int, *, default: int | None = None) -> list[Any]:
    value = file.metadata.get(key)
    if value is None and default is not None:
        return [default] * count
    if not isinstance(value, np.ndarray) or len(value) != count:
        got = f"{len(value)} values" if isinstance(value, np.ndarray) else type(value).__name__
        raise CheckpointError(f"{file.path}: {key}: got {got}, want {count} numbers, one a token")
    numbers = value.tolist()
    if not all(map(math.isfinite, numbers)):
        raise CheckpointError(f"{file.path}: {key}: not all finite, want numbers")
    return numbers


def _token_id(file: GGUFFile, key: str, count: int) -> int | None:
    if key not in file.metadata:
        return None
    token_id = file.integer(key, least=0)
    if token_id >= count:
        raise CheckpointError(f"{file.path}: {key}={token_id}: want at most {count - 1}")
    return token_id


def _bpe_json(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> JsonDict:
    """Content of tokenizer.json for a byte-level BPE vocabulary."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        double = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens: {double!r} stands twice, want every token once")
    merges = [merge.split(" ") for merge in _texts(file, "tokenizer.ggml.merges")]
    for n, parts in enumerate(merges):
        if len(parts) != 2 or not {*parts, "".join(parts)} <= vocabulary.keys():
            key = f"tokenizer.ggml.merges[{n}]"
            raise CheckpointError(f"{file.path}: {key}={' '.join(parts)!r}: want two tokens that make a third")
    pre = file.text("tokenizer.ggml.pre", "default")
    if pre in _LLAMA3_NAMES:
        words: list[JsonDict] = [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_WORDS}, "behavior": "Isolated", "invert": False},
            {**_BYTE_LEVEL, "use_regex": False},
        ]
    elif pre in _DIGIT_NAMES:
        words = [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]
    elif pre in _GPT2_NAMES:
        words = [_BYTE_LEVEL]
    else:
        known = ", ".join(_GPT2_NAMES + _DIGIT_NAMES + _LLAMA3_NAMES)
        raise CheckpointError(f"{file.path}: tokenizer.ggml.pre={pre!r}: want one of {known}")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": tokens[i], **plain, "special": kind == _CONTROL}
        for i, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": pre in _LLAMA3_NAMES},
    }


def _sentencepiece_model(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], roles: dict[str, str], *, prefix: bool
) -> bytes:
    """Content of tokenizer.model: a ModelProto of pieces, trainer settings and normaliser settings."""
    pieces = b"".join(
        _block(1, _block(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _integer(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    # Ids are found by the pieces' texts; the numbers are only what training was told.
    named = {"unk_token": 45, "bos_token": 46, "eos_token": 47, "pad_token": 48}
    trainer = _integer(3, _BPE) + _integer(4, len(tokens)) + _integer(35, _BYTE in types)
    trainer += b"".join(_block(number, roles[role].encode()) for role, number in named.items() if role in roles)
    normaliser = _block(1, b"identity") + _integer(3, prefix) + _integer(4, False) + _integer(5, True)
    return pieces + _block(2, trainer) + _block(3, normaliser)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _integer(number: int, value: int) -> bytes:
    """Write one whole-number field of a protocol buffer; negative values have 64 bits."""
    return _varint(number << 3) + _varint(int(value) % 2**64)


def _block(number: int, content: bytes) -> bytes:
    """Write one text or message field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content
