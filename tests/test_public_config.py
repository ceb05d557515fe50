"""`aurora.AuroraConfig` with the authors' names: mappings, files, defaults, and what a loaded model carries."""

import dataclasses
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import aurora
from aurora.checkpoint import CheckpointError, read_config
from aurora.model.captioner import AuroraConfig as ModelConfig
from aurora.model.captioner import AuroraModel
from aurora.model.merge import MergeConfig
from aurora.model.projector import ProjectorConfig
from aurora.model.vision import Activation, VisionConfig
from aurora.processing.image import ImageConfig
from aurora.training.config import TrainConfig
from tests.checkpoint.tiny_models import CLIP_TOWER, SIGLIP_TOWER, tiny_config
from tests.checkpoint.xtuner_files import write_xtuner
from tests.golden_models import captioner

GELU_TANH = Activation.gelu_tanh
# As the authors' branch writes it, bookkeeping included.
AUTHORS: dict[str, Any] = {
    "architectures": ["AuroraForConditionalGeneration"],
    "model_type": "aurora",
    "transformers_version": "4.46.0.dev0",
    "torch_dtype": "float16",
    "ignore_index": -100,
    "image_token_index": -300,
    "projector_hidden_act": "quick_gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
        "num_attention_heads": 2, "patch_size": 4, "image_size": 12, "hidden_act": "quick_gelu",
    },
    "text_config": {
        "model_type": "llama", "vocab_size": 70, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 3,
    },
}  # fmt: skip


def test_the_authors_fields_are_read() -> None:
    given = json.loads(json.dumps(AUTHORS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = aurora.AuroraConfig.from_dict(given)
    assert given == AUTHORS  # and not edited
    assert type(config) is aurora.AuroraConfig
    assert (config.vision.num_layers, config.vision.grid_size, config.text.vocab_size) == (3, 3, 70)
    assert (config.feature_layer, config.feature_select_strategy) == (-1, "default")
    assert config.projector.hidden_act is Activation.quick_gelu
    assert (config.image_token_index, config.pad_token_id, config.text.max_seq_len) == (-300, 3, 128)


@pytest.mark.parametrize("given", [{}, dict.fromkeys([*AUTHORS][4:])], ids=["absent", "null"])
def test_absent_fields_have_the_authors_defaults(given: dict[str, Any]) -> None:
    config = aurora.AuroraConfig.from_dict(given)
    assert config.vision_feature_select_strategy == "full"
    assert config.vision_feature_layer == -2
    assert config.image_token_index == -200
    assert config.projector_hidden_act == "gelu"
    assert config.ignore_index == -100
    assert config.vision_config == VisionConfig()
    assert (config.text_config.vocab_size, config.text_config.hidden_size) == (32000, 4096)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(SIGLIP_TOWER),
        dataclasses.replace(tiny_config(), eos_token_id=-1, merge=MergeConfig(token_kept_ratio=0.3, slowfast=True)),
        dataclasses.replace(
            tiny_config(), projector=ProjectorConfig(hidden_act=Activation.gelu_tanh), feature_layer=-1
        ),
        ModelConfig(),
    ],
    ids=["clip", "siglip", "merging", "projector", "7b"],
)
def test_a_config_comes_back_from_a_mapping_and_from_a_folder(tmp_path: Path, config: ModelConfig) -> None:
    public = aurora.AuroraConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = json.loads(json.dumps(public.to_dict()))
        assert written["ignore_index"] == -100
        assert aurora.AuroraConfig.from_dict(written) == config
        public.save_pretrained(tmp_path)
        assert aurora.AuroraConfig.from_pretrained(tmp_path) == config


def test_saving_leaves_other_files_and_no_traces(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    aurora.AuroraConfig(vision=CLIP_TOWER).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    aurora.AuroraConfig().save_pretrained(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "config.json").is_file()


def test_a_save_that_fails_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aurora.AuroraConfig(vision=CLIP_TOWER).save_pretrained(tmp_path)
    earlier = (tmp_path / "config.json").read_text()

    def full(path: Path, *args: object, **options: object) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left"):
        aurora.AuroraConfig().save_pretrained(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == earlier


def test_unknown_fields_are_reported() -> None:
    with pytest.warns(UserWarning, match="does not know are passed over: image_grid, projector_act"):
        aurora.AuroraConfig.from_dict({**AUTHORS, "projector_act": "gelu", "image_grid": 3})
    with pytest.warns(UserWarning, match="text_config: .* passed over: num_experts"):
        aurora.AuroraConfig.from_dict({"text_config": {"num_experts": 8}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "model_type='llava': want aurora"),
        ({"ignore_index": -1}, "ignore_index=-1: want -100"),
        ({"vision_feature_select_strategy": "patch"}, "feature_select_strategy='patch': want default or full"),
        ({"vision_feature_layer": "last"}, "vision_feature_layer='last': want an integer"),
        ({"projector_hidden_act": "relu7"}, "projector_hidden_act='relu7': want one of"),
        ({"vision_config": [1]}, r"vision_config=\[1\]: want an object"),
        ({"text_config": {"hidden_size": -4}}, "text_config: hidden_size=-4: want a positive integer"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aurora.AuroraConfig.from_dict({**AUTHORS, **change})


def test_every_layouts_config_has_the_authors_names(tmp_path: Path) -> None:
    aurora.AuroraForConditionalGeneration(captioner("kv4")).save_pretrained(tmp_path / "aurora")
    for folder in (write_xtuner(tmp_path / "xtuner"), tmp_path / "aurora"):
        model = aurora.AuroraForConditionalGeneration.from_pretrained(folder)
        for config in (aurora.AuroraConfig.from_pretrained(folder), read_config(folder)[1], model.config):
            assert isinstance(config, aurora.AuroraConfig)
            assert config == model.config
            assert config.vision_config is config.vision
            assert config.text_config is config.text
            assert config.projector_hidden_act == config.projector.hidden_act.value
            assert config.vision_feature_layer == config.feature_layer
            assert config.vision_feature_select_strategy == config.feature_select_strategy == "default"
        with pytest.raises(AttributeError):
            model.config.vision_feature_layer = -1  # type: ignore[misc]


def test_from_pretrained_needs_no_weights_but_a_whole_captioner(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    with pytest.raises(CheckpointError, match="layout clip describes a part alone"):
        aurora.AuroraConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        aurora.AuroraConfig.from_pretrained(tmp_path / "absent")


def test_a_plain_config_and_the_public_one_are_equal_and_the_model_carries_the_public_one() -> None:
    plain = tiny_config()
    model = aurora.AuroraForConditionalGeneration(plain)
    assert isinstance(model.config, aurora.AuroraConfig)
    assert model.config.vision is plain.vision
    assert plain == model.config
    assert model.config == plain
    assert model.config == dataclasses.replace(model.config)
    assert dataclasses.replace(model.config, pad_token_id=5) != plain
    assert plain != dataclasses.replace(model.config, pad_token_id=5)
    assert model.config != AuroraModel
    # What a caller changes is what the model uses.
    model.config.merge = MergeConfig(token_kept_ratio=0.5)
    assert model.model.config.merge.token_kept_ratio == 0.5
    assert model.config.to_dict()["merge"]["token_kept_ratio"] == 0.5


def test_the_public_config_fits_the_schema_of_training() -> None:
    public = aurora.AuroraConfig(vision=CLIP_TOWER)
    schema = OmegaConf.structured(TrainConfig)
    schema.model = public
    assert OmegaConf.to_object(schema.model) == public
    assert OmegaConf.structured(public).vision.patch_size == 4


def test_forward_has_the_authors_arguments_and_results() -> None:
    model = aurora.AuroraForConditionalGeneration(tiny_config()).eval()
    named = inspect.signature(model.forward).parameters
    assert {"input_ids", "pixel_values", "pixel_values_videos", "attention_mask", "labels", "past_key_values"} <= {
        *named
    }
    ids = torch.tensor([[1, -200, 5, 6]])
    with torch.no_grad():
        out = model(ids, pixel_values=torch.zeros(1, 3, 12, 12), labels=ids, token_kept_ratio=0.5, use_cache=True)
        assert out.loss is not None
        assert out.logits.shape == (1, 3 + sum(out.visual_token_counts[0]), 70)
        more = model(torch.tensor([[7]]), past_key_values=out.past_key_values)
    assert more.logits.shape == (1, 1, 70)


def test_image_processor_has_clips_preprocess() -> None:
    processor = aurora.AuroraImageProcessor(ImageConfig(image_size=12))
    image = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    made = processor.preprocess(image, return_tensors="pt")
    assert list(made) == ["pixel_values"]
    assert torch.equal(made["pixel_values"], processor(image))
    with pytest.raises(ValueError, match="return_tensors='np': want 'pt'"):
        processor.preprocess(image, return_tensors="np")
