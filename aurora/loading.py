"""Which model a verb loads, and how that model sees."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from aurora.checkpoint.pretrained import resolve_checkpoint
from aurora.checkpoint.quantization import KINDS
from aurora.model.attention_backends import BACKENDS
from aurora.model.merge import MergeConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.image import AspectRatio
from aurora.processing.processor import AuroraProcessor
from aurora.runtime import RuntimeConfig, resolve_device, resolve_dtype, set_threads

BUNDLED_MODEL = Path(__file__).parent / "assets" / "aurora-tiny"
"""The checkpoint that comes with the package."""


@dataclass(kw_only=True, slots=True)
class ModelConfig(RuntimeConfig):
    """Which model answers, and how it sees: what `caption`, `corpus` and `serve` have in common."""

    model_path: str | None = None
    """Checkpoint folder or hub id; null is the bundled aurora-tiny."""
    quantization: str | None = None
    """Read the language model in fewer bits: int8 (ours), int8_bnb, nf4 or fp4 (bitsandbytes); null: as stored."""
    attn_implementation: str = "auto"
    """Attention: auto, eager, sdpa, triton or flash_attention_2; what is asked for runs, or the run stops."""
    token_kept_ratio: float | None = None
    """Share of visual tokens to keep, in (0, 1]; short for merge.token_kept_ratio."""
    merge: MergeConfig = field(default_factory=lambda: MergeConfig(token_kept_ratio=0.2))
    """How visual tokens are merged."""
    image_aspect_ratio: AspectRatio | None = None
    """How frames become square: pad, crop or squash; null is the checkpoint's choice."""

    def __post_init__(self) -> None:
        """Check ranges."""
        RuntimeConfig.__post_init__(self)
        if self.token_kept_ratio is not None and not 0 < self.token_kept_ratio <= 1:
            raise ValueError(f"token_kept_ratio={self.token_kept_ratio}: want a number in (0, 1]")
        if self.quantization not in (None, *KINDS):
            raise ValueError(f"quantization={self.quantization}: want null or one of {', '.join(KINDS)}")
        if self.attn_implementation not in BACKENDS:
            raise ValueError(f"attn_implementation={self.attn_implementation}: want one of {', '.join(BACKENDS)}")

    @property
    def effective_merge(self) -> MergeConfig:
        """The merge settings with the short key applied."""
        if self.token_kept_ratio is None:
            return self.merge
        return dataclasses.replace(self.merge, token_kept_ratio=self.token_kept_ratio)

    def load(self) -> tuple[AuroraForConditionalGeneration, AuroraProcessor]:
        """Load what `model_path` names, onto its device.

        Raises:
            ValueError: if the device does not exist or the checkpoint cannot be read.
        """
        device = resolve_device(self.device)
        set_threads(self.threads)
        path = resolve_checkpoint(self.model_path if self.model_path is not None else BUNDLED_MODEL)
        processor = AuroraProcessor.from_pretrained(path)
        if self.image_aspect_ratio is not None:
            images = processor.image_processor
            images.config = dataclasses.replace(images.config, aspect_ratio=self.image_aspect_ratio)
        model = AuroraForConditionalGeneration.from_pretrained(
            path,
            torch_dtype=resolve_dtype(self.dtype, device),
            device_map=device,
            attn_implementation=self.attn_implementation,
            quantization_config=self.quantization,
        )
        return model, processor
