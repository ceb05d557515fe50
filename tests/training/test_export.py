"""What a run leaves: train, export to each layout, load, train on; adapters folded in, averaged weights taken."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora.checkpoint.layouts import LAYOUTS
from aurora.checkpoint.pretrained import load_model, load_pretrained, read_config
from aurora.checkpoint.store import CheckpointError
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor
from aurora.training.build import load_stage
from aurora.training.config import TrainConfig
from aurora.training.export import export_model
from aurora.training.lora import LoraConfig
from aurora.training.run import export_conversations, train
from aurora.training.state import latest_checkpoint, load_weights
from tests.checkpoint.test_lora import write_adapter
from tests.training.captioners import recipe_of, run_alone, small_model

ADAPTED = ["language_model.layers.*_proj", "vision_tower.blocks.*.attn.*_proj"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, dtype="float32").state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start, data, and a run of two steps with adapters and averaged weights."""
    folder = tmp_path_factory.mktemp("export")
    run_alone(config_in(folder), "language")
    return folder


def config_in(folder: Path, **changes: object) -> TrainConfig:
    lora = LoraConfig(rank=2, targets=ADAPTED)
    return recipe_of(folder, "language", **{"lora": lora, "ema_decay": 0.5, "num_steps": 2, **changes})


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_run_is_exported_loaded_and_trained_on(folder: Path, tmp_path: Path, layout: str) -> None:
    config = replace(config_in(folder), export_dir=str(tmp_path / "export"), export_layout=layout, export_only=True)
    (tmp_path / ".exporting-export").mkdir()  # what a kill in an earlier export left
    train(config)
    exported = tmp_path / "export"
    assert read_config(exported)[0].name == layout
    want = {name: tensor.half().float() for name, tensor in load_stage(config, "language").model.state_dict().items()}
    got = weights_of(exported)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert load_pretrained(exported).image_aspect_ratio == "pad"
    assert layout == "aurora" or not list(tmp_path.glob(".*")), "nothing half-done is left"
    caption_with(exported, folder / "start")
    again = replace(config_in(folder, lora=None), model_path=str(exported), run_dir=str(tmp_path / "run"))
    run_alone(again, "language")
    trained = load_stage(again, "language").model.state_dict()
    assert not torch.equal(trained["projector.linear_1.weight"], got["projector.linear_1.weight"])
    curve = [json.loads(line) for line in (tmp_path / "run/language/curve.jsonl").read_text().splitlines()]
    assert [record["step"] for record in curve if "loss" in record] == [1, 2]
    assert (exported / "curve.jsonl").read_text().count("\n") >= 2


def caption_with(folder: Path, start: Path) -> None:
    """Describe a frame: the tokenizer, the prompt and the pixels are all there."""
    ids, pixels = [], []
    for place in (start, folder):
        processor = AuroraProcessor.from_pretrained(place)
        image = (
            torch.arange(3 * 28 * 28).to(torch.uint8).view(3, 28, 28)
        )  # square: it is trained on pad, inferred by crop
        inputs = processor(images=image, text=processor.build_prompt("What moves?", 1))
        ids.append([None if i == processor.image_token_index else i for i in inputs["input_ids"][0].tolist()])
        pixels.append(inputs["pixel_values"])
    assert ids[0] == ids[1]
    assert torch.equal(pixels[0], pixels[1])
    model = AuroraForConditionalGeneration.from_pretrained(folder)
    assert model.generate(**inputs, max_new_tokens=2, eos_token_id=-1).shape == (1, 2)


def test_what_is_exported_is_the_averaged_merged_model(folder: Path) -> None:
    """Spelt out from the tensors on disk: W + alpha / rank * B @ A, of the averages where one is kept."""
    config = config_in(folder)
    saved = latest_checkpoint(Path(config.run_dir) / "language")
    latest, averaged = load_weights(saved), load_weights(saved, averaged=True)
    name = "language_model.layers.0.self_attn.q_proj"
    assert not torch.equal(latest[f"{name}.lora_B.weight"], averaged[f"{name}.lora_B.weight"])
    change = averaged[f"{name}.lora_B.weight"] @ averaged[f"{name}.lora_A.weight"]
    want = averaged[f"{name}.weight"] + 32.0 / 2 * change
    got = load_stage(config, "language").model.state_dict()
    assert torch.equal(got[f"{name}.weight"], want)
    assert torch.equal(got["projector.linear_1.bias"], averaged["projector.linear_1.bias"])
    assert not [key for key in got if "lora" in key]


def test_training_goes_on_from_xtuner_with_pos_emb_and_adapters(folder: Path, tmp_path: Path) -> None:
    """As xtuner leaves a run: a second position table, and adapters beside their base."""
    start = tmp_path / "start"
    config = replace(config_in(folder), export_dir=str(start), export_layout="xtuner", export_only=True)
    export_conversations(config)
    before = weights_of(start)
    encoder = start / "visual_encoder/model.safetensors"
    tensors = load_file(encoder)
    # The published weights hold a table for another image size under the first name, and the trained one as pos_emb.
    tensors["pos_emb"] = tensors["vision_model.embeddings.position_embedding.weight"] + 1.0
    tensors["vision_model.embeddings.position_embedding.weight"] = torch.zeros(3, 16, dtype=torch.float16)
    save_file(tensors, encoder, metadata={"format": "pt"})
    write_adapter(start / "llm_adapter", {"model.layers.1.mlp.up_proj": (32, 24)}, seed=1)
    again = replace(
        config_in(folder, trainable=["projector."], lora=None), model_path=str(start), run_dir=str(tmp_path / "run")
    )
    run_alone(again, "language")
    trained = load_stage(again, "language").model.state_dict()
    factors = load_file(start / "llm_adapter/adapter_model.safetensors")
    a, b = (factors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{which}.weight"] for which in "AB")
    name = "language_model.layers.1.mlp.up_proj.weight"
    assert (trained[name] - (before[name] + 12 / 3 * b @ a)).abs().max() < 0.01 * (b @ a).abs().max()
    torch.testing.assert_close(
        trained["vision_tower.pos_embed"], before["vision_tower.pos_embed"] + 1.0, atol=2e-3, rtol=0
    )
    assert not torch.equal(trained["projector.linear_1.weight"], before["projector.linear_1.weight"])


def test_a_weight_too_large_for_float16_is_written_in_bfloat16(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.projector.linear_1.bias[0] = 1e6
    processor = AuroraProcessor.from_pretrained("aurora/assets/aurora-tiny")
    export_model(model, processor, tmp_path, image_aspect_ratio="pad")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    with torch.no_grad():
        model.projector.linear_1.bias[0] = float("nan")
    with pytest.raises(ValueError, match=re.escape("projector.linear_1.bias: holds NaN or infinity (1 such tensors)")):
        export_model(model, processor, tmp_path / "other", image_aspect_ratio="pad")
    assert not (tmp_path / "other").exists()


def test_an_export_that_fails_leaves_the_earlier_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config_in(folder), export_dir=str(tmp_path / "out"), export_layout="xtuner", export_only=True)
    train(config)
    before = weights_of(tmp_path / "out")

    def refuse(*args: object, **settings: object) -> None:
        raise CheckpointError("no space left")

    monkeypatch.setattr("aurora.checkpoint.convert.write_checkpoint", refuse)
    with pytest.raises(CheckpointError, match="no space left"):
        train(config)
    after = weights_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_without_a_checkpoint_is_not_exported(folder: Path, tmp_path: Path) -> None:
    config = replace(
        config_in(folder), run_dir=str(tmp_path / "none"), export_dir=str(tmp_path / "out"), export_only=True
    )
    with pytest.raises(ValueError, match="no checkpoint of language; want a trained stage"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_layouts_of_a_part_are_no_export(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout='clip': want one of aurora, xtuner"):
        train(replace(config_in(folder), export_dir=str(tmp_path / "out"), export_layout="clip"))
    assert not (tmp_path / "out").exists()
