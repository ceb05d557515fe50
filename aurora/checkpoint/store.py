"""Weight files: safetensors, single or sharded, read lazily and written atomically.

Reading maps the file into memory and hands out one tensor at a time, so a 7B model needs no second copy of itself.
Writing stages every file in `.saving-*` inside the target folder, makes it durable, renames that folder to
`.commit` and only then moves the files into place. A full disk or a kill before the rename leaves the earlier
checkpoint untouched; a kill after it is finished by the next reader or writer (`finish_interrupted_save`).
Pickled weights are refused: unpickling one runs whatever code it holds.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

JsonDict = dict[str, Any]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_SIZE = "5GB"
_SHARD_PATTERN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pth", ".pt")
_COMMIT_FOLDER = ".commit"
_STAGE_PREFIX = ".saving-"
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file, what was found and what was wanted."""


def read_json(path: Path) -> JsonDict:
    """Read one JSON object.

    Args:
        path: File to read.

    Returns:
        The parsed object.

    Raises:
        CheckpointError: if the file is missing, is not JSON, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number too long
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a JSON {type(content).__name__}, want an object")
    return content


def refuse_pickle(path: Path, root: Path | None = None) -> CheckpointError:
    """Build the error for a pickled weight file; it holds the command that converts it.

    Args:
        path: The `.bin`, `.pth` or `.pt` file.
        root: Checkpoint it belongs to; by default its folder.

    Returns:
        The error, for the caller to raise.
    """
    source = (root or path.parent).absolute()
    target = source.with_name(f"{source.name}-safetensors")
    settings = shlex.join((f"model_path={source.as_posix()}", f"output={target.as_posix()}"))
    return CheckpointError(
        f"{path}: pickled weights are not read, want safetensors; convert with: python scripts/convert.py {settings}"
    )


class WeightFiles:
    """The tensors of one folder, by name, loaded one at a time. A context manager: it holds the files open."""

    def __init__(self, folder: Path, *, stem: str = "model") -> None:
        """Open `model.safetensors`, the shards of `model.safetensors.index.json`, or a lone `*.safetensors`.

        Args:
            folder: Folder that holds the weights.
            stem: What stands before `.safetensors` in place of `model`.

        Raises:
            CheckpointError: if there are none, only pickles, or a file is missing, truncated or corrupt.
        """
        self.folder = folder
        self._single_file, self._index_file = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        with ExitStack() as stack:
            for name, keys in self._list_files().items():
                self._open(stack, name, keys)
            self._stack = stack.pop_all()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _list_files(self) -> dict[str, set[str] | None]:
        """File name -> keys the index puts there, None where no index speaks."""
        if (self.folder / self._index_file).is_file():
            return _read_index(self.folder / self._index_file)
        if (self.folder / self._single_file).is_file():
            return {self._single_file: None}
        names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if len(names) == 1:
            return {names[0]: None}
        if names:
            raise CheckpointError(
                f"{self.folder}: got {', '.join(names)}, want {self._index_file} to say what is where"
            )
        pickles = sorted(path for path in self.folder.glob("*") if path.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise refuse_pickle(pickles[0])
        raise CheckpointError(f"{self.folder}: no weights, want {self._single_file} or {self._index_file}")

    def _open(self, stack: ExitStack, name: str, expected: set[str] | None) -> None:
        path = self.folder / name
        try:
            handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file, but {self._index_file} names it") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error
        keys = set(handle.keys())
        if expected is not None and not expected <= keys:
            missing = sorted(expected - keys)
            raise CheckpointError(
                f"{path}: {missing[0]} is not in it ({len(missing)} such), but {self._index_file} says so"
            )
        self._handles[name] = handle
        for key in keys if expected is None else expected:
            self._file_of[key] = name

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def file_of(self, key: str) -> Path:
        """Path of the file that holds `key`."""
        return self.folder / self._file_of[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of `key`, from the header alone."""
        return tuple(self._handles[self._file_of[key]].get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of `key`, from the header alone.

        Raises:
            CheckpointError: if the stored dtype is none that this version computes with.
        """
        stored = self._handles[self._file_of[key]].get_slice(key).get_dtype()
        if stored not in _DTYPES:
            raise CheckpointError(f"{self.file_of(key)}: {key} is {stored}, want one of {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def load(self, key: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Load one tensor; without a cast or a move it stays a private map of the file.

        Args:
            key: Name of the tensor.
            dtype: Cast floating tensors to this, None keeps the stored one.
            device: Where to put it.

        Returns:
            The tensor.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        try:
            tensor: Tensor = self._handles[self._file_of[key]].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.file_of(key)}: cannot read {key} ({error})") from error
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=device, dtype=target)

    def read(self, key: str) -> Tensor:
        """Load one tensor through a map of its own: what was read leaves the memory together with it.

        Args:
            key: Name of the tensor.

        Returns:
            The tensor, on the CPU.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        try:
            with safe_open(self.file_of(key), framework="pt", device="cpu") as handle:
                return handle.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.file_of(key)}: cannot read {key} ({error})") from error


def _read_index(path: Path) -> dict[str, set[str] | None]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map={weight_map!r}: want an object of tensor name -> file name")
    files: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        if isinstance(name, str) and name.endswith(_PICKLE_SUFFIXES):
            raise refuse_pickle(path.parent / name)
        # A name with a folder in it could reach outside the checkpoint.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: weight_map.{key}={name!r}: want the name of a .safetensors file beside it")
        files.setdefault(name, set()).add(key)
    return dict(files)


def parse_size(size: int | str) -> int:
    """Read a size such as `"5GB"`, `"512MiB"` or a plain number of bytes.

    Args:
        size: Bytes, or a number with one of KB MB GB KiB MiB GiB.

    Returns:
        Bytes.

    Raises:
        ValueError: if it is neither, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)?", str(size).strip())
    unit = match[2].upper() if match and match[2] else ""
    if match is None or (unit and unit not in _SIZE_UNITS) or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size={size!r}: want bytes > 0 or a text such as 5GB, 512MiB")
    return int(float(match[1]) * _SIZE_UNITS.get(unit, 1))


def write_json(path: Path, content: JsonDict) -> None:
    """Write one JSON object, indented, keys in the given order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(target: Path, *, owned: Iterable[str] = ()) -> Iterator[Path]:
    """Write a set of files into `target` so that they appear all together or not at all.

    Args:
        target: Folder to fill; made when missing. Files in it that are neither written nor owned stay.
        owned: Folders, relative to the target, whose older weight files and config.json are replaced as a whole:
            what is not written anew is removed, so that no stale shard stays behind.

    Yields:
        An empty folder on the same disk; write the files, with sub-folders, there.

    Raises:
        CheckpointError: if the disk refuses; the earlier files are untouched then.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: got a file, want a folder to save into")
    existed = target.exists()
    stage: Path | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        finish_interrupted_save(target)
        for leftover in target.glob(f"{_STAGE_PREFIX}*"):
            shutil.rmtree(leftover)
        stage = Path(tempfile.mkdtemp(prefix=_STAGE_PREFIX, dir=target))
        yield stage
        written = {path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()}
        stale = sorted(_stale_files(target, owned) - written)
        write_json(stage / "commit.json", {"remove": stale})
        _make_durable(stage)
        stage.rename(target / _COMMIT_FOLDER)
        sync(target)
        finish_interrupted_save(target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot save ({error}); the earlier files are untouched") from error
    finally:
        if stage is not None and stage.exists():
            shutil.rmtree(stage)
        if not existed and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def finish_interrupted_save(target: Path) -> None:
    """Move the files of a committed save into place; does nothing where there is none.

    Args:
        target: Checkpoint folder.

    Raises:
        CheckpointError: if an interrupted save cannot be finished, for example on a read-only disk.
    """
    commit = target / _COMMIT_FOLDER
    if not commit.is_dir():
        return
    try:
        # Without its list the folder holds nothing any more: the kill came while it was being removed.
        listed = (commit / "commit.json").is_file()
        remove = read_json(commit / "commit.json").get("remove", []) if listed else []
        for path in sorted(commit.rglob("*")):
            if path.is_file() and path != commit / "commit.json":
                place = target / path.relative_to(commit)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
        for name in remove:
            (target / name).unlink(missing_ok=True)
        sync(target)
        shutil.rmtree(commit)
    except OSError as error:
        raise CheckpointError(f"{commit}: an interrupted save could not be finished ({error})") from error


def _stale_files(target: Path, owned: Iterable[str]) -> set[str]:
    """Weight files and config.json in the owned folders, relative to the target."""
    found: set[str] = set()
    for folder in owned:
        for path in (target / folder).glob("*"):
            ours = path.name in ("config.json", SINGLE_FILE, INDEX_FILE) or _SHARD_PATTERN.fullmatch(path.name)
            if ours and path.is_file():
                found.add(path.relative_to(target).as_posix())
    return found


def _make_durable(stage: Path) -> None:
    mode = (stage / "commit.json").stat().st_mode & 0o777
    for path in stage.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors makes its files private to the user
        sync(path)
    sync(stage)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
