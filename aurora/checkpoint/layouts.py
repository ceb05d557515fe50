"""Checkpoint layouts: which files a checkpoint has, and what each tensor is called there. Pure; no file is touched.

One layout is a few parts, each a folder with its own key map (`keys.py`). `LAYOUTS` holds those of a whole captioner by
name, `ALL_LAYOUTS` also those of a part alone.

* `aurora`: one folder with the keys of the authors' transformers branch.
* `xtuner`: the published weights. The language model at the root, `visual_encoder/` (CLIP) and `projector/`.
* `llava_hf`, `llava`: LLaVA as Hugging Face and as the official repository store it (`llava.py`).
* `clip`, `siglip`, `open_clip`, `timm`, `llama`: one part alone (`towers.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aurora.checkpoint.hf_config import aurora_config_json, config_from_aurora, config_from_xtuner, xtuner_config_json
from aurora.checkpoint.keys import (
    CLIP_KEYS,
    HF_PROJECTOR_KEYS,
    IGNORED_CLIP,
    IGNORED_LLAMA,
    LLAMA_KEYS,
    XTUNER_PROJECTOR_KEYS,
    KeyMap,
    Layout,
    Part,
    under,
)
from aurora.checkpoint.llava import LLAVA, LLAVA_HF
from aurora.checkpoint.store import CheckpointError, JsonDict
from aurora.checkpoint.towers import CLIP_PAIR, PARTS_ALONE


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
                    *(f"vision_tower.vision_model.{key}" for key in IGNORED_CLIP),
                    *(f"language_model.{key}" for key in IGNORED_LLAMA),
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
        Part(folder="", keys=KeyMap(pairs=under(LLAMA_KEYS, "", "language_model."), ignored=IGNORED_LLAMA)),
        Part(
            folder="visual_encoder",
            keys=KeyMap(
                pairs=under(CLIP_KEYS, "vision_model.", "vision_tower."),
                # Without the level: transformers 5. With a text encoder: the base of an adapter may be a CLIPModel.
                also=under(CLIP_KEYS, "", "vision_tower."),
                ignored=(*CLIP_PAIR, *IGNORED_CLIP, *(f"vision_model.{key}" for key in IGNORED_CLIP)),
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
    preprocessor_folder="visual_encoder",
)

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (AURORA, XTUNER, LLAVA_HF, LLAVA)}
"""Layouts of a whole captioner by name."""
ALL_LAYOUTS: dict[str, Layout] = LAYOUTS | {layout.name: layout for layout in PARTS_ALONE}
"""These, and the layouts of a vision tower or a language model alone."""


def get_layout(name: str, *, among: Mapping[str, Layout] = LAYOUTS) -> Layout:
    """Look a layout up by name.

    Args:
        name: A key of `among`.
        among: `LAYOUTS` or `ALL_LAYOUTS`.

    Returns:
        The layout.

    Raises:
        ValueError: for any other name.
    """
    if name not in among:
        raise ValueError(f"layout={name!r}: want one of {', '.join(among)}")
    return among[name]


def config_folders() -> list[str]:
    """Folders, relative to a checkpoint, in which some layout keeps a config file."""
    return sorted({part.folder for layout in ALL_LAYOUTS.values() for part in layout.parts})


def config_files() -> dict[str, tuple[str, str]]:
    """Config files of all layouts: key of the config -> (folder of the part, file name)."""
    parts = [part for layout in ALL_LAYOUTS.values() for part in layout.parts]
    return {part.config_key: (part.folder, part.config_name) for part in parts}


def recognise(configs: Mapping[str, JsonDict], *, where: str, hints: Iterable[str] = ()) -> Layout:
    """Find the layout of a checkpoint from its config files.

    Args:
        configs: Content of each config file found, by `Part.config_key` ("" is the root's config.json).
        where: Path of the checkpoint, for the message.
        hints: Further remarks for the message.

    Returns:
        The one layout that fits.

    Raises:
        CheckpointError: if none fits; it lists what was looked for in each.
    """
    for config in configs.values():
        names = config.get("architectures")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise CheckpointError(f"{where}: config.json: architectures={names!r}: want a list of names")
    reasons: list[str] = []
    for layout in ALL_LAYOUTS.values():
        reason = layout.mismatch(configs)
        if reason is None:
            return layout
        reasons.append(f"{layout.name} ({reason})")
    raise CheckpointError("; ".join([f"{where}: no known checkpoint layout; looked for {', '.join(reasons)}", *hints]))
