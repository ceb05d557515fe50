"""Aurora in lmms-eval: an installed Aurora makes `--model aurora` known to an unmodified lmms-eval (0.7 or newer).

lmms-eval finds `manifest` through the entry point `lmms_eval.models`. `tinyvdc.yaml` in this folder is a task of ours:
`--tasks tinyvdc --include_path <this folder>`.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: the name of the model and the class behind it, which is imported when it is chosen."""
    # Here, as lmms-eval asks for it while it is being imported itself, and others have no lmms-eval.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("aurora", simple_class_path="aurora.evaluation.lmms_eval.model.AuroraLmms")
