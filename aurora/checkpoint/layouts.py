"""Checkpoint layouts: which files a checkpoint has, and what each tensor is called there. Pure; no file is touched.

One layout is a few parts, each a folder with its own key map. A key map is a table of pairs, foreign name and ours,
read in both directions: `{i}` stands for a layer number, `{p}` for whatever follows. `LAYOUTS` holds them by name.

* `aurora`: one folder with the keys of the authors' transformers branch.
* `xtuner`: the published weights. The language model at the root, `visual_encoder/` (CLIP) and `projector/`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from aurora.checkpoint.hf_config import aurora_config_json, config_from_aurora, config_from_xtuner, xtuner_config_json
from aurora.checkpoint.store import CheckpointError, JsonDict
from aurora.model.captioner import AuroraConfig

KeyPairs = tuple[tuple[str, str], ...]

# Foreign names are those of CLIPVisionModel; "pre_layrnorm" is spelt so there.
CLIP_KEYS: KeyPairs = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.patch_embedding.{p}", "patch_embed.{p}"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("pre_layrnorm.{p}", "norm_pre.{p}"),
    ("encoder.layers.{i}.layer_norm1.{p}", "blocks.{i}.norm1.{p}"),
    ("encoder.layers.{i}.self_attn.{p}", "blocks.{i}.attn.{p}"),
    ("encoder.layers.{i}.layer_norm2.{p}", "blocks.{i}.norm2.{p}"),
    ("encoder.layers.{i}.mlp.{p}", "blocks.{i}.mlp.{p}"),
    ("post_layernorm.{p}", "norm_post.{p}"),
)
# LlamaForCausalLM; ours has no "model." level.
LLAMA_KEYS: KeyPairs = (
    ("model.embed_tokens.weight", "embed_tokens.weight"),
    ("model.layers.{i}.{p}", "layers.{i}.{p}"),
    ("model.norm.weight", "norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
)
HF_PROJECTOR_KEYS: KeyPairs = (("linear_1.{p}", "linear_1.{p}"), ("linear_2.{p}", "linear_2.{p}"))
XTUNER_PROJECTOR_KEYS: KeyPairs = (("model.0.{p}", "linear_1.{p}"), ("model.2.{p}", "linear_2.{p}"))

# Buffers that older exports carry; both are computed here.
_IGNORED_CLIP = ("embeddings.position_ids",)
_IGNORED_LLAMA = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
_PLACEHOLDERS = {"i": r"\d+", "p": r"[\w.]+"}


def under(pairs: KeyPairs, foreign: str, ours: str) -> KeyPairs:
    """Put a key table below a prefix on both sides.

    Args:
        pairs: Key table.
        foreign: Prefix of the foreign names, with its dot, or empty.
        ours: Prefix of our names, with its dot.

    Returns:
        The prefixed table.
    """
    return tuple((foreign + theirs, ours + native) for theirs, native in pairs)


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """Names of one part's tensors, foreign and ours, as a pure function in each direction."""

    pairs: KeyPairs
    """(foreign pattern, our pattern)."""
    ignored: tuple[str, ...] = ()
    """Foreign patterns of tensors that hold nothing learnt."""
    aliases: KeyPairs = ()
    """(other foreign name, our name): accepted where the proper one is absent or has another shape."""

    def to_ours(self, key: str) -> str | None:
        """Our name of a foreign key, None where the part has no such tensor."""
        return _translate(key, self.pairs)

    def to_foreign(self, key: str) -> str | None:
        """Foreign name of one of our keys, None where it belongs to another part."""
        return _translate(key, tuple((ours, foreign) for foreign, ours in self.pairs))

    def is_ignored(self, key: str) -> bool:
        """Whether a foreign key is a buffer to leave out."""
        return any(_pattern(pattern).fullmatch(key) for pattern in self.ignored)

    def alias_of(self, key: str) -> str | None:
        """Our name of a foreign key that is only a second name, else None."""
        return _translate(key, self.aliases)


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w)\}", template)
    return re.compile("".join(f"(?P<{p}>{_PLACEHOLDERS[p]})" if n % 2 else re.escape(p) for n, p in enumerate(pieces)))


def _translate(key: str, pairs: KeyPairs) -> str | None:
    for source, target in pairs:
        match = _pattern(source).fullmatch(key)
        if match is not None:
            return target.format(**match.groupdict())
    return None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One folder of a layout: its config.json, its weights and their names."""

    folder: str
    """Relative to the checkpoint, empty for its root."""
    keys: KeyMap

    @property
    def config_file(self) -> str:
        """Path of the part's config.json relative to the checkpoint."""
        return f"{self.folder}/config.json" if self.folder else "config.json"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one kind of checkpoint is stored."""

    name: str
    parts: tuple[Part, ...]
    mismatch: Callable[[Mapping[str, JsonDict]], str | None] = field(repr=False)
    """Given the config.json files found, by folder: None if this is the layout, else what speaks against it."""
    read_config: Callable[[Mapping[str, JsonDict]], AuroraConfig] = field(repr=False)
    write_config: Callable[[AuroraConfig, str | None], dict[str, JsonDict]] = field(repr=False)
    """(config, image_aspect_ratio) -> config.json content by folder."""

    def place(self, key: str) -> tuple[Part, str]:
        """Part and foreign name of one of our keys.

        Raises:
            CheckpointError: if the layout has no place for it.
        """
        for part in self.parts:
            foreign = part.keys.to_foreign(key)
            if foreign is not None:
                return part, foreign
        raise CheckpointError(f"layout {self.name}: no place for tensor {key}")


def _aurora_mismatch(configs: Mapping[str, JsonDict]) -> str | None:
    """`model_type: aurora` alone proves nothing: an unrelated time-series model uses it as well."""
    config = configs.get("")
    if config is None:
        return "no config.json"
    names = config.get("architectures")
    if names and "AuroraForConditionalGeneration" not in names:
        return f"config.json has architectures={names!r}, want AuroraForConditionalGeneration"
    if not names and (config.get("model_type") != "aurora" or not isinstance(config.get("text_config"), dict)):
        return "config.json names no architectures, and is no model_type aurora with a text_config"
    return None


def _xtuner_mismatch(configs: Mapping[str, JsonDict]) -> str | None:
    """The files decide; the published encoder calls itself PikaVidEncoder, so names are no guide."""
    missing = [part.config_file for part in XTUNER.parts if part.folder not in configs]
    if missing:
        return f"no {', no '.join(missing)}"
    root = configs[""]
    if "LlamaForCausalLM" not in (root.get("architectures") or ["LlamaForCausalLM"]):
        return f"config.json has architectures={root['architectures']!r}, want LlamaForCausalLM"
    return None


AURORA = Layout(
    name="aurora",
    parts=(
        Part(
            folder="",
            keys=KeyMap(
                pairs=under(CLIP_KEYS, "vision_tower.vision_model.", "vision_tower.")
                + under(HF_PROJECTOR_KEYS, "multi_modal_projector.", "projector.")
                + under(LLAMA_KEYS, "language_model.", "language_model."),
                # An older revision registers image_newline and never uses it.
                ignored=(
                    "image_newline",
                    *(f"vision_tower.vision_model.{key}" for key in _IGNORED_CLIP),
                    *(f"language_model.{key}" for key in _IGNORED_LLAMA),
                ),
                aliases=(("vision_tower.pos_emb", "vision_tower.pos_embed"),),
            ),
        ),
    ),
    mismatch=_aurora_mismatch,
    read_config=config_from_aurora,
    write_config=aurora_config_json,
)

XTUNER = Layout(
    name="xtuner",
    parts=(
        Part(folder="", keys=KeyMap(pairs=under(LLAMA_KEYS, "", "language_model."), ignored=_IGNORED_LLAMA)),
        Part(
            folder="visual_encoder",
            keys=KeyMap(
                pairs=under(CLIP_KEYS, "vision_model.", "vision_tower."),
                ignored=tuple(f"vision_model.{key}" for key in _IGNORED_CLIP),
                # The original keeps the position table a second time, because a forward on another image size
                # overwrites the first one (goldens/NOTES 10).
                aliases=(("pos_emb", "vision_tower.pos_embed"),),
            ),
        ),
        Part(folder="projector", keys=KeyMap(pairs=under(XTUNER_PROJECTOR_KEYS, "", "projector."))),
    ),
    mismatch=_xtuner_mismatch,
    read_config=config_from_xtuner,
    write_config=xtuner_config_json,
)

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (AURORA, XTUNER)}


def get_layout(name: str) -> Layout:
    """Look a layout up by name.

    Args:
        name: A key of `LAYOUTS`.

    Returns:
        The layout.

    Raises:
        ValueError: for any other name.
    """
    if name not in LAYOUTS:
        raise ValueError(f"layout={name!r}: want one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def config_folders() -> list[str]:
    """Folders, relative to a checkpoint, in which some layout keeps a config.json."""
    return sorted({part.folder for layout in LAYOUTS.values() for part in layout.parts})


def recognise(configs: Mapping[str, JsonDict], *, where: str, hints: Iterable[str] = ()) -> Layout:
    """Find the layout of a checkpoint from its config.json files.

    Args:
        configs: Content of each config.json found, by folder ("" is the root).
        where: Path of the checkpoint, for the message.
        hints: Further remarks for the message.

    Returns:
        The one layout that fits.

    Raises:
        CheckpointError: if none fits; it lists what was looked for in each.
    """
    reasons: list[str] = []
    for layout in LAYOUTS.values():
        reason = layout.mismatch(configs)
        if reason is None:
            return layout
        reasons.append(f"{layout.name} ({reason})")
    raise CheckpointError("; ".join([f"{where}: no known checkpoint layout; looked for {', '.join(reasons)}", *hints]))
