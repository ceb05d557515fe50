"""Conversion between layouts: bit-identical there and back, strict and atomic."""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora.checkpoint.convert import convert
from aurora.checkpoint.layouts import ALL_LAYOUTS, LAYOUTS
from aurora.checkpoint.pretrained import (
    load_language_model,
    load_model,
    load_pretrained,
    load_vision_tower,
    read_config,
    save_model,
)
from aurora.checkpoint.reading import open_checkpoint
from aurora.checkpoint.store import CheckpointError
from aurora.cli import run
from aurora.conversion import main
from tests.checkpoint.tiny_models import CLIP_TOWER, SIGLIP_TOWER, TEXT, tiny_config, tiny_model

WHOLE = list(LAYOUTS)
TOWERS = ["clip", "open_clip", "timm"]
SIGLIP_TOWERS = ["siglip", "timm"]


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Durability is tested in test_store.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def stored(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint holds, under our names, in the stored dtypes."""
    with open_checkpoint(folder) as found:
        return {name: tensor.read().clone() for name, tensor in found.tensors.items()}


def raw(folder: Path) -> dict[str, Tensor]:
    """Every tensor in every file below a folder, by path and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{key}": t for file in files for key, t in load_file(file).items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], prefix: str = "") -> None:
    want = {name: tensor for name, tensor in want.items() if name.startswith(prefix)}
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same captioner saved in each layout; below "siglip." with a SigLIP tower."""
    root = tmp_path_factory.mktemp("originals")
    folders = {}
    for prefix, tower in (("", CLIP_TOWER), ("siglip.", SIGLIP_TOWER)):
        model = tiny_model(tiny_config(tower))
        for layout in LAYOUTS:
            folders[prefix + layout] = root / (prefix + layout)
            save_model(model, folders[prefix + layout], layout)
    return folders


@pytest.mark.parametrize("there", WHOLE)
@pytest.mark.parametrize("here", WHOLE)
@pytest.mark.parametrize("tower", ["", "siglip."])
def test_there_and_back_is_bit_identical(
    originals: dict[str, Path], tmp_path: Path, here: str, there: str, tower: str
) -> None:
    start = originals[tower + here]
    done = convert(start, tmp_path / "there", layout=there, max_shard_size="2KB")
    assert (done.source, done.target, done.left_out) == (here, there, [])
    assert_same(stored(tmp_path / "there"), stored(start))
    convert(tmp_path / "there", tmp_path / "back", layout=here)
    assert_same(raw(tmp_path / "back"), raw(start))
    assert read_config(tmp_path / "back")[1] == read_config(start)[1]


@pytest.mark.parametrize("there", TOWERS)
@pytest.mark.parametrize("here", [*WHOLE, *TOWERS])
def test_a_tower_goes_there_and_back(originals: dict[str, Path], tmp_path: Path, here: str, there: str) -> None:
    tower_there_and_back(originals["aurora"], tmp_path, here, there)


@pytest.mark.parametrize("there", SIGLIP_TOWERS)
@pytest.mark.parametrize("here", [*WHOLE, *SIGLIP_TOWERS])
def test_a_siglip_tower_goes_there_and_back(originals: dict[str, Path], tmp_path: Path, here: str, there: str) -> None:
    tower_there_and_back(originals["siglip.aurora"], tmp_path, here, there)


def tower_there_and_back(original: Path, tmp_path: Path, here: str, there: str) -> None:
    """A -> B -> A, where a whole A gets back its tower and takes the rest from elsewhere."""
    start = tmp_path / "start"
    convert(original, start, layout=here)
    want = stored(original)
    convert(start, tmp_path / "there", layout=there, max_shard_size="1KB")
    assert_same(stored(tmp_path / "there"), want, "vision_tower.")
    if here in LAYOUTS:
        convert(original, tmp_path / "words", layout="llama")
        done = convert(tmp_path / "words", tmp_path / "back", layout=here, vision_path=tmp_path / "there")
        assert done.new_projector
        got = stored(tmp_path / "back")
        for part in ("vision_tower.", "language_model."):
            assert_same({name: tensor for name, tensor in got.items() if name.startswith(part)}, want, part)
    else:
        convert(tmp_path / "there", tmp_path / "back", layout=here)
        assert_same(raw(tmp_path / "back"), raw(start))
    assert read_config(tmp_path / "back")[1].vision == read_config(original)[1].vision


def test_a_language_model_alone_goes_through_every_whole_layout(originals: dict[str, Path], tmp_path: Path) -> None:
    convert(originals["aurora"], tmp_path / "llama", layout="llama")
    convert(originals["aurora"], tmp_path / "clip", layout="clip")
    for layout in WHOLE:
        convert(tmp_path / "llama", tmp_path / layout, layout=layout, vision_path=tmp_path / "clip")
        done = convert(tmp_path / layout, tmp_path / f"{layout}.back", layout="llama")
        assert len(done.left_out) == len(stored(tmp_path / "clip")) + 4
        assert_same(raw(tmp_path / f"{layout}.back"), raw(tmp_path / "llama"))


def test_rows_added_to_the_vocabulary_are_the_mean_recorded_and_dropped(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    start = originals["aurora"]
    done = convert(start, tmp_path / "llava", layout="llava_hf")
    config = json.loads((tmp_path / "llava/config.json").read_text())
    assert done.rows_added == 58
    assert config["text_config"]["vocab_size"] == 128
    assert (config["image_token_index"], config["text_config"]["pad_token_id"], config["image_seq_length"]) == (
        70,
        71,
        9,
    )
    assert config["aurora_added_rows"]["rows"] == 58
    file = load_file(tmp_path / "llava/model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        before, after = stored(start)[name.replace("model.embed", "embed")], file[name]
        assert torch.equal(after[:70], before)
        assert torch.equal(after[70:], before.double().mean(dim=0).to(before.dtype).expand(58, -1))
    # A checkpoint of others, whose placeholder is a token: its vocabulary stays as it is, on every way.
    foreign = tmp_path / "foreign"
    convert(start, foreign, layout="llava_hf")
    del config["aurora_added_rows"]
    (foreign / "config.json").write_text(json.dumps(config))
    convert(foreign, tmp_path / "aurora", layout="aurora")
    assert read_config(tmp_path / "aurora")[1].text.vocab_size == 128
    assert read_config(tmp_path / "aurora")[1].image_token_index == 70
    assert convert(tmp_path / "aurora", tmp_path / "again", layout="llava_hf").rows_added == 0
    assert_same(raw(tmp_path / "again"), raw(foreign))


def test_tied_embeddings_stay_tied_in_every_layout(tmp_path: Path) -> None:
    config = tiny_config(text=dataclasses.replace(TEXT, tie_word_embeddings=True))
    save_model(tiny_model(config), tmp_path / "aurora", "aurora")
    for layout in WHOLE:
        convert(tmp_path / "aurora", tmp_path / f"to_{layout}", layout=layout)
        assert not any("lm_head" in key for key in raw(tmp_path / f"to_{layout}"))
        convert(tmp_path / f"to_{layout}", tmp_path / f"from_{layout}", layout="aurora")
        assert_same(raw(tmp_path / f"from_{layout}"), raw(tmp_path / "aurora"))


def test_dtype_is_changed_on_request_alone(originals: dict[str, Path], tmp_path: Path) -> None:
    convert(originals["xtuner"], tmp_path / "half", layout="aurora", dtype=torch.bfloat16)
    want = stored(originals["xtuner"])
    for name, tensor in stored(tmp_path / "half").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, want[name].to(torch.bfloat16))
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("layout", WHOLE)
def test_every_whole_layout_loads_into_the_same_model(originals: dict[str, Path], layout: str) -> None:
    loaded = load_pretrained(originals[layout])
    assert loaded.layout == layout
    want = load_model(originals["aurora"])
    ids, pixels = (
        torch.tensor([[1, 5, -200, 9]]),
        torch.randn(1, 1, 3, 12, 12, generator=torch.Generator().manual_seed(0)),
    )
    if layout == "llava_hf":
        assert loaded.model.config.image_token_index == -200
    got = loaded.model(ids, pixel_values=pixels)
    assert torch.equal(got.logits, want(ids, pixel_values=pixels).logits)


def test_parts_load_from_whole_checkpoints_and_alone(originals: dict[str, Path], tmp_path: Path) -> None:
    want = stored(originals["aurora"])
    for layout in TOWERS:
        convert(originals["aurora"], tmp_path / layout, layout=layout)
    for folder in (*(tmp_path / layout for layout in TOWERS), originals["xtuner"], originals["llava"]):
        state = load_vision_tower(folder, dtype="float32").state_dict()
        assert_same(
            {f"vision_tower.{key}": t for key, t in state.items()},
            {k: t.float() for k, t in want.items()},
            "vision_tower.",
        )
    convert(originals["aurora"], tmp_path / "llama", layout="llama")
    for folder in (tmp_path / "llama", originals["llava_hf"]):
        state = load_language_model(folder, dtype="float32").state_dict()
        assert_same(
            {f"language_model.{key}": t for key, t in state.items()},
            {k: t.float() for k, t in want.items()},
            "language_model.",
        )
    with pytest.raises(CheckpointError, match="layout clip holds no language_model"):
        load_language_model(tmp_path / "clip")
    with pytest.raises(
        CheckpointError, match=r"holds a vision_tower alone \(layout timm\), want a whole captioner.*convert"
    ):
        load_model(tmp_path / "timm")


@pytest.mark.parametrize("layout", list(ALL_LAYOUTS))
def test_missing_misshapen_and_unknown_tensors_are_refused_with_a_table(
    originals: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    convert(originals["siglip.aurora" if layout == "siglip" else "aurora"], tmp_path / "good", layout=layout)
    file = next((tmp_path / "good").glob("*.safetensors"))
    tensors = load_file(file)
    names = sorted(tensors)
    broken = {key: tensor.clone() for key, tensor in tensors.items() if key != names[0]}
    broken[names[1]] = torch.zeros(5, 7)
    broken["vision_tower.blocks.0.surprise" if layout != "open_clip" else "visual.surprise"] = torch.zeros(3)
    broken[names[2]] = torch.zeros(tensors[names[2]].shape, dtype=torch.int32)
    save_file(broken, file)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "good", tmp_path / "out", layout=layout)
    lines = str(caught.value).splitlines()
    assert "of layout " in lines[0] or "want one of" in lines[0]
    problems = {line.split()[0]: line for line in lines[1:]}
    assert {"unexpected", "missing", "misshapen"} <= problems.keys()
    assert "surprise" in problems["unexpected"]
    assert "got 5x7, want" in problems["misshapen"]
    assert "wrong" in problems
    assert not (tmp_path / "out").exists()


def test_a_fused_tensor_that_does_not_split_and_one_stored_twice_are_refused(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    convert(originals["aurora"], tmp_path / "timm", layout="timm")
    file = tmp_path / "timm/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"blocks.1.attn.qkv.weight": torch.zeros(25, 8)}, file)
    with pytest.raises(
        CheckpointError, match=r"misshapen +model.safetensors +blocks.1.attn.qkv.weight +got 25x8, want 8x8"
    ):
        load_vision_tower(tmp_path / "timm")
    twice = tmp_path / "twice"
    convert(originals["aurora"], twice, layout="llava_hf")
    tensors = load_file(twice / "model.safetensors")
    tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"].clone()
    save_file(tensors, twice / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"twice +model.safetensors +model.language_model.norm.weight|twice +model"
    ):
        load_model(twice)


def test_what_cannot_be_converted_is_said_in_one_line(originals: dict[str, Path], tmp_path: Path) -> None:
    start = originals["aurora"]
    for layout in ("clip", "llama", "siglip"):
        convert(originals["siglip.aurora" if layout == "siglip" else "aurora"], tmp_path / layout, layout=layout)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model_path": start, "layout": "safetensors"}, "layout='safetensors': want one of aurora, xtuner"),
        (
            {"model_path": tmp_path / "clip", "layout": "aurora"},
            "wants a projector, language model, which is not there",
        ),
        (
            {"model_path": tmp_path / "llama", "layout": "aurora"},
            "wants a vision tower, projector, .*give vision_path=",
        ),
        (
            {"model_path": start, "layout": "aurora", "vision_path": tmp_path / "llama"},
            "layout llama holds no vision tower",
        ),
        ({"model_path": start, "layout": "siglip"}, "this tower is of kind clip_vision_model, want siglip"),
        ({"model_path": tmp_path / "siglip", "layout": "open_clip"}, "want a CLIP tower; .*use layout=timm"),
        ({"model_path": start, "layout": "xtuner", "max_shard_size": "lots"}, "max_shard_size='lots'"),
        ({"model_path": tmp_path / "nowhere", "layout": "xtuner"}, "nowhere: no such folder"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            convert(output=tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists(), message
    with pytest.raises(CheckpointError, match="is the checkpoint that is read"):
        convert(start, start, layout="xtuner")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty, want a new folder or overwrite=true"):
        convert(start, tmp_path / "full", layout="xtuner")
    convert(start, tmp_path / "full", layout="xtuner", overwrite=True)
    assert (tmp_path / "full/notes.txt").read_text() == "mine"


def test_a_source_is_left_as_it_was(originals: dict[str, Path], tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in originals["xtuner"].rglob("*") if file.is_file()}
    convert(originals["xtuner"], tmp_path / "out", layout="llava")
    assert {file: file.read_bytes() for file in originals["xtuner"].rglob("*") if file.is_file()} == before


def test_a_failure_halfway_leaves_nothing(originals: dict[str, Path], tmp_path: Path) -> None:
    count = 0

    def stop(num_bytes: int) -> None:
        nonlocal count
        count += 1
        if count == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(originals["aurora"], tmp_path / "out", layout="xtuner", on_written=stop)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", WHOLE)
def test_pickled_weights_are_read_here_alone(originals: dict[str, Path], tmp_path: Path, layout: str) -> None:
    source = tmp_path / "pickled"
    convert(originals["aurora"], source, layout=layout)
    for file in source.rglob("*.safetensors"):
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    with pytest.raises(CheckpointError, match="pickled weights are not read") as caught:
        load_model(source)
    # The command in the message is the one that helps.
    _, _, *settings = shlex.split(str(caught.value).partition("convert with: ")[2])
    run(main, settings)
    assert_same(raw(tmp_path / "pickled-safetensors"), raw(originals["aurora"]))


def test_a_training_state_of_xtuner_holds_all_parts_in_one_file(originals: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "run"
    convert(originals["aurora"], source, layout="xtuner")
    prefixes = {"": "llm.", "visual_encoder": "visual_encoder.", "projector": "projector."}
    state = {}
    for folder, prefix in prefixes.items():
        file = source / folder / "model.safetensors"
        state |= {prefix + key: tensor for key, tensor in load_file(file).items()}
        file.unlink()
    torch.save({"state_dict": state}, source / "epoch_1.pth")
    assert convert(source, tmp_path / "out", layout="aurora").left_out == []
    assert_same(raw(tmp_path / "out"), raw(originals["aurora"]))
    torch.save({"state_dict": state | {"optimizer.step": torch.zeros(1)}}, source / "epoch_1.pth")
    with pytest.raises(
        CheckpointError, match=r"epoch_1\.pth: optimizer\.step is none of llm\., visual_encoder\., projector"
    ):
        convert(source, tmp_path / "other", layout="aurora")


class Trap:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return exec, ("raise SystemExit('ran')",)


def test_a_pickle_that_is_more_than_tensors_is_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "pickled"
    convert(originals["aurora"], source, layout="aurora")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save({"state_dict": {"a": Trap()}}, source / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth: not a pickle of tensors alone"):
        convert(source, tmp_path / "out", layout="xtuner")
    (source / "model.pth").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.pth: not a pickle of tensors alone"):
        convert(source, tmp_path / "out", layout="xtuner")
    torch.save({"state_dict": {"step": 3}}, source / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth: 'step' is a int, want tensors by name"):
        convert(source, tmp_path / "out", layout="xtuner")
    # Sharded, below "state_dict", one of them in the format from before 2020.
    (source / "model.pth").unlink()
    names = sorted(tensors)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, keys in parts.items():
        torch.save(
            {"state_dict": {key: tensors[key] for key in keys}}, source / file,
            _use_new_zipfile_serialization=file == "a.bin",
        )  # fmt: skip
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(source, tmp_path / "out", layout="aurora")
    assert_same(raw(tmp_path / "out"), raw(originals["aurora"]))


def test_the_command_line(originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out, with [brackets]"
    run(
        main,
        [
            f"model_path={originals['xtuner']}",
            f"output={out}",
            "layout=llava_hf",
            "dtype=float16",
            "max_shard_size=4KB",
        ],
    )
    text = capsys.readouterr().out
    assert re.match(rf"{re.escape(str(out))}: \d+ tensors, 0\.00 GB, xtuner to llava_hf\nadded 58 rows", text)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    assert {tensor.dtype for tensor in raw(out).values()} == {torch.float16}
    for settings, message in (
        (["output=x"], "model_path: no value given"),
        ([f"model_path={tmp_path}", "output=x", "layout=lava"], "layout='lava': want one of aurora, xtuner"),
        ([f"model_path={tmp_path}", "output=x", "dtype=int8"], "dtype=int8: want one of keep, float32"),
        ([f"model_path={tmp_path / 'none'}", "output=x"], "no such folder"),
        ([f"model_path={originals['aurora']}", f"output={out}"], "is not empty, want a new folder or overwrite=true"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(main, settings)
        captured = capsys.readouterr()
        assert caught.value.code == 2
        assert captured.err.count("\n") == 1
        assert message in captured.err
