"""Typed configuration: unknown keys are refused at every depth, meanings are read from the source."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hydra import compose, initialize_config_module
from omegaconf import MISSING, DictConfig, OmegaConf

from aurora.config import field_meanings, load_config, register_schema, registered_schema, settings, unknown_key


@dataclass(kw_only=True, slots=True)
class LeafConfig:
    """A leaf."""

    width: int = 4
    """Width in
    pixels."""
    names: list[str] = field(default_factory=list)
    """Names."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"leaf.width={self.width}: want at least 1")


@dataclass(kw_only=True, slots=True)
class RootConfig:
    """A root."""

    title: str = MISSING
    """The title."""
    leaf: LeafConfig = field(default_factory=LeafConfig)
    """One leaf."""
    more: dict[str, LeafConfig] = field(default_factory=dict)
    """Leaves by name."""
    spare: LeafConfig | None = None
    """Perhaps a leaf."""


@dataclass(kw_only=True, slots=True)
class GrownConfig(RootConfig):
    """A root with one more field."""

    height: float = 1.0
    """Height."""


def raw(**values: object) -> DictConfig:
    return OmegaConf.merge(OmegaConf.structured(RootConfig), values)


def test_result_is_plain_dataclasses():
    config = load_config(raw(title="a", leaf={"width": 2, "names": ["x"]}, more={"b": {"width": 3}}), RootConfig)
    assert config == RootConfig(title="a", leaf=LeafConfig(width=2, names=["x"]), more={"b": LeafConfig(width=3)})
    assert type(config.leaf.names) is list


def test_unstructured_config_is_checked_too():
    assert load_config(OmegaConf.create({"title": "a"}), RootConfig) == RootConfig(title="a")
    with pytest.raises(ValueError, match=r"^unknown key titel; did you mean title\?$"):
        load_config(OmegaConf.create({"titel": "a"}), RootConfig)


def added(key: str) -> DictConfig:
    """A config with a key that walked past the schema, as Hydra's `+key=1` does."""
    config = raw(title="a", more={"b": {"width": 3}})
    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, key, 1, force_add=True)
    return config


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("titel", "unknown key titel; did you mean title?"),
        ("width", "unknown key width; did you mean leaf.width?"),
        ("leaf.widht", "unknown key leaf.widht; did you mean leaf.width?"),
        ("more.b.widht", "unknown key more.b.widht; did you mean more.*.width?"),
    ],
)
def test_added_keys_are_refused(key, wanted):
    with pytest.raises(ValueError, match="unknown key") as caught:
        load_config(added(key), RootConfig)
    assert str(caught.value) == wanted


def test_without_a_neighbour_all_keys_are_listed():
    assert unknown_key("zzz", LeafConfig) == "unknown key zzz; known keys: width, names"
    assert unknown_key("zzz", RootConfig) == "unknown key zzz; known keys: title"
    assert unknown_key("more.b.zzz", RootConfig) == "unknown key more.b.zzz; known keys: more.*.width, more.*.names"


def test_a_required_value_is_asked_for_with_its_meaning():
    with pytest.raises(ValueError, match=r"^title: no value given; want title=\.\.\. \(The title\.\)$"):
        load_config(raw(), RootConfig)


def test_a_removed_key_is_refused():
    config = raw(title="a")
    OmegaConf.set_struct(config, False)
    del config["leaf"]
    with pytest.raises(ValueError, match="leaf: was removed"):
        load_config(config, RootConfig)


def test_checks_of_the_dataclass_run():
    with pytest.raises(ValueError, match=r"leaf\.width=0: want at least 1"):
        load_config(raw(title="a", leaf={"width": 0}), RootConfig)


def test_meanings_cover_bases_and_join_lines():
    assert field_meanings(GrownConfig) == {
        "title": "The title.",
        "leaf": "One leaf.",
        "more": "Leaves by name.",
        "spare": "Perhaps a leaf.",
        "height": "Height.",
    }
    assert field_meanings(LeafConfig)["width"] == "Width in pixels."


def test_settings_walk_nested_dataclasses():
    keys = [setting.key for setting in settings(RootConfig)]
    assert keys == ["title", "leaf.width", "leaf.names", "more.*.width", "more.*.names", "spare.width", "spare.names"]


def test_registered_schema_is_found_by_the_config_name():
    register_schema("sapling_schema", RootConfig)
    assert registered_schema("sapling") is RootConfig
    assert registered_schema("nothing") is None


@pytest.mark.parametrize("group", ["constant", "exact", "linear"])
def test_caption_composes_with_each_merge_file(group):
    from aurora.captioning import CaptionConfig
    from aurora.model.merge import Schedule

    with initialize_config_module("aurora.configs", version_base="1.3"):
        composed = compose("caption", [f"merge={group}", "visual_input=clip.mp4"])
    config = load_config(composed, CaptionConfig)
    assert config.merge.schedule is Schedule[group]
    assert config.effective_merge.token_kept_ratio == 0.2


def test_yaml_keeps_the_defaults_of_the_caption_schema():
    from aurora.captioning import CaptionConfig

    with initialize_config_module("aurora.configs", version_base="1.3"):
        composed = compose("caption", ["visual_input=clip.mp4"])
    assert load_config(composed, CaptionConfig) == CaptionConfig(visual_input="clip.mp4")
