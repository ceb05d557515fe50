"""Tensors that are described now and read later, and the writer that takes them one at a time.

Converting a checkpoint builds a table of these, no matter how large it is, and then holds one tensor in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from aurora.checkpoint.store import INDEX_FILE, CheckpointError, JsonDict, parse_size, write_json

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """Shape and dtype of a tensor, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Reads the tensor; it may be a view of a file, and must not be written into."""
    file: Path
    """File it comes from, for messages."""
    key: str
    """Name in that file, for messages."""
    view: Callable[[], Tensor] | None = None
    """Maps the tensor from a file that stays open, where there is one; `read` leaves nothing mapped behind."""

    def mapped(self) -> Tensor:
        """The tensor for keeps: a private map of its file where there is one."""
        return self.read() if self.view is None else self.view()

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def cast(self, dtype: torch.dtype | None) -> LazyTensor:
        """The tensor in another floating dtype; None, and a tensor that is not floating, stay as they are."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, view=None, read=lambda: self.read().to(dtype))

    def reshape(self, shape: tuple[int, ...]) -> LazyTensor:
        """The same numbers in another shape."""
        if shape == self.shape:
            return self
        return replace(
            self, shape=shape, read=lambda: self.read().reshape(shape), view=lambda: self.mapped().reshape(shape)
        )

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Rows `start` to `stop` of the first dimension."""
        if (start, stop) == (0, self.shape[0]):
            return self
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            read=lambda: self.read()[start:stop],
            view=lambda: self.mapped()[start:stop],
        )

    def with_mean_rows(self, count: int) -> LazyTensor:
        """The matrix with `count` rows added, each the mean of all.

        A mean row of the output head scores the mean of all logits, so greedy ids stay what they are.
        """
        if count == 0:
            return self

        def read() -> Tensor:
            table = self.read()
            # In float64 and by slices: a float32 copy of a large vocabulary is half a gigabyte.
            total = sum((part.double().sum(dim=0, keepdim=True) for part in table.split(4096)), torch.zeros(()))
            mean = (total / table.shape[0]).to(table.dtype)
            return torch.cat([table, mean.expand(count, -1)])

        return replace(self, shape=(self.shape[0] + count, *self.shape[1:]), read=read, view=None)


def lazy(tensor: Tensor, *, file: Path, key: str) -> LazyTensor:
    """Describe a tensor that is in memory."""
    return LazyTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor, file=file, key=key)


def stack(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Put tensors on each other along their first dimension.

    Raises:
        CheckpointError: if they differ in dtype or in the other dimensions.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
            got = " and ".join(f"{p.key} {p.dtype} {p.shape}" for p in (first, part))
            raise CheckpointError(f"{part.file}: cannot fuse {got}; want the same dtype and width")
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return replace(first, shape=shape, read=lambda: torch.cat([part.read() for part in parts]), view=None)


def split_shards(tensors: Mapping[str, LazyTensor], max_shard_size: int | str) -> list[list[str]]:
    """Group tensor names, in order, so that each group fits in `max_shard_size` (a larger tensor stands alone).

    Args:
        tensors: Name -> tensor.
        max_shard_size: Bytes, or a text such as `"5GB"`.

    Returns:
        One list of names per shard, at least one.
    """
    limit = parse_size(max_shard_size)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.num_bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.num_bytes
    return shards


def write_lazy(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    max_shard_size: int | str,
    stem: str = "model",
    on_written: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write tensors as one safetensors file, or as shards with an index, into a (staging) folder.

    Args:
        folder: Existing folder.
        tensors: Name -> tensor; each is read when its turn comes and let go of.
        max_shard_size: Bytes, or a text such as `"5GB"`.
        stem: File name without its suffix.
        on_written: Called with the bytes of each tensor once it is written.

    Raises:
        CheckpointError: if the disk refuses, or a tensor is not what was announced.
    """
    shards = split_shards(tensors, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names}, on_written)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        index = INDEX_FILE.replace("model", stem, 1)
        write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(path: Path, tensors: Mapping[str, LazyTensor], on_written: Callable[[int], None]) -> None:
    """One safetensors file: length of the header, header, then the tensors, widest dtype first so that all align.

    The first begins at a multiple of 64 bytes, and with the widths of real models so does every other: kernels want
    that of a weight that is mapped from the file.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: JsonDict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.num_bytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % 64)
    try:
        with path.open("wb") as out:
            out.write(len(text).to_bytes(8, "little"))
            out.write(text)
            for name in order:
                _write_tensor(out.write, tensors[name])
                on_written(tensors[name].num_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write ({error})") from error


def _write_tensor(write: Callable[[memoryview], object], tensor: LazyTensor) -> None:
    content = tensor.read()
    if tuple(content.shape) != tensor.shape or content.dtype != tensor.dtype:
        got, want = f"{content.dtype} {tuple(content.shape)}", f"{tensor.dtype} {tensor.shape}"
        raise CheckpointError(f"{tensor.file}: {tensor.key} is {got}, its header said {want}")
    write(content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def total_bytes(tensors: Iterable[LazyTensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.num_bytes for tensor in tensors)
