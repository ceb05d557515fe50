"""Colours of figures, for light and for dark pages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a page, as #rrggbb."""

    paper: str
    """Background."""
    ink: str
    """Text."""
    faint: str
    """Axes, and text beside the point."""
    series: tuple[str, ...]
    """Lines and bars in their order; after Okabe and Ito, which colour-blind readers tell apart."""


LIGHT = Theme("#ffffff", "#1e1e22", "#8a8a92", ("#0072b2", "#d55e00", "#009e73", "#b5519c", "#a67c00", "#55555c"))
DARK = Theme("#0d1117", "#e6e6ea", "#83838d", ("#56b4e9", "#ff8a3d", "#2fc79a", "#e39ac6", "#f0e442", "#b9b9c2"))
