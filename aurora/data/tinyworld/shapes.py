"""TinyWorld's outlines as signed distance fields, and the anti-aliased stamp that paints them.

A field is float32 (GRID, GRID) over [-EXTENT, EXTENT] squared of the shape's own unit square, negative inside.
Distances interpolate linearly, so one field gives clean edges at any size, place and angle. y points down.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID = 128
EXTENT = 1.6

Field = NDArray[np.float32]
Points = list[tuple[float, float]]


def _polar(radii: list[float], start_deg: float) -> Points:
    angles = np.deg2rad(start_deg) + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _rectangle(half_width: float, half_height: float) -> Points:
    w, h = half_width, half_height
    return [(-w, -h), (w, -h), (w, h), (-w, h)]


def _heart() -> Points:
    a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(a) ** 3
    y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
    return [(float(px), float(py)) for px, py in zip(x / 15.0, -(y + 2.5) / 14.5, strict=True)]


def _cross(reach: float, half_width: float) -> Points:
    r, w = reach, half_width
    return [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w), (w, r), (-w, r), (-w, w), (-r, w), (-r, -w), (-w, -w)]


OUTLINES: dict[str, Points] = {
    "circle": _polar([1.0] * 48, 0),
    "square": _rectangle(0.9, 0.9),
    "triangle": [(0.0, -1.05), (1.1, 0.85), (-1.1, 0.85)],
    "star": _polar([1.22, 0.5] * 5, -90),
    "heart": _heart(),
    "cross": _cross(1.08, 0.36),
    "dot": _polar([0.98] * 32, 0),
    "box": _rectangle(0.86, 0.86),
    "cone": [(0.0, -1.15), (1.0, 0.9), (-1.0, 0.9)],
    "stick": _rectangle(0.42, 1.08),
}
"""Corner points of every main and tiny shape; the radius of a stamp is the length of one unit here."""

LANDMARKS: dict[str, list[tuple[Points, tuple[int, int, int]]]] = {
    "meadow": [  # a house
        ([(-0.55, -0.42), (0.55, -0.42), (0.55, 1.0), (-0.55, 1.0)], (236, 222, 196)),
        ([(0.0, -1.0), (0.75, -0.38), (-0.75, -0.38)], (150, 50, 40)),
        ([(-0.14, 1.0), (-0.14, 0.3), (0.14, 0.3), (0.14, 1.0)], (90, 60, 45)),
    ],
    "beach": [  # a parasol
        (_rectangle(0.06, 1.0), (240, 240, 235)),
        ([(-0.8, -0.3), (-0.5, -0.8), (0.0, -1.0), (0.5, -0.8), (0.8, -0.3)], (215, 70, 90)),
        ([(-0.27, -0.3), (-0.17, -0.85), (0.0, -1.0), (0.17, -0.85), (0.27, -0.3)], (245, 240, 230)),
    ],
    "desert": [  # a cactus
        (_rectangle(0.17, 1.0), (40, 110, 60)),
        ([(-0.62, -0.45), (-0.4, -0.45), (-0.4, 0.0), (0.0, 0.0), (0.0, 0.22), (-0.62, 0.22)], (40, 110, 60)),
        ([(0.62, -0.65), (0.4, -0.65), (0.4, -0.15), (0.0, -0.15), (0.0, 0.07), (0.62, 0.07)], (40, 110, 60)),
    ],
    "city": [  # a clock tower
        ([(-0.32, -0.75), (0.32, -0.75), (0.32, 1.0), (-0.32, 1.0)], (185, 120, 90)),
        ([(0.0, -1.0), (0.42, -0.6), (-0.42, -0.6)], (70, 80, 100)),
        ([(-0.2, -0.4), (0.2, -0.4), (0.2, 0.0), (-0.2, 0.0)], (250, 245, 215)),
        ([(-0.12, 1.0), (-0.12, 0.5), (0.12, 0.5), (0.12, 1.0)], (70, 45, 40)),
    ],
    "forest": [  # a tent
        ([(0.0, -0.7), (0.85, 1.0), (-0.85, 1.0)], (240, 200, 90)),
        ([(0.0, -0.1), (0.3, 1.0), (-0.3, 1.0)], (110, 75, 40)),
        ([(-0.04, -1.0), (0.3, -0.85), (-0.04, -0.65)], (230, 80, 60)),
    ],
    "mountain": [  # a flag on its mast
        (_rectangle(0.07, 1.0), (60, 45, 40)),
        ([(0.05, -1.0), (0.8, -0.72), (0.05, -0.35)], (225, 90, 40)),
        ([(-0.42, 1.0), (-0.25, 0.72), (0.25, 0.72), (0.42, 1.0)], (95, 85, 85)),
    ],
}
"""Landmark parts, drawn in order; one unit is half a landmark's height, so that each tells the view's width."""


@lru_cache(maxsize=64)
def _field_of(points: tuple[tuple[float, float], ...]) -> Field:
    axis = (np.arange(GRID) + 0.5) / GRID * 2 * EXTENT - EXTENT
    px, py = np.meshgrid(axis, axis)
    nearest = np.full(px.shape, np.inf)
    inside = np.zeros(px.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((px - x0) * dx + (py - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        nearest = np.minimum(nearest, np.hypot(px - x0 - along * dx, py - y0 - along * dy))
        if dy:
            inside ^= ((y0 > py) != (y1 > py)) & (px < x0 + (py - y0) * dx / dy)
    return np.where(inside, -nearest, nearest).astype(np.float32)


def field_of(points: Points) -> Field:
    """Signed distance field (GRID, GRID) of a polygon given by its corners."""
    return _field_of(tuple(points))


@lru_cache(maxsize=8)
def landmark_field(background: str) -> Field:
    """Field of a whole landmark: the union of its parts."""
    fields = np.stack([field_of(points) for points, _ in LANDMARKS[background]])
    return np.asarray(fields.min(axis=0), dtype=np.float32)


def sample_field(field: Field, u: NDArray[np.float64], v: NDArray[np.float64]) -> Field:
    """Nearest field value at shape coordinates u, v (any shape); 1 outside of the field."""
    column = np.floor((u + EXTENT) / (2 * EXTENT) * GRID).astype(np.int64)
    row = np.floor((v + EXTENT) / (2 * EXTENT) * GRID).astype(np.int64)
    known = (column >= 0) & (column < GRID) & (row >= 0) & (row < GRID)
    value = field[np.clip(row, 0, GRID - 1), np.clip(column, 0, GRID - 1)]
    return np.where(known, value, np.float32(1.0)).astype(np.float32)


def stamp(
    image: NDArray[np.float32],
    field: Field,
    *,
    centre_px: tuple[float, float],
    radius_px: float,
    fill: NDArray[np.float32],
    edge: NDArray[np.float32] | None = None,
    edge_px: float = 0.0,
    angle: float = 0.0,
    opacity: float = 1.0,
) -> None:
    """Paint a shape into a float image (H, W, 3) in place, cut off at the border.

    Args:
        image: Values in [0, 255].
        field: Signed distance field of the shape.
        centre_px: (x, y) of the shape's origin in pixels.
        radius_px: Pixels per shape unit.
        fill: Colour (3,).
        edge: Colour (3,) of a line inside the outline.
        edge_px: Width of that line in pixels.
        angle: Clockwise turn in radians.
        opacity: 1 hides what is behind.
    """
    height, width = image.shape[:2]
    reach = radius_px * EXTENT * 0.98
    left, top = max(0, int(np.floor(centre_px[0] - reach))), max(0, int(np.floor(centre_px[1] - reach)))
    right, bottom = min(width, int(np.ceil(centre_px[0] + reach))), min(height, int(np.ceil(centre_px[1] + reach)))
    if right <= left or bottom <= top:
        return
    scale = GRID / (2 * EXTENT * radius_px)
    cos, sin = float(np.cos(angle)) * scale, float(np.sin(angle)) * scale
    # Pillow adds the half pixel of both sides itself.
    x, y = left - centre_px[0], top - centre_px[1]
    matrix = (cos, sin, cos * x + sin * y + GRID / 2, -sin, cos, -sin * x + cos * y + GRID / 2)
    size = (right - left, bottom - top)
    source = Image.fromarray(field)
    patch = source.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=1.0)
    distance = np.asarray(patch) * np.float32(radius_px)
    cover = np.clip(0.5 - distance, 0, 1)[..., None] * np.float32(opacity)
    paint: NDArray[np.float32] = fill
    if edge is not None:
        core = np.clip(0.5 - distance - np.float32(edge_px), 0, 1)[..., None]
        paint = edge + (fill - edge) * core
    region = image[top:bottom, left:right]
    region += (paint - region) * cover
