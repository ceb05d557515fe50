"""TinyWorld's surroundings: sky, ground, textures and weather.

All that rests is drawn once per clip, on a canvas larger than the frame.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .scene import LANDMARK_BASE, LANDMARK_HEIGHT, SKY_RADIUS, TINY_RADIUS, Scene, tiny_centres
from .shapes import LANDMARKS, OUTLINES, field_of, stamp

MARGIN = 0.15
"""The canvas shows world [-MARGIN, 1 + MARGIN] squared, all that any camera reaches."""
DETAIL = 1.15
"""Canvas pixels per frame pixel at an unzoomed view."""
HORIZON = 0.47

Image32 = NDArray[np.float32]
Colour = tuple[int, int, int]
Tint = tuple[float, float, float]

PALETTE: dict[str, Colour] = {
    "red": (226, 30, 38),
    "orange": (255, 136, 12),
    "yellow": (255, 232, 40),
    "green": (30, 190, 60),
    "blue": (35, 85, 240),
    "purple": (160, 56, 218),
    "pink": (255, 128, 196),
    "white": (252, 252, 252),
}

_SKY: dict[str, tuple[Colour, Colour]] = {
    "noon": ((74, 150, 235), (190, 228, 252)),
    "sunset": ((120, 56, 120), (255, 150, 70)),
    "night": ((8, 10, 34), (34, 40, 88)),
}
_TINT = {"noon": (1.0, 1.0, 1.0), "sunset": (1.0, 0.66, 0.52), "night": (0.27, 0.32, 0.52)}
OBJECT_TINT = {"noon": (1.0, 1.0, 1.0), "sunset": (1.0, 0.94, 0.88), "night": (0.86, 0.88, 0.95)}
_DISC: dict[str, Colour] = {"noon": (255, 250, 205), "sunset": (255, 226, 120), "night": (226, 230, 244)}
_GROUND: dict[str, Colour] = {
    "meadow": (104, 176, 70),
    "beach": (236, 214, 160),
    "desert": (222, 148, 78),
    "city": (128, 128, 134),
    "forest": (58, 92, 48),
    "mountain": (142, 136, 146),
}
_HAZE = {"clear": 0.0, "rainy": 0.45, "snowy": 0.35, "foggy": 0.5}


def rgb(colour: str | Colour, tint: Tint = (1.0, 1.0, 1.0)) -> Image32:
    """Colour name or triple times a tint, float32 (3,)."""
    return np.asarray(PALETTE[colour] if isinstance(colour, str) else colour, np.float32) * np.asarray(tint, np.float32)


def _soften(tint: Tint, strength: float) -> Tint:
    red, green, blue = (1 - strength * (1 - part) for part in tint)
    return red, green, blue


@lru_cache(maxsize=16)
def _noise(side_px: int, cells: int, seed: int) -> Image32:
    """Smooth noise in [-1, 1], (side_px, side_px)."""
    coarse = np.random.default_rng([77, cells, seed]).uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC))


def _draw_far(draw: ImageDraw.ImageDraw, scene: Scene, side: int, rng: np.random.Generator) -> None:
    """What stands along the horizon; draw coordinates run over [0, side)."""

    def px(world: float) -> float:
        return (world + MARGIN) / (1 + 2 * MARGIN) * side

    low = -MARGIN
    match scene.background:
        case "meadow":
            for x in rng.uniform(low, 1.1, 4):
                draw.ellipse((px(x - 0.35), px(0.36), px(x + 0.35), px(0.75)), fill=(128, 196, 92))
        case "beach":
            draw.rectangle((0, px(HORIZON - 0.1), side, px(HORIZON + 0.1)), fill=(40, 150, 180))
            for y in rng.uniform(HORIZON - 0.08, HORIZON + 0.07, 9):
                x = rng.uniform(low, 1)
                draw.line((px(x), px(y), px(x + 0.22), px(y)), fill=(226, 244, 248), width=max(1, side // 90))
        case "desert":
            for x, y in zip(rng.uniform(low, 1.1, 4), (0.40, 0.43, 0.5, 0.58), strict=True):
                dune = [(px(x - 0.5), px(y + 0.2)), (px(x), px(y)), (px(x + 0.6), px(y + 0.2))]
                draw.polygon(dune, fill=(236, 172, 100))
        case "city":
            x = low
            while x < 1 + MARGIN:
                width, top = rng.uniform(0.1, 0.16), rng.uniform(0.14, 0.34)
                shade = int(rng.integers(70, 110))
                draw.rectangle((px(x), px(top), px(x + width), px(HORIZON + 0.02)), fill=(shade, shade, shade + 16))
                for wx in np.arange(x + 0.02, x + width - 0.03, 0.045):
                    for wy in np.arange(top + 0.025, HORIZON - 0.03, 0.055):
                        draw.rectangle((px(wx), px(wy), px(wx + 0.02), px(wy + 0.026)), fill=(238, 222, 150))
                x += width + 0.012
            for x in np.arange(low, 1.1, 0.24):
                draw.rectangle((px(x), px(0.72), px(x + 0.13), px(0.745)), fill=(240, 240, 225))
        case "forest":
            draw.rectangle((0, px(0.34), side, px(HORIZON + 0.02)), fill=(22, 62, 38))
            for x in np.arange(low, 1 + MARGIN, 0.085) + rng.uniform(-0.02, 0.02):
                top, green = rng.uniform(0.14, 0.26), int(rng.integers(62, 92))
                for step in (0.0, 0.1, 0.2):
                    y = top + step
                    points = [(px(x), px(y)), (px(x + 0.08), px(y + 0.16)), (px(x - 0.08), px(y + 0.16))]
                    draw.polygon(points, fill=(24, green, 40))
        case _:
            peaks = np.linspace(-0.1, 1.1, 5) + rng.uniform(-0.06, 0.06, 5)
            for x, top in zip(peaks, rng.uniform(0.1, 0.24, 5), strict=True):
                draw.polygon([(px(x - 0.3), px(0.5)), (px(x), px(top)), (px(x + 0.3), px(0.5))], fill=(96, 96, 122))
                cap = [(x - 0.085, top + 0.11), (x, top), (x + 0.085, top + 0.11), (x, top + 0.08)]
                draw.polygon([(px(a), px(b)) for a, b in cap], fill=(246, 248, 252))


def _draw_near(draw: ImageDraw.ImageDraw, scene: Scene, side: int, rng: np.random.Generator) -> None:
    """Small marks on the ground, too small to be counted as tiny objects."""
    marks = {
        "meadow": ((250, 240, 250), 26),
        "beach": ((206, 178, 122), 22),
        "desert": ((186, 112, 54), 22),
        "city": ((100, 100, 108), 14),
        "forest": ((36, 62, 34), 30),
        "mountain": ((98, 94, 106), 26),
    }
    colour, number = marks[scene.background]
    unit = side / (1 + 2 * MARGIN)
    for x, y in rng.uniform((0, (HORIZON + 0.12 + MARGIN) * unit), (side, side), (number, 2)):
        draw.ellipse((x - 0.010 * unit, y - 0.006 * unit, x + 0.010 * unit, y + 0.006 * unit), fill=colour)


def draw_canvas(scene: Scene, image_size: int) -> NDArray[np.uint8]:
    """All that rests in the world, (side, side, 3), for frames of image_size pixels."""
    side = round((1 + 2 * MARGIN) * DETAIL * image_size)
    unit = side / (1 + 2 * MARGIN)
    rng = np.random.default_rng([5, scene.texture])
    # Transparent above the horizon; halving weighs colours by alpha, so edges do not darken.
    big = Image.new("RGBA", (2 * side, 2 * side))
    draw = ImageDraw.Draw(big)
    draw.rectangle((0, (HORIZON + MARGIN) * 2 * unit, 2 * side, 2 * side), fill=_GROUND[scene.background])
    _draw_near(draw, scene, 2 * side, rng)
    _draw_far(draw, scene, 2 * side, rng)
    layers = np.asarray(big.reduce(2), np.float32)
    solid = layers[..., 3:] / np.float32(255)
    grain = 0.10 * _noise(side, 12, scene.texture % 8) + 0.07 * _noise(side, 48, scene.texture // 8 % 8)
    land = layers[..., :3] * (1 + grain[..., None]) * rgb((1, 1, 1), _TINT[scene.time])
    image = _sky(scene, side, rng)
    image += (land - image) * solid
    haze = _HAZE[scene.weather]
    if haze:
        grey = image @ np.full((3, 1), 1 / 3, np.float32)
        image += (grey * np.float32(0.9) + 8 - image) * np.float32(haze)
    _stamp_resting(image, scene, unit)
    return np.asarray(np.clip(image + 0.5, 0, 255), dtype=np.uint8)


def _sky(scene: Scene, side: int, rng: np.random.Generator) -> Image32:
    """Gradient, stars, sun or moon, and two clouds, (side, side, 3)."""
    unit = side / (1 + 2 * MARGIN)
    top, bottom = (rgb(c) for c in _SKY[scene.time])
    height = np.clip(np.arange(side, dtype=np.float32) / ((HORIZON + MARGIN) * unit), 0, 1)[:, None, None]
    image = np.repeat(top + (bottom - top) * height, side, axis=1)
    if scene.time == "night":
        rows, columns = rng.integers(0, int(0.55 * side), 40), rng.integers(0, side, 40)
        image[rows, columns] = 120
    disc = field_of(OUTLINES["circle"])
    centre = ((scene.sky_x + MARGIN) * unit, (scene.sky_y + MARGIN) * unit)
    glow, colour = rgb(_DISC[scene.time]), rgb(_DISC[scene.time])
    stamp(image, disc, centre_px=centre, radius_px=SKY_RADIUS * 1.45 * unit, fill=glow, opacity=0.25)
    stamp(image, disc, centre_px=centre, radius_px=SKY_RADIUS * unit, fill=colour)
    if scene.time == "night":
        bite = (centre[0] + 0.045 * unit, centre[1] - 0.025 * unit)
        stamp(image, disc, centre_px=bite, radius_px=SKY_RADIUS * 0.85 * unit, fill=top + (bottom - top) * 0.4)
    return image


def _stamp_resting(image: Image32, scene: Scene, unit: float) -> None:
    """Landmark and tiny objects, painted into the canvas."""
    half = LANDMARK_HEIGHT / 2 * unit
    centre = ((scene.landmark_x + MARGIN) * unit, (LANDMARK_BASE + MARGIN) * unit - half)
    soft = _soften(_TINT[scene.time], 0.65)
    for points, colour in LANDMARKS[scene.background]:
        fill, edge = rgb(colour, soft), rgb((30, 26, 30))
        stamp(image, field_of(points), centre_px=centre, radius_px=half, fill=fill, edge=edge, edge_px=0.006 * unit)
    tint = OBJECT_TINT[scene.time]
    for x, y in tiny_centres(scene):
        stamp(
            image,
            field_of(OUTLINES[scene.tiny_shape]),
            centre_px=((x + MARGIN) * unit, (y + MARGIN) * unit),
            radius_px=TINY_RADIUS * unit,
            fill=rgb(scene.tiny_colour, tint),
            edge=rgb((250, 250, 250), tint),
            edge_px=0.011 * unit,
        )


@lru_cache(maxsize=32)
def weather_tile(weather: str, image_size: int, variant: int) -> Image32:
    """Opacity of rain streaks or snow flakes, (2 * image_size, 2 * image_size, 1), repeating after image_size."""
    rng = np.random.default_rng([11, variant])
    side = 3 * image_size
    tile = Image.new("L", (3 * side, 3 * side))
    draw = ImageDraw.Draw(tile)
    number = 46 if weather == "rainy" else 58
    for x, y, scale in rng.uniform((0, 0, 0.8), (side, side, 1.3), (number, 3)):
        for dx in (0, side, 2 * side):
            for dy in (0, side, 2 * side):
                if weather == "rainy":
                    length, width = 0.13 * scale * side, max(2, round(0.011 * side))
                    draw.line((x + dx, y + dy, x + dx - 0.25 * length, y + dy + length), fill=190, width=width)
                else:
                    r = 0.0125 * scale * side
                    draw.ellipse((x + dx - r, y + dy - r, x + dx + r, y + dy + r), fill=245)
    middle = tile.crop((side, side, 2 * side, 2 * side)).reduce(3)
    once = np.asarray(middle, np.float32) / 255
    return np.asarray(np.tile(once, (2, 2))[..., None], dtype=np.float32)


def paint_weather(image: Image32, scene: Scene, t: float) -> None:
    """Rain, snow or fog in front of everything, in place; image is a frame (H, W, 3)."""
    size = image.shape[0]
    if scene.weather == "foggy":
        veil = rgb((214, 216, 220), _soften(_TINT[scene.time], 0.55))
        start = round(0.25 * size * (1 - t))  # the fog drifts by a quarter of the frame
        thick = 0.42 + 0.12 * _noise(size + size // 4 + 1, 5, scene.texture % 8)[:size, start : start + size, None]
        image += (veil - image) * thick
    elif scene.weather != "clear":
        fall, drift = (3.1, -0.77) if scene.weather == "rainy" else (1.3, 0.35)
        row, column = int(-fall * t * size) % size, int(-drift * t * size) % size
        cover = weather_tile(scene.weather, size, scene.texture % 6)[row : row + size, column : column + size]
        colour = (196, 214, 240) if scene.weather == "rainy" else (255, 255, 255)
        image += (rgb(colour) - image) * cover
