"""`aurora.AuroraConfig`: the model's configuration, with the names and files of the authors' transformers branch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aurora.checkpoint.hf_config import aurora_config_json, config_from_aurora
from aurora.checkpoint.store import CheckpointError, atomic_folder, write_json
from aurora.model.captioner import IGNORE_INDEX
from aurora.model.captioner import AuroraConfig as ModelConfig
from aurora.model.llama import LlamaConfig
from aurora.model.vision import VisionConfig


class AuroraConfig(ModelConfig):
    """The whole model; the defaults are AuroraCap-7B's.

    The authors' names for its parts are read-only properties, and keys of `from_dict`, `to_dict` and config.json.
    `from_dict` has the authors' defaults: a mapping that names no `vision_feature_select_strategy` means full.
    """

    __slots__ = ()

    @property
    def vision_config(self) -> VisionConfig:
        """The authors' name of `vision`."""
        return self.vision

    @property
    def text_config(self) -> LlamaConfig:
        """The authors' name of `text`."""
        return self.text

    @property
    def projector_hidden_act(self) -> str:
        """Activation between the projector's two layers, such as gelu."""
        return self.projector.hidden_act.value

    @property
    def vision_feature_layer(self) -> int:
        """The authors' name of `feature_layer`."""
        return self.feature_layer

    @property
    def vision_feature_select_strategy(self) -> str:
        """The authors' name of `feature_select_strategy`."""
        return self.feature_select_strategy

    @property
    def ignore_index(self) -> int:
        """Label of a position that carries no loss; always -100."""
        return IGNORE_INDEX

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> AuroraConfig:
        """Read the authors' fields, as they stand in the config.json of the `aurora` layout.

        Args:
            config_dict: vision_config (fields of CLIPVisionConfig; absent: ViT-H/14 at 378 px), text_config (fields of
                LlamaConfig), projector_hidden_act (gelu), vision_feature_layer (-2), vision_feature_select_strategy
                (full), image_token_index (-200), ignore_index (-100, nothing else), the special token ids, and `merge`
                (our own: merging where a call does not say otherwise). Unknown fields are named in a warning.

        Returns:
            The configuration; attn_implementation is chosen on loading and no part of it.

        Raises:
            ValueError: for a value this version cannot compute with, or a `model_type` other than aurora.
        """
        kind = config_dict.get("model_type", "aurora")
        if kind != "aurora":
            raise CheckpointError(f"model_type={kind!r}: want aurora; from_pretrained reads the other layouts")
        return public_config(config_from_aurora({"": dict(config_dict)}))

    def to_dict(self) -> dict[str, Any]:
        """Return the authors' fields, ready for JSON; `from_dict` reads them back."""
        return aurora_config_json(self)[""]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> AuroraConfig:
        """Read the configuration of a checkpoint of any known layout, without its weights.

        Args:
            path: Checkpoint folder, a folder that `save_pretrained` wrote, or a hub id, which is downloaded.

        Returns:
            The configuration.

        Raises:
            ValueError: if there is no whole captioner's configuration, or a value this version cannot compute with.
        """
        # Those modules read checkpoints into this class.
        from aurora.checkpoint.pretrained import read_config, resolve_checkpoint

        folder = resolve_checkpoint(path)
        layout, config, _ = read_config(folder)
        if not layout.is_whole:
            raise CheckpointError(f"{folder}: layout {layout.name} describes a part alone, want a whole captioner's")
        return public_config(config)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json of the `aurora` layout; it appears whole or not at all.

        Args:
            path: Folder, made when missing; other files in it stay.

        Raises:
            ValueError: if the disk refuses.
        """
        with atomic_folder(Path(path)) as stage:
            write_json(stage / "config.json", self.to_dict())

    def __eq__(self, other: object) -> bool:
        """Equal to a plain configuration of the same model, too."""
        if not isinstance(other, ModelConfig):
            return NotImplemented
        return all(getattr(self, field.name) == getattr(other, field.name) for field in dataclasses.fields(self))


def public_config(config: ModelConfig) -> AuroraConfig:
    """Give a model's configuration the authors' names; its parts are shared, not copied."""
    if isinstance(config, AuroraConfig):
        return config
    return AuroraConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
