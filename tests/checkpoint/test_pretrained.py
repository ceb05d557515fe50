"""Whole models from folders: the xtuner directory, round trips between layouts, dtypes, and strictness."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora.checkpoint import CheckpointError, load_model, load_pretrained, read_config, resolve_checkpoint, save_model
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.merge import MergeConfig
from aurora.model.vision import VisionConfig
from tests.checkpoint.xtuner_files import edit_json, edit_tensors, write_xtuner
from tests.golden import load_tensors
from tests.golden_models import captioner

POSITIONS = "vision_model.embeddings.position_embedding.weight"
ENCODER = "visual_encoder/model.safetensors"


def assert_same_weights(first: AuroraModel, second: AuroraModel) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", ["kv2", "kv4"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_xtuner_directory_loads_with_the_weights_it_was_made_from(tmp_path: Path, name: str, num_shards: int) -> None:
    loaded = load_pretrained(write_xtuner(tmp_path, name, num_shards=num_shards))
    assert loaded.layout == "xtuner"
    assert not loaded.model.training
    assert_same_weights(loaded.model, captioner(name))
    config = loaded.model.config
    assert config.feature_select_strategy == "default"
    assert (config.eos_token_id, config.pad_token_id, config.text.max_seq_len) == (-1, 0, 1024)


@pytest.mark.parametrize("case", ["alias", "twin", "damaged", "position_ids"])
def test_second_names_of_the_position_table_are_understood(tmp_path: Path, case: str) -> None:
    """Live state dicts hold `pos_emb` as well; a forward on another size overwrites the proper name (NOTES 10)."""
    table = load_tensors("full_kv4_visual_encoder")[POSITIONS]
    root = write_xtuner(tmp_path)
    changes: dict[str, dict[str, Any]] = {
        "alias": {"pos_emb": table, POSITIONS: ...},
        "twin": {"pos_emb": table + 1},
        "damaged": {"pos_emb": table, POSITIONS: torch.zeros(41, 48)},
        "position_ids": {"vision_model.embeddings.position_ids": torch.arange(26)[None]},
    }
    edit_tensors(root / ENCODER, **changes[case])
    assert_same_weights(load_model(root), captioner("kv4"))


@pytest.mark.parametrize("shard", ["5GB", 20_000])
def test_round_trip_between_layouts_is_bit_identical(tmp_path: Path, shard: int | str) -> None:
    model = load_model(write_xtuner(tmp_path / "first"))
    model.config.merge = MergeConfig(token_kept_ratio=0.2)
    save_model(model, tmp_path / "aurora", "aurora", max_shard_size=shard, image_aspect_ratio="pad")
    save_model(load_model(tmp_path / "aurora"), tmp_path / "second", "xtuner", max_shard_size=shard)
    again = load_pretrained(tmp_path / "second")
    assert again.layout == "xtuner"
    assert again.model.config == model.config
    assert_same_weights(again.model, model)
    assert load_pretrained(tmp_path / "aurora").image_aspect_ratio == "pad"
    if shard == "5GB":
        for part in ("", "visual_encoder/", "projector/"):
            first = load_file(tmp_path / f"first/{part}model.safetensors")
            second = load_file(tmp_path / f"second/{part}model.safetensors")
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)


def test_aurora_layout_has_the_authors_keys(tmp_path: Path) -> None:
    save_model(captioner("kv4"), tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert "vision_tower.vision_model.pre_layrnorm.weight" in keys
    assert "multi_modal_projector.linear_1.bias" in keys
    assert "language_model.model.embed_tokens.weight" in keys
    assert "language_model.lm_head.weight" in keys
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["AuroraForConditionalGeneration"]
    assert config["vision_feature_select_strategy"] == "default"
    assert config["torch_dtype"] == "float32"


def test_unused_tensors_of_older_aurora_files_are_ignored(tmp_path: Path) -> None:
    save_model(captioner("kv4"), tmp_path)
    edit_tensors(
        tmp_path / "model.safetensors",
        image_newline=torch.zeros(64),
        **{
            "vision_tower.vision_model.embeddings.position_ids": torch.arange(26)[None],
            "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        },
    )
    assert_same_weights(load_model(tmp_path), captioner("kv4"))


def test_tied_embeddings_need_no_head_and_pass_over_one(tmp_path: Path) -> None:
    config = AuroraConfig(
        vision=VisionConfig(hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, image_size=28),
        text=LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2,
            tie_word_embeddings=True,
        ),
    )  # fmt: skip
    model = AuroraModel(config)
    save_model(model, tmp_path, "xtuner")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_same_weights(load_model(tmp_path), model)
    edit_tensors(tmp_path / "model.safetensors", **{"lm_head.weight": torch.zeros(32, 16)})
    assert_same_weights(load_model(tmp_path), model)


@pytest.mark.parametrize(
    ("wish", "want"),
    [
        (None, torch.float32),
        ("auto", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float16, torch.float16),
        ("torch.bfloat16", torch.bfloat16),
    ],
)
def test_dtype_is_the_one_asked_for(tmp_path: Path, wish: Any, want: torch.dtype) -> None:
    model = captioner("kv4").to(torch.bfloat16)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, dtype=wish)
    assert {parameter.dtype for parameter in loaded.parameters()} == {want}
    assert torch.equal(loaded.language_model.norm.weight, model.language_model.norm.weight.to(want))


def test_auto_dtype_without_a_record_is_the_stored_one(tmp_path: Path) -> None:
    save_model(captioner("kv4").to(torch.float16), tmp_path)
    edit_json(tmp_path / "config.json", torch_dtype=...)
    assert load_model(tmp_path, dtype="auto").dtype == torch.float16
    with pytest.raises(ValueError, match="torch_dtype='int8': want auto or one of float32, float16, bfloat16"):
        load_model(tmp_path, dtype="int8")


def test_loaded_parameters_train_and_never_reach_the_file(tmp_path: Path) -> None:
    save_model(captioner("kv4"), tmp_path)
    model = load_model(tmp_path)
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    save_model(model, tmp_path)  # over the very file the tensors are mapped from
    assert torch.equal(load_model(tmp_path).projector.linear_1.bias, captioner("kv4").projector.linear_1.bias + 1.0)


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(tmp_path: Path) -> None:
    root = write_xtuner(tmp_path)
    edit_tensors(
        root / ENCODER,
        **{
            "vision_model.post_layernorm.bias": ...,
            "vision_model.extra": torch.zeros(3),
            POSITIONS: torch.zeros(2, 48),
        },
    )
    edit_tensors(root / "projector/model.safetensors", **{"model.2.bias": torch.zeros(64, dtype=torch.int8)})
    with pytest.raises(CheckpointError) as caught:
        load_model(root)
    lines = [line.split() for line in str(caught.value).splitlines()]
    assert str(caught.value).splitlines()[0] == f"{root}: 4 tensors of layout xtuner do not fit the config:"
    assert ["unexpected", ENCODER, "vision_model.extra", "got", "3"] in lines
    assert ["misshapen", ENCODER, POSITIONS, "got", "2x48,", "want", "26x48"] in lines
    assert ["missing", "visual_encoder", "vision_model.post_layernorm.bias", "want", "48"] in lines
    assert "wrong dtype  projector/model.safetensors" in str(caught.value)


def test_long_tables_are_cut(tmp_path: Path) -> None:
    root = write_xtuner(tmp_path)
    edit_json(root / "config.json", num_hidden_layers=9)
    with pytest.raises(CheckpointError, match=r"63 tensors of layout xtuner(.|\n)*\.\.\. and 43 more"):
        load_model(root)


def test_damaged_part_names_its_file(tmp_path: Path) -> None:
    root = write_xtuner(tmp_path)
    (root / "projector/config.json").write_text("not json")
    with pytest.raises(CheckpointError, match=r"projector/config\.json: not readable as JSON"):
        load_model(root)
    edit = json.dumps({"depth": 3})
    (root / "projector/config.json").write_text(edit)
    with pytest.raises(CheckpointError, match=r"projector/config\.json: depth=3: want 2"):
        load_model(root)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no known checkpoint layout; looked for aurora \(no config\.json\), xtuner"
    ):
        load_model(tmp_path)
    with pytest.raises(
        CheckpointError, match="nowhere: no such folder, want a checkpoint folder or a hub id owner/name"
    ):
        load_model(tmp_path / "nowhere")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: got a file, want the checkpoint folder"):
        load_model(tmp_path / "model.safetensors")
    torch.save({}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth: pickled weights are not read"):
        load_model(tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"no known checkpoint layout.*model\.pth is pickled"):
        load_model(tmp_path)


def test_only_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    hub = types.ModuleType("huggingface_hub")
    hub.__spec__ = types.SimpleNamespace(name="huggingface_hub")  # type: ignore[assignment]
    errors = types.ModuleType("huggingface_hub.errors")
    for name in ("HfHubHTTPError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        setattr(errors, name, type(name, (Exception,), {}))

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(repo_id)
        assert not any(".bin" in pattern or ".py" in pattern for pattern in allow_patterns)
        if repo_id == "owner/broken":
            raise errors.HfHubHTTPError("404 not found\nand much more")
        return str(tmp_path)

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("owner/model") == tmp_path
    with pytest.raises(CheckpointError, match=r"owner/broken: no such folder.*\(404 not found\)$"):
        resolve_checkpoint("owner/broken")
    (tmp_path / "runs").mkdir()
    for path in ("runs/missing", "./a/b", "/a/b", "model", "a/b/c"):
        with pytest.raises(CheckpointError, match="want a checkpoint folder or a hub id"):
            resolve_checkpoint(path)
    assert asked == ["owner/model", "owner/broken"]


def test_config_is_read_without_the_weights(tmp_path: Path) -> None:
    root = write_xtuner(tmp_path)
    (root / "model.safetensors").unlink()
    layout, config, _ = read_config(root)
    assert (layout.name, config.text.num_kv_heads) == ("xtuner", 4)


def test_saving_in_another_layout_over_a_checkpoint_leaves_only_the_new_one(tmp_path: Path) -> None:
    root = write_xtuner(tmp_path, num_shards=2)
    model = load_model(root)
    save_model(model, root, "aurora")
    loaded = load_pretrained(root)
    assert loaded.layout == "aurora"
    assert_same_weights(loaded.model, model)
    assert not list(root.glob("visual_encoder/*"))
    assert (root / "generation_config.json").exists()
    with pytest.raises(ValueError, match="layout='gguf': want one of aurora, xtuner"):
        save_model(model, root, "gguf")
