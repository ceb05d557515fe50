"""Aurora: video and image captioning with token merging inside the vision transformer.

The public names are loaded when they are first used, so that `import aurora` needs neither Triton, Hydra, PyAV,
a GPU nor the network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aurora.checkpoint.public_config import AuroraConfig
    from aurora.checkpoint.quantization import BitsAndBytesConfig, Int8Config
    from aurora.generation.streaming import TextStream
    from aurora.model.token_merging import apply_token_merging
    from aurora.modeling import AuroraForConditionalGeneration
    from aurora.processing.image import AuroraImageProcessor
    from aurora.processing.processor import AuroraProcessor
    from aurora.processing.video import AuroraVideoProcessor

# Public name -> the module that defines it.
_PUBLIC = {
    "AuroraConfig": "aurora.checkpoint.public_config",
    "AuroraForConditionalGeneration": "aurora.modeling",
    "AuroraImageProcessor": "aurora.processing.image",
    "AuroraProcessor": "aurora.processing.processor",
    "AuroraVideoProcessor": "aurora.processing.video",
    "BitsAndBytesConfig": "aurora.checkpoint.quantization",
    "Int8Config": "aurora.checkpoint.quantization",
    "TextStream": "aurora.generation.streaming",
    "apply_token_merging": "aurora.model.token_merging",
}

__all__ = [
    "AuroraConfig",
    "AuroraForConditionalGeneration",
    "AuroraImageProcessor",
    "AuroraProcessor",
    "AuroraVideoProcessor",
    "BitsAndBytesConfig",
    "Int8Config",
    "TextStream",
    "apply_token_merging",
]


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'aurora' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value: object = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names next to what is already loaded."""
    return sorted({*globals(), *__all__})
