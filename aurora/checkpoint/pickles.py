"""Pickled weights (`.bin`, `.pth`), for conversion only: `from_pretrained` refuses them.

They are read with `weights_only=True`, which unpickles tensors and plain containers and nothing else.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aurora.checkpoint.store import CheckpointError, read_json

PICKLE_SUFFIXES = (".bin", ".pth", ".pt")
_WRAPPERS = ("state_dict", "module", "model")
_UNPICKLE_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, IndexError,
    AttributeError, zipfile.BadZipFile,
)  # fmt: skip


class PickleFiles:
    """The tensors of pickled weight files in one folder, by name; one file is open at a time."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        """Read which tensors each file holds.

        Args:
            folder: Folder of the weights.
            files: The files, in order.

        Raises:
            CheckpointError: if a file is not a pickle of tensors alone, or two hold the same name.
        """
        self.folder = folder
        self._open: tuple[Path, Mapping[str, Tensor]] | None = None
        self._file_of: dict[str, Path] = {}
        self._about: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for file in files:
            for key, tensor in self._load(file).items():
                if key in self._file_of:
                    raise CheckpointError(f"{file}: {key} is in {self._file_of[key].name} as well")
                self._file_of[key] = file
                self._about[key] = (tuple(tensor.shape), tensor.dtype)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def file_of(self, key: str) -> Path:
        """Path of the file that holds `key`."""
        return self._file_of[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of `key`."""
        return self._about[key][0]

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of `key`."""
        return self._about[key][1]

    def read(self, key: str) -> Tensor:
        """The tensor, mapped from its file where the format allows it."""
        return self._load(self._file_of[key])[key]

    def _load(self, file: Path) -> Mapping[str, Tensor]:
        if self._open is not None and self._open[0] == file:
            return self._open[1]
        self._open = None
        try:
            # The format from before 2020 is no zip archive and cannot be mapped.
            content: Any = torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
        except _UNPICKLE_ERRORS as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{file}: not a pickle of tensors alone ({reason})") from error
        while isinstance(content, dict) and (inner := [key for key in _WRAPPERS if isinstance(content.get(key), dict)]):
            content = content[inner[0]]
        if not isinstance(content, dict) or not content:
            raise CheckpointError(f"{file}: got a pickled {type(content).__name__}, want tensors by name")
        for key, value in content.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{file}: {key!r} is a {type(value).__name__}, want tensors by name")
        tensors = {str(key): value for key, value in content.items()}
        self._open = (file, tensors)
        return tensors


class PrefixedFiles:
    """The tensors below a prefix in files that hold several parts, without the prefix."""

    def __init__(self, files: PickleFiles, prefix: str) -> None:
        """Look at `files` through the prefix, such as "llm."."""
        self._files = files
        self._prefix = prefix

    @property
    def names(self) -> list[str]:
        """Names of the tensors below the prefix, sorted."""
        return [key.removeprefix(self._prefix) for key in self._files.names if key.startswith(self._prefix)]

    def file_of(self, key: str) -> Path:
        """Path of the file that holds `key`."""
        return self._files.file_of(self._prefix + key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of `key`."""
        return self._files.shape(self._prefix + key)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of `key`."""
        return self._files.dtype(self._prefix + key)

    def read(self, key: str) -> Tensor:
        """The tensor."""
        return self._files.read(self._prefix + key)


def split_training_state(files: PickleFiles) -> dict[str, PrefixedFiles] | None:
    """Split a training state of xtuner, which holds all three parts.

    Args:
        files: The pickled weights at the root of a checkpoint in the `xtuner` layout.

    Returns:
        Folder of a part -> its tensors; None where the names are not those of a training state.

    Raises:
        CheckpointError: if it holds something besides the three parts.
    """
    prefixes = {"": "llm.", "visual_encoder": "visual_encoder.", "projector": "projector."}
    others = [key for key in files.names if not key.startswith(tuple(prefixes.values()))]
    if len(others) == len(files.names):
        return None
    if others:
        want = ", ".join(prefixes.values())
        raise CheckpointError(f"{files.file_of(others[0])}: {others[0]} is none of {want} ({len(others)} such)")
    return {folder: PrefixedFiles(files, prefix) for folder, prefix in prefixes.items()}


def find_pickles(folder: Path, stem: str = "model") -> list[Path]:
    """Pickled weight files of a folder: those an index names, else the one there is.

    Args:
        folder: Folder of the weights.
        stem: "model" for `pytorch_model.bin`, "open_clip_model" for `open_clip_pytorch_model.bin`.

    Returns:
        The files, none where there are no pickles.

    Raises:
        CheckpointError: if an index is broken, or several files compete.
    """
    name = f"{stem.removesuffix('model')}pytorch_model.bin"
    index = folder / f"{name}.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and Path(file).name == file and file.endswith(PICKLE_SUFFIXES)
            for file in weight_map.values()
        ):
            raise CheckpointError(f"{index}: weight_map: want tensor name -> name of a .bin file beside it")
        return [folder / file for file in sorted(set(weight_map.values()))]
    if (folder / name).is_file():
        return [folder / name]
    files = sorted(file for file in folder.glob("*") if file.suffix in PICKLE_SUFFIXES and file.is_file())
    # Training leaves these beside the weights.
    files = [file for file in files if not file.name.startswith(("training_args", "optimizer", "scheduler", "rng_"))]
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: got {', '.join(file.name for file in files)}, want one of them or {index.name}"
        )
    return files
