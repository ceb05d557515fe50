"""GGUF files (llama.cpp's format): metadata, tensors, and Llama-family models stored in them.

A file is a header, key-value metadata, a table of tensors, and their data, all little-endian. It is mapped into memory;
nothing in it is trusted: every length is checked against the file before anything is allocated.

llama.cpp rotates neighbouring channels and stores query and key rows in that order; ours rotate channel i with channel
i + D / 2, as Hugging Face's do, so those rows are put back.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from aurora.checkpoint.gguf_blocks import FORMATS, BlockFormat
from aurora.checkpoint.keys import KeyMap
from aurora.checkpoint.store import CheckpointError
from aurora.model.attention import BACKENDS
from aurora.model.llama import Llama, LlamaConfig, RopeScaling, rotary_frequencies

T = TypeVar("T")

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE = "llama"
"""Llama, Vicuna, Mistral and SmolLM files all call themselves so."""
# Value type in the file -> struct letter; 7 bool, 8 string and 9 array are read on their own.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DIMS = 4
_MAX_VALUES = 2**24
"""Of a metadata array; the largest vocabularies have a quarter of a million."""
_CHUNK = 2**22
"""Weights decoded at once, which bounds the extra memory."""
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_BOUNDS = {"integer": 2**31, "number": 1e12}
_WANTED = {"integer": "an integer in range", "number": "a number above 0", "text": "a text"}

LLAMA_GGUF = KeyMap(
    pairs=(
        ("token_embd.weight", "embed_tokens.weight"),
        ("output_norm.weight", "norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.{i}.attn_norm.weight", "layers.{i}.input_layernorm.weight"),
        ("blk.{i}.attn_q.weight", "layers.{i}.self_attn.q_proj.weight"),
        ("blk.{i}.attn_k.weight", "layers.{i}.self_attn.k_proj.weight"),
        ("blk.{i}.attn_v.weight", "layers.{i}.self_attn.v_proj.weight"),
        ("blk.{i}.attn_output.weight", "layers.{i}.self_attn.o_proj.weight"),
        ("blk.{i}.ffn_norm.weight", "layers.{i}.post_attention_layernorm.weight"),
        ("blk.{i}.ffn_gate.weight", "layers.{i}.mlp.gate_proj.weight"),
        ("blk.{i}.ffn_up.weight", "layers.{i}.mlp.up_proj.weight"),
        ("blk.{i}.ffn_down.weight", "layers.{i}.mlp.down_proj.weight"),
    ),
    # rope_freqs states the llama3 scaling, see `_scaling_from_table`; the second is a buffer of early files.
    ignored=("rope_freqs.weight", "blk.{i}.attn_rot_embd"),
)


class TensorInfo(NamedTuple):
    """Where a tensor lies in the file."""

    shape: tuple[int, ...]
    """Outermost dimension first, as in PyTorch."""
    format: BlockFormat
    start: int
    """Byte position in the file."""
    num_bytes: int


class _Cursor:
    """Reads one value after the other and refuses to run past the end."""

    def __init__(self, path: Path, data: np.memmap[Any, np.dtype[np.uint8]]) -> None:
        self.path = path
        self.data = data.data
        self.position = 0

    def take(self, size: int, field: str) -> memoryview:
        """Return the next `size` bytes, not copied."""
        end = self.position + size
        if end > len(self.data):
            raise CheckpointError(
                f"{self.path}: {field}: want {size} bytes at position {self.position}, the file has {len(self.data)}"
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, letter: str, field: str) -> Any:
        """Return one number of a struct letter."""
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter), field))[0]

    def text(self, field: str) -> str:
        """Return one string: its length, then UTF-8."""
        content = self.take(self.number("Q", field), field)
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {field}: not UTF-8 at byte {error.start}, want text") from None

    def value(self, kind: int, field: str) -> Any:
        """Return one metadata value; numeric arrays stay NumPy arrays."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], field)
        if kind == _BOOL:
            return bool(self.number("B", field))
        if kind == _STRING:
            return self.text(field)
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: {field}: got value type {kind}, want 0 to 12")
        item, count = self.number("I", field), self.number("Q", field)
        if count > _MAX_VALUES:
            raise CheckpointError(f"{self.path}: {field}: got {count} values, want at most {_MAX_VALUES}")
        if item == _STRING:
            return [self.text(f"{field}[{i}]") for i in range(count)]
        if item != _BOOL and item not in _NUMBERS:
            raise CheckpointError(f"{self.path}: {field}: got an array of value type {item}, want numbers or strings")
        dtype = np.dtype("<" + _NUMBERS.get(item, "?"))
        return np.frombuffer(self.take(count * dtype.itemsize, field).tobytes(), dtype)


class GGUFFile:
    """An open GGUF file; a context manager."""

    def __init__(self, path: str | Path) -> None:
        """Read the header, the metadata and the table of tensors.

        Args:
            path: The file.

        Raises:
            CheckpointError: if it is missing, truncated, corrupt, or of a version or tensor type this cannot read.
        """
        self.path = Path(path)
        try:
            self._data = np.memmap(self.path, dtype=np.uint8, mode="c")
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: no such file") from None
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise CheckpointError(f"{self.path}: cannot be read ({error}), want a GGUF file") from None
        cursor = _Cursor(self.path, self._data)
        magic = cursor.take(4, "magic").tobytes()
        if magic != MAGIC:
            raise CheckpointError(f"{self.path}: magic={magic!r}: want {MAGIC!r}, a GGUF file")
        version = cursor.number("I", "version")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path}: version={version}: want 2 or 3, little-endian")
        num_tensors, num_values = cursor.number("Q", "tensor_count"), cursor.number("Q", "kv_count")
        self.metadata: dict[str, Any] = {}
        """Key -> number, bool, text, list of texts, or NumPy array."""
        for n in range(num_values):
            key = cursor.text(f"metadata key {n}")
            if key in self.metadata:
                raise CheckpointError(f"{self.path}: {key}: stands twice in the metadata, want it once")
            self.metadata[key] = cursor.value(cursor.number("I", key), key)
        self._tensors = self._read_table(cursor, num_tensors)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Tensors that needed no decoding are parts of the map and keep it alive by themselves.
        del self._data

    def _read_table(self, cursor: _Cursor, num_tensors: int) -> dict[str, TensorInfo]:
        found: dict[str, tuple[tuple[int, ...], BlockFormat, int]] = {}
        for n in range(num_tensors):
            name = cursor.text(f"name of tensor {n}")
            if name in found:
                raise CheckpointError(f"{self.path}: {name}: stands twice in the table of tensors, want it once")
            num_dims = cursor.number("I", f"{name}: number of dimensions")
            if not 1 <= num_dims <= _MAX_DIMS:
                raise CheckpointError(f"{self.path}: {name}: got {num_dims} dimensions, want 1 to {_MAX_DIMS}")
            # The file lists the innermost dimension first.
            shape = tuple(cursor.number("Q", f"{name}: shape") for _ in range(num_dims))[::-1]
            kind, offset = cursor.number("I", f"{name}: type"), cursor.number("Q", f"{name}: offset")
            if kind not in FORMATS:
                names = ", ".join(form.name for form in FORMATS.values())
                raise CheckpointError(f"{self.path}: {name}: got tensor type {kind}, want one of {names}")
            if 0 in shape or shape[-1] % FORMATS[kind].num_weights:
                whole = FORMATS[kind].num_weights
                raise CheckpointError(f"{self.path}: {name}: got shape {shape}, want rows of whole blocks of {whole}")
            found[name] = (shape, FORMATS[kind], offset)
        alignment = self.integer("general.alignment", 32)
        if alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment={alignment}: want a power of two")
        start = -(-cursor.position // alignment) * alignment
        return self._place(found, start, alignment)

    def _place(
        self, found: dict[str, tuple[tuple[int, ...], BlockFormat, int]], start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """Check that every tensor lies inside the file and none on another."""
        tensors: dict[str, TensorInfo] = {}
        end = start
        for name, (shape, form, offset) in sorted(found.items(), key=lambda item: item[1][2]):
            num_bytes = math.prod(shape) // form.num_weights * form.num_bytes
            first = start + offset
            if offset % alignment or first < end:
                raise CheckpointError(f"{self.path}: {name}: got offset {offset}, want a free multiple of {alignment}")
            end = first + num_bytes
            if end > len(self._data):
                want = f"want {num_bytes} bytes at position {first}, the file has {len(self._data)}"
                raise CheckpointError(f"{self.path}: {name}: {want}")
            tensors[name] = TensorInfo(shape, form, first, num_bytes)
        if tensors and len(self._data) - end >= alignment:
            extra = f"{len(self._data) - end} bytes after the last tensor"
            raise CheckpointError(f"{self.path}: tensor_count={len(tensors)}: got {extra}, want none")
        return tensors

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape, format and place of a tensor.

        Raises:
            CheckpointError: if the file does not hold it.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: {name}: no such tensor")
        return self._tensors[name]

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode one tensor; where it is stored in `dtype` already, it stays a private map of the file.

        Args:
            name: Its name in the file.
            dtype: A floating dtype.

        Returns:
            The tensor, on the CPU.

        Raises:
            CheckpointError: if the file does not hold it.
        """
        info = self.info(name)
        raw = self._data[info.start : info.start + info.num_bytes]
        if _DTYPES.get(info.format.name) == dtype and info.start % dtype.itemsize == 0:
            return torch.from_numpy(raw).view(dtype).view(info.shape)
        blocks = np.asarray(raw).reshape(-1, info.format.num_bytes)
        step = _CHUNK // info.format.num_weights
        out = torch.empty(len(blocks), info.format.num_weights, dtype=dtype)
        for first in range(0, len(blocks), step):
            out[first : first + step] = torch.from_numpy(info.format.decode(blocks[first : first + step]))
        return out.view(info.shape)

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number of the metadata.

        Args:
            key: Its name.
            default: Where the key is absent; None demands it.
            least: The smallest value wanted.

        Raises:
            CheckpointError: if it is absent, no whole number, or out of range.
        """
        return self._typed(key, default, "integer", lambda v: type(v) is int and least <= v < _BOUNDS["integer"])

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number of the metadata; see `integer`."""
        return float(
            self._typed(key, default, "number", lambda v: type(v) in (int, float) and 0 < v < _BOUNDS["number"])
        )

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text of the metadata; see `integer`."""
        return self._typed(key, default, "text", lambda v: isinstance(v, str))

    def _typed(self, key: str, default: T | None, noun: str, fits: Callable[[Any], bool]) -> T:
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: {key}: not in the metadata, want it")
        if not fits(value):
            raise CheckpointError(f"{self.path}: {key}={_brief(value)}: want {_WANTED[noun]}")
        return value


def read_llama_config(file: GGUFFile) -> LlamaConfig:
    """Read the sizes of a Llama-family model.

    Args:
        file: Open file of `general.architecture` llama.

    Returns:
        The config; its sizes agree with the tensors in the file.

    Raises:
        CheckpointError: if a value is missing, contradicts a tensor, or asks for what `Llama` does not do.
    """
    architecture = file.text("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"{file.path}: general.architecture={architecture!r}: want {ARCHITECTURE}")
    sizes = {name: file.integer(f"llama.{name}") for name in ("embedding_length", "feed_forward_length", "block_count")}
    num_heads = file.integer("llama.attention.head_count")
    if num_heads > sizes["embedding_length"]:
        raise CheckpointError(f"{file.path}: llama.attention.head_count={num_heads}: want at most the width")
    # Sizes are compared with tensors, which the file must really hold, before a model of that size is built.
    layers = {int(found[1]) for name in file.names if (found := re.match(r"blk\.(\d{1,9})\.", name))}
    vocab_size, width = _matrix(file, "token_embd.weight")
    for key, got, want in (
        ("block_count", sizes["block_count"], len(layers)),
        ("embedding_length", sizes["embedding_length"], width),
        ("feed_forward_length", sizes["feed_forward_length"], _matrix(file, "blk.0.ffn_up.weight")[0]),
        ("vocab_size", file.integer("llama.vocab_size", vocab_size), vocab_size),
        ("attention.key_length", file.integer("llama.attention.key_length", width // num_heads), width // num_heads),
        ("rope.dimension_count", file.integer("llama.rope.dimension_count", width // num_heads), width // num_heads),
        ("expert_count", file.integer("llama.expert_count", 0, least=0), 0),
    ):
        if got != want:
            raise CheckpointError(f"{file.path}: llama.{key}={got}: want {want}, as the tensors say")
    theta = file.number("llama.rope.freq_base", 10000.0)
    context = file.integer("llama.context_length")
    scaling = _read_scaling(file)
    if scaling is not None and scaling.rope_type == "linear":
        # Files that state the unstretched context as well have the stretched one here already.
        stretched = "llama.rope.scaling.original_context_length" in file.metadata
        context = context if stretched else int(context * scaling.factor)
    try:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=sizes["feed_forward_length"],
            num_layers=sizes["block_count"],
            num_heads=num_heads,
            num_kv_heads=file.integer("llama.attention.head_count_kv", num_heads),
            norm_eps=file.number("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            rope_scaling=scaling,
            max_seq_len=context,
            tie_word_embeddings="output.weight" not in file.names,
        )
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    return _with_table_scaling(file, config) if "rope_freqs.weight" in file.names else config


def read_token_ids(file: GGUFFile) -> dict[str, int]:
    """Read the special tokens that a file names.

    Args:
        file: Open file.

    Returns:
        Ids by the field of `AuroraConfig`: bos_token_id, eos_token_id, pad_token_id; those named, and for padding the
        end-of-text id where no other is.

    Raises:
        CheckpointError: if an id is no whole number.
    """
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    keys = {f"tokenizer.ggml.{theirs}_token_id": ours for theirs, ours in names.items()}
    ids = {ours: file.integer(key, least=0) for key, ours in keys.items() if key in file.metadata}
    return {"pad_token_id": ids["eos_token_id"], **ids} if "eos_token_id" in ids else ids


def load_llama(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str = "auto",
) -> Llama:
    """Load a Llama-family language model from a GGUF file; quantised weights are decoded.

    Args:
        path: The `.gguf` file.
        dtype: float32, float16 or bfloat16, or its name; "auto" is bfloat16 for files of that type and else float16;
            None is float32.
        device: Where to put the weights.
        attn_implementation: auto, eager or sdpa.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: if the file cannot be read or does not hold exactly such a model.
        ValueError: for another dtype or attention backend.
    """
    if attn_implementation not in BACKENDS:
        raise ValueError(f"attn_implementation={attn_implementation!r}: want one of {', '.join(BACKENDS)}")
    with GGUFFile(path) as file:
        config = read_llama_config(file)
        target = _resolve_dtype(file, dtype)
        with torch.device("meta"):
            model = Llama(config, backend=attn_implementation)
        state: dict[str, Tensor] = {}
        for name, source in _match(file, model).items():
            tensor = file.load(source, target)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = restore_rotary_order(tensor, config.head_dim)
            state[name] = tensor.to(device)
    model.load_state_dict(state, assign=True)
    return model.eval()


def restore_rotary_order(weight: Tensor, head_dim: int) -> Tensor:
    """Put the rows of a query or key projection from llama.cpp's order back into ours.

    Args:
        weight: (heads * D, C); each head's rows are channels 0, D/2, 1, D/2 + 1, and so on.
        head_dim: D.

    Returns:
        The rows in ascending order, (heads * D, C).
    """
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def _matrix(file: GGUFFile, name: str) -> tuple[int, int]:
    shape = file.info(name).shape
    if len(shape) != 2:
        raise CheckpointError(f"{file.path}: {name}: got shape {shape}, want a matrix")
    return shape[0], shape[1]


def _match(file: GGUFFile, model: Llama) -> dict[str, str]:
    """Find the source of every tensor; refuse missing, unexpected and misshapen ones with a table."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = {key: LLAMA_GGUF.to_ours(key) for key in file.names if not LLAMA_GGUF.is_ignored(key)}
    rows = [f"unexpected  {key}  got {file.info(key).shape}" for key, name in ours.items() if name not in wanted]
    sources = {name: key for key, name in ours.items() if name in wanted}
    for name, shape in wanted.items():
        if name not in sources:
            rows.append(f"missing  {LLAMA_GGUF.to_foreign(name)}  want {shape}")
        elif (got := file.info(sources[name]).shape) != shape:
            rows.append(f"misshapen  {sources[name]}  got {got}, want {shape}")
    if rows:
        more = [f"... and {len(rows) - 20} more"] if len(rows) > 20 else []
        count = f"{len(rows)} tensor{'s' * (len(rows) != 1)}"
        raise CheckpointError("\n  ".join([f"{file.path}: {count} do not fit the metadata:", *rows[:20], *more]))
    return {str(name): key for name, key in sources.items()}


def _read_scaling(file: GGUFFile) -> RopeScaling | None:
    kind = file.text("llama.rope.scaling.type", "linear" if "llama.rope.scale_linear" in file.metadata else "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise CheckpointError(f"{file.path}: llama.rope.scaling.type={kind!r}: want none or linear")
    key = "llama.rope.scaling.factor" if "llama.rope.scaling.factor" in file.metadata else "llama.rope.scale_linear"
    factor = file.number(key, 1.0)
    return None if factor == 1.0 else RopeScaling(rope_type="linear", factor=factor)


def _with_table_scaling(file: GGUFFile, config: LlamaConfig) -> LlamaConfig:
    """Recognise llama3 scaling in `rope_freqs.weight`, which holds by how much each frequency is divided."""
    shape, want = file.info("rope_freqs.weight").shape, config.head_dim // 2
    if shape != (want,):
        raise CheckpointError(f"{file.path}: rope_freqs.weight: got shape {shape}, want ({want},)")
    table = file.load("rope_freqs.weight")
    plain = rotary_frequencies(config, table.device)
    factor = round(float(table.max()), 4) if bool(torch.isfinite(table).all()) else 0.0
    if factor > 0 and config.rope_scaling is None:
        config.rope_scaling = RopeScaling(rope_type="llama3", factor=factor)  # the other numbers are the same in all
        if torch.allclose(plain / table, rotary_frequencies(config, table.device), rtol=1e-3, atol=0.0):
            return config
    raise CheckpointError(f"{file.path}: rope_freqs.weight: not the table of Llama 3's scaling, want that one")


def _resolve_dtype(file: GGUFFile, dtype: torch.dtype | str | None) -> torch.dtype:
    names = {str(kind).removeprefix("torch."): kind for kind in _DTYPES.values()}
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return torch.bfloat16 if file.info("token_embd.weight").format.name == "BF16" else torch.float16
    name = str(dtype).removeprefix("torch.")
    if name not in names:
        raise ValueError(f"torch_dtype={dtype!r}: want auto or one of {', '.join(names)}")
    return names[name]


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
