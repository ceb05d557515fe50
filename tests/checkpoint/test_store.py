"""Weight files: laziness, shards, refusals that name file and key, and saving that is all or nothing."""

import errno
import json
import multiprocessing
import os
import resource
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora.checkpoint.lazy import LazyTensor, lazy, split_shards, write_lazy
from aurora.checkpoint.store import (
    CheckpointError,
    WeightFiles,
    atomic_folder,
    finish_interrupted_save,
    parse_size,
    read_json,
    write_json,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16), "n": torch.arange(3)}


def described(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: lazy(tensor, file=Path("memory"), key=name) for name, tensor in tensors.items()}


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], *, max_shard_size: int | str) -> None:
    write_lazy(folder, described(tensors), max_shard_size=max_shard_size)


def save(folder: Path, value: float, *, shard: int | str = "5GB") -> None:
    with atomic_folder(folder, owned=[""]) as stage:
        write_json(stage / "config.json", {"value": value})
        write_weights(stage, {"a": torch.full((4,), value), "b": torch.full((4,), value)}, max_shard_size=shard)


def contents(folder: Path) -> tuple[float, float, list[str]]:
    finish_interrupted_save(folder)
    with WeightFiles(folder) as weights:
        loaded = float(weights.load("a")[0])
    return read_json(folder / "config.json")["value"], loaded, sorted(path.name for path in folder.iterdir())


def test_tensors_are_described_from_the_header_and_cast_one_by_one(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, max_shard_size="5GB")
    with WeightFiles(tmp_path) as weights:
        assert weights.names == ["a", "b", "n"]
        assert weights.shape("a") == (2, 3)
        assert weights.dtype("b") == torch.float16
        assert weights.load("a", dtype=torch.bfloat16).dtype == torch.bfloat16
        assert weights.load("n", dtype=torch.bfloat16).dtype == torch.int64  # counts stay counts
        assert torch.equal(weights.load("a"), TENSORS["a"])


def test_writing_into_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, max_shard_size="5GB")
    with WeightFiles(tmp_path) as weights:
        weights.load("a").add_(1)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], TENSORS["a"])


def test_shards_hold_everything_once_and_at_most_their_size(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(7)}  # 100 bytes each
    assert split_shards(described(tensors), 250) == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"], ["t6"]]
    assert split_shards(described(tensors), 1) == [[name] for name in tensors]
    write_weights(tmp_path, tensors, max_shard_size=250)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 700
    assert index["weight_map"]["t6"] == "model-00004-of-00004.safetensors"
    with WeightFiles(tmp_path) as weights:
        assert all(torch.equal(weights.load(name), tensor) for name, tensor in tensors.items())


def test_sizes_read_as_written() -> None:
    assert [parse_size(size) for size in (7, "5GB", "1.5 MiB", "10kb")] == [7, 5 * 10**9, 3 * 2**19, 10_000]
    for wrong in ("5 parsec", "", 0, -3):
        with pytest.raises(ValueError, match="max_shard_size="):
            parse_size(wrong)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "step_100.pth", "weights.pt"])
def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path, name: str) -> None:
    torch.save(TENSORS, tmp_path / name)
    with pytest.raises(CheckpointError, match="pickled weights are not read") as caught:
        WeightFiles(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    program, script, *settings = shlex.split(str(caught.value).partition("convert with: ")[2])
    assert (program, script) == ("python", "scripts/convert.py")
    assert settings == [f"model_path={tmp_path}", f"output={tmp_path}-safetensors"]


def test_index_of_pickles_is_refused_too(tmp_path: Path) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}})
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "header"])
def test_damaged_weights_name_their_file(tmp_path: Path, damage: str) -> None:
    write_weights(tmp_path, TENSORS, max_shard_size="5GB")
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-5], "empty": b"", "text": b"hello", "header": b"\xff" * 8 + data[8:]}[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "got a JSON list, want an object"),
        ('{"weight_map": {}}', "weight_map={}: want an object"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "want the name of a .safetensors file beside it"),
        ('{"weight_map": {"a": 3}}', "weight_map.a=3"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors: no such file"),
        ('{"weight_map": {"zzz": "model.safetensors"}}', r"model\.safetensors: zzz is not in it"),
    ],
)
def test_damaged_index_names_file_and_key(tmp_path: Path, index: str, message: str) -> None:
    write_weights(tmp_path, TENSORS, max_shard_size="5GB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        WeightFiles(tmp_path)


def test_folder_without_weights_says_what_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights, want model\.safetensors or"):
        WeightFiles(tmp_path)
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    with WeightFiles(tmp_path) as weights:  # a lone file may have any name
        assert weights.names == ["a"]
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"got one\.safetensors, two\.safetensors"):
        WeightFiles(tmp_path)


def test_saving_again_leaves_nothing_stale_and_nothing_foreign_behind(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("kept")
    save(tmp_path, 1.0, shard=16)
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert contents(tmp_path) == (1.0, 1.0, [*names, "model.safetensors.index.json", "tokenizer.model"])
    save(tmp_path, 2.0)
    assert contents(tmp_path) == (2.0, 2.0, ["config.json", "model.safetensors", "tokenizer.model"])


def test_failure_while_writing_leaves_the_old_files(tmp_path: Path) -> None:
    save(tmp_path, 1.0)

    def fill_the_disk() -> None:
        with atomic_folder(tmp_path, owned=[""]) as stage:
            (stage / "config.json").write_text("{")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match=r"No space left.*the earlier files are untouched"):
        fill_the_disk()
    assert contents(tmp_path) == (1.0, 1.0, ["config.json", "model.safetensors"])
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "new"):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    save(tmp_path, 1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with (
            pytest.raises(CheckpointError, match=r"model\.safetensors: cannot write"),
            atomic_folder(tmp_path, owned=[""]) as stage,
        ):
            write_weights(stage, {"a": torch.zeros(100_000)}, max_shard_size="5GB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(tmp_path) == (1.0, 1.0, ["config.json", "model.safetensors"])


def test_save_killed_after_the_commit_is_finished_by_the_next_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1.0, shard=16)
    real, moved = Path.replace, []

    def dies_after_the_first(self: Path, target: Path) -> Path:
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2.0)
    assert (tmp_path / ".commit").is_dir()
    assert contents(tmp_path) == (2.0, 2.0, ["config.json", "model.safetensors"])


def save_for_ever(folder: Path) -> None:
    value = 2.0
    while True:
        save(folder, value, shard=16 if value % 2 else "5GB")
        value += 1


def test_killed_saver_always_leaves_one_whole_checkpoint(tmp_path: Path) -> None:
    values = set()
    for round_ in range(20):
        save(tmp_path, 1.0)
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        time.sleep(0.03 + 0.0037 * round_)
        process.kill()
        process.join()
        value, loaded, _ = contents(tmp_path)
        assert value == loaded
        values.add(value)
        save(tmp_path, 1.0)
        assert contents(tmp_path)[2] == ["config.json", "model.safetensors"]  # no stage folder is left either
    assert len(values) > 1  # the saver did get somewhere


def test_saving_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="taken: got a file, want a folder"):
        save(tmp_path / "taken", 1.0)


def test_a_written_file_is_what_the_library_writes(tmp_path: Path) -> None:
    """Odd sizes and mixed dtypes: every tensor is aligned, whatever stands before it."""
    tensors = TENSORS | {
        "odd": torch.arange(3, dtype=torch.uint8), "bool": torch.tensor([True, False]), "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4), "half": torch.arange(5).to(torch.bfloat16), "double": torch.rand(3).double(),
        "turned": torch.arange(6.0).view(2, 3).T, "\u00e9": torch.ones(1),
    }  # fmt: skip
    write_weights(tmp_path, tensors, max_shard_size="5GB")
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    header_size = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "model.safetensors").read_bytes()[8 : 8 + header_size])
    for name, tensor in tensors.items():
        assert (8 + header_size + header[name]["data_offsets"][0]) % tensor.element_size() == 0, name


def test_a_tensor_that_is_not_what_was_announced_is_not_written(tmp_path: Path) -> None:
    wrong = LazyTensor(shape=(3,), dtype=torch.float32, read=lambda: torch.zeros(4), file=tmp_path / "x", key="w")
    with pytest.raises(CheckpointError, match=r"x: w is torch.float32 \(4,\), its header said torch.float32 \(3,\)"):
        write_lazy(tmp_path, {"w": wrong}, max_shard_size="5GB")
