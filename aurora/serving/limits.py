"""What those who use a server may ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Limits:
    """What one visitor or request may ask for."""

    max_upload_mb: int = 100
    """Largest file, megabytes."""
    max_frames: int = 32
    """Most frames of a video."""
    max_new_tokens: int = 1024
    """Longest caption, tokens."""
    max_seconds: int = 300
    """A run ends after so long, with the caption as far as it is; a step of the model is not interrupted."""
    max_waiting: int = 16
    """Runs that may wait; they are done one after another."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for limit in dataclasses.fields(self):
            if (value := getattr(self, limit.name)) < 1:
                raise ValueError(f"limits.{limit.name}={value}: want at least 1")
