"""Names of tensors: pure key maps, and the description of a layout built from them. No file is touched.

A key map is a table of pairs, foreign name and ours, read in both directions: `{i}` stands for a layer number, `{p}`
for whatever follows. Where one foreign tensor holds several of ours (a fused `qkv`), a second table says which.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aurora.checkpoint.store import CheckpointError, JsonDict
from aurora.model.captioner import AuroraConfig

KeyPairs = tuple[tuple[str, str], ...]
FusedPairs = tuple[tuple[str, tuple[str, ...]], ...]

# Foreign names are those of CLIPVisionModel, which SiglipVisionModel shares; "pre_layrnorm" is spelt so there.
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
    ("lm_head.{p}", "lm_head.{p}"),
)
HF_PROJECTOR_KEYS: KeyPairs = (("linear_1.{p}", "linear_1.{p}"), ("linear_2.{p}", "linear_2.{p}"))
XTUNER_PROJECTOR_KEYS: KeyPairs = (("model.0.{p}", "linear_1.{p}"), ("model.2.{p}", "linear_2.{p}"))

# Buffers that older exports carry (both are computed here), SigLIP's pooling head behind the tower, and a constant that
# bitsandbytes puts beside every 8-bit weight.
IGNORED_CLIP = ("embeddings.position_ids", "head.{p}")
IGNORED_LLAMA = ("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.layers.{i}.{p}.weight_format")
VOCABULARY_KEYS = ("language_model.embed_tokens.weight", "language_model.lm_head.weight")
"""Our tensors with one row for each token id."""
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
    also: KeyPairs = ()
    """Further spellings of the foreign names: read, never written."""
    ignored: tuple[str, ...] = ()
    """Foreign patterns of tensors that a captioner has no use for."""
    aliases: KeyPairs = ()
    """(other foreign name, our name): accepted where the proper one is absent or has another shape."""
    fused: FusedPairs = ()
    """(foreign pattern, our patterns): one foreign tensor holds these of ours, stacked along its first dimension."""
    unit_dims: Mapping[str, int] = field(default_factory=dict)
    """Our name -> dimensions of size 1 that the foreign tensor has in front."""

    def to_ours(self, key: str) -> str | None:
        """Our name of a foreign key, None where the part has no such tensor or it is fused."""
        return _translate(key, self.pairs) or _translate(key, self.also)

    def to_foreign(self, key: str) -> str | None:
        """Foreign name of one of our keys, None where it belongs to another part."""
        name = _translate(key, tuple((ours, foreign) for foreign, ours in self.pairs))
        return name or _translate(key, tuple((ours, foreign) for foreign, parts in self.fused for ours in parts))

    def pieces(self, key: str) -> tuple[str, ...] | None:
        """Our names of what a fused foreign key holds, in order; None where it is not fused."""
        for foreign, parts in self.fused:
            names = tuple(_translate(key, ((foreign, ours),)) for ours in parts)
            if all(names):
                return tuple(map(str, names))
        return None

    def is_ignored(self, key: str) -> bool:
        """Whether a foreign key is to be left out."""
        return any(_pattern(pattern).fullmatch(key) for pattern in self.ignored)

    def alias_of(self, key: str) -> str | None:
        """Our name of a foreign key that is only a second name, else None."""
        return _translate(key, self.aliases)


@functools.cache
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
    """One folder of a layout: its config file, its weights and their names."""

    folder: str
    """Relative to the checkpoint, empty for its root."""
    keys: KeyMap
    config_name: str = "config.json"
    """Name of the config file in the folder."""
    weights_stem: str = "model"
    """Weights are `<stem>.safetensors`, or shards of it."""

    @property
    def config_file(self) -> str:
        """Path of the part's config file relative to the checkpoint."""
        return f"{self.folder}/{self.config_name}" if self.folder else self.config_name

    @property
    def config_key(self) -> str:
        """Name of the config among those of a checkpoint: the folder of a config.json, the path of any other."""
        return self.folder if self.config_name == "config.json" else self.config_file


def no_added_rows(source: object) -> int:
    """Vocabulary rows of a layout that never adds any."""
    return 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one kind of checkpoint is stored."""

    name: str
    parts: tuple[Part, ...]
    mismatch: Callable[[Mapping[str, JsonDict]], str | None] = field(repr=False)
    """Given the configs found, by `Part.config_key`: None if this is the layout, else what speaks against it."""
    read_config: Callable[[Mapping[str, JsonDict]], AuroraConfig] = field(repr=False)
    """(configs by key) -> the model; of a layout that holds one part, the other parts are defaults."""
    write_config: Callable[[AuroraConfig, str | None], dict[str, JsonDict]] = field(repr=False)
    """(config, image_aspect_ratio) -> content of the configs by key."""
    holds: tuple[str, ...] = ("vision_tower.", "projector.", "language_model.")
    """Prefixes of the tensors of ours that it stores."""
    rows_added: Callable[[Mapping[str, JsonDict]], int] = field(default=no_added_rows, repr=False)
    """(configs by key) -> rows an export added to the vocabulary, to be dropped."""
    rows_to_add: Callable[[AuroraConfig], int] = field(default=no_added_rows, repr=False)
    """Rows that an export adds to the vocabulary of such a model."""
    preprocessor_folder: str = ""
    """Where preprocessor_config.json stands."""

    @property
    def is_whole(self) -> bool:
        """Whether it stores a whole captioner, not a part alone."""
        return len(self.holds) == 3

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
