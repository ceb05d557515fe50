"""TinyWorld's scene graph: twelve facts drawn from a seed, and the geometry that shows them.

A scene holds one main object that moves, a group of tiny objects that rests, a background with time of day and weather,
and a camera move. Lengths are in units of the frame side; world (0, 0)-(1, 1) is what a camera at rest sees. `t` runs
from 0 (first frame) to 1 (last frame).
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = ("small", "medium", "large")
MOTIONS = ("leftward", "rightward", "upward", "downward", "looping", "bouncing", "swaying", "no")
STARTS = ("left", "center", "right")
COUNTS = ("one", "two", "three", "four")
TINY_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
TINY_SHAPES = ("dot", "box", "cone", "stick")
BACKGROUNDS = ("meadow", "beach", "desert", "city", "forest", "mountain")
TIMES = ("noon", "sunset", "night")
WEATHERS = ("clear", "rainy", "snowy", "foggy")
CAMERAS = ("static", "left", "right", "inward", "outward", "vertical")

SLOTS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "motion": MOTIONS,
    "start": STARTS,
    "count": COUNTS,
    "tiny_colour": TINY_COLOURS,
    "tiny_shape": TINY_SHAPES,
    "background": BACKGROUNDS,
    "time": TIMES,
    "weather": WEATHERS,
    "camera": CAMERAS,
}
"""Every fact of a scene and the values it takes."""

HELD_OUT_PAIRS = frozenset(
    {("red", "star"), ("blue", "heart"), ("green", "triangle"), ("yellow", "cross"), ("purple", "square")}
)
"""(colour, shape) pairs, 5 of 48, that no training scene shows."""

SPLITS = ("train", "val", "test", "heldout")

NUM_BINS = 12
"""Position classes per axis in `frame_targets`; as many as patches in a row of the bundled model."""
NUM_VIEW_BINS = 5
_PLACES = ("main_x", "main_y", "tiny_x", "tiny_y", "landmark_x", "landmark_y", "sky_x", "sky_y")
FRAME_TASKS: dict[str, int] = {
    **{name: len(SLOTS[name]) for name in SLOTS if name not in ("motion", "start", "camera")},
    **dict.fromkeys(_PLACES, NUM_BINS),
    "view": NUM_VIEW_BINS,
}
"""What one frame can tell: task name -> number of classes."""

RADIUS = {"small": 0.11, "medium": 0.155, "large": 0.215}
TINY_RADIUS = 0.07
TINY_SPACING = 0.18
LANDMARK_HEIGHT = 0.34
LANDMARK_BASE = 0.64
SKY_RADIUS = 0.085
PAN = 0.28
"""How far a pan or tilt moves the view over the clip; a travelling object covers at least 0.54 in the world."""
ZOOM = 1.25

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One clip's facts (the slots) and its placement; everything a renderer or a caption writer needs."""

    seed: int
    split: str
    colour: str
    shape: str
    size: str
    motion: str
    start: str
    count: str
    tiny_colour: str
    tiny_shape: str
    background: str
    time: str
    weather: str
    camera: str
    x: float = 0.5
    y: float = 0.5
    travel: float = 0.56
    phase: float = 0.0
    turn: int = 1
    angle: float = 0.0
    tiny_x: float = 0.5
    tiny_y: float = 0.78
    landmark_x: float = 0.5
    sky_x: float = 0.5
    sky_y: float = 0.18
    texture: int = 0

    @property
    def held_out(self) -> bool:
        """Whether training never shows this colour with this shape."""
        return (self.colour, self.shape) in HELD_OUT_PAIRS

    @property
    def slots(self) -> dict[str, str]:
        """The twelve facts, slot name -> value."""
        return {name: getattr(self, name) for name in SLOTS}

    def to_dict(self) -> dict[str, object]:
        """All fields and `held_out`, ready for JSON."""
        return {**asdict(self), "held_out": self.held_out}


def view_at(camera: str, t: float | Array) -> tuple[Array, Array, Array]:
    """Centre x, centre y and side of the square of the world that the frame shows at time t.

    Args:
        camera: One of `CAMERAS`.
        t: Time in [0, 1], a number or an array.

    Returns:
        Three arrays of t's shape.
    """
    t = np.asarray(t, dtype=np.float64)
    shift, middle, unit = PAN * (t - 0.5), np.full_like(t, 0.5), np.ones_like(t)
    match camera:
        case "left":
            return middle - shift, middle, unit
        case "right":
            return middle + shift, middle, unit
        case "vertical":
            return middle, middle - shift, unit
        case "inward":
            return middle, middle, ZOOM ** (1.0 - 2.0 * t)
        case "outward":
            return middle, middle, ZOOM ** (2.0 * t - 1.0)
        case _:
            return middle, middle, unit


def _offset(motion: str, travel: Array, phase: Array, turn: Array, t: Array) -> tuple[Array, Array]:
    """World displacement of the main object since t = 0; arguments broadcast."""
    zero = np.zeros(np.broadcast(travel, t).shape)
    swing = 0.62 * travel * np.sin(2 * np.pi * t) ** 2
    match motion:
        case "leftward":
            return zero - travel * t, zero
        case "rightward":
            return zero + travel * t, zero
        case "upward":
            return zero, zero - travel * t
        case "downward":
            return zero, zero + travel * t
        case "looping":
            radius, angle = 0.33 * travel, phase + turn * 2 * np.pi * t
            return radius * (np.cos(angle) - np.cos(phase)), radius * (np.sin(angle) - np.sin(phase))
        case "bouncing":
            return zero, zero - swing
        case "swaying":
            return zero + turn * swing, zero
        case _:
            return zero, zero


def main_centre(scene: Scene, t: float | Array) -> tuple[Array, Array]:
    """World position of the main object's centre at time t."""
    travel, phase, turn = (np.asarray(v, dtype=np.float64) for v in (scene.travel, scene.phase, scene.turn))
    dx, dy = _offset(scene.motion, travel, phase, turn, np.asarray(t, dtype=np.float64))
    return scene.x + dx, scene.y + dy


def to_frame(scene: Scene, x: float | Array, y: float | Array, t: float | Array) -> tuple[Array, Array]:
    """World position -> position in the frame at time t ((0, 0) top left, (1, 1) bottom right)."""
    centre_x, centre_y, side = view_at(scene.camera, t)
    return (x - centre_x) / side + 0.5, (y - centre_y) / side + 0.5


def tiny_centres(scene: Scene) -> list[tuple[float, float]]:
    """World positions of the tiny objects: one, a pair, a triangle or a square."""
    half = TINY_SPACING / 2
    layout = {
        "one": [(0.0, 0.0)],
        "two": [(-half, 0.0), (half, 0.0)],
        "three": [(0.0, -half), (-half, half), (half, half)],
        "four": [(-half, -half), (half, -half), (-half, half), (half, half)],
    }[scene.count]
    return [(scene.tiny_x + dx, scene.tiny_y + dy) for dx, dy in layout]


def _overflow(x: Array, y: Array, margin: float) -> Array:
    """How far tracks (K, T) leave the frame shrunk by margin, summed over time, (K,)."""
    outside = np.maximum(margin - x, 0) + np.maximum(x - 1 + margin, 0)
    outside = outside + np.maximum(margin - y, 0) + np.maximum(y - 1 + margin, 0)
    return np.asarray(outside.sum(axis=-1))


_TIMES = np.linspace(0.0, 1.0, 8)


def _place_main(rng: np.random.Generator, slots: dict[str, str]) -> dict[str, float]:
    """Pick the start and path, of 24 tries, that stays in the frame best; the start side is read in the first frame."""
    tries, motion = 24, slots["motion"]
    low = {"left": 0.14, "center": 0.42, "right": 0.68}[slots["start"]]
    high = {"left": 0.32, "center": 0.58, "right": 0.86}[slots["start"]]
    heights = {"upward": (0.55, 0.86), "downward": (0.14, 0.45), "bouncing": (0.5, 0.72)}
    y_low, y_high = heights.get(motion, (0.34, 0.66))
    frame_x, frame_y = rng.uniform(low, high, (tries, 1)), rng.uniform(y_low, y_high, (tries, 1))
    travel, phase = rng.uniform(0.54, 0.60, (tries, 1)), rng.uniform(0, 2 * np.pi, (tries, 1))
    turn = rng.choice([-1, 1], (tries, 1))
    centre_x, centre_y, side = view_at(slots["camera"], _TIMES)
    x = (frame_x - 0.5) * side[0] + centre_x[0]
    y = (frame_y - 0.5) * side[0] + centre_y[0]
    dx, dy = _offset(motion, travel, phase, turn, _TIMES)
    margin = 0.8 * RADIUS[slots["size"]]
    cost = _overflow((x + dx - centre_x) / side + 0.5, (y + dy - centre_y) / side + 0.5, margin)
    best = int(np.argmin(cost.round(6)))
    return {
        "x": float(x[best, 0]),
        "y": float(y[best, 0]),
        "travel": float(travel[best, 0]),
        "phase": float(phase[best, 0]),
        "turn": int(turn[best, 0]),
        "angle": float(rng.uniform(-0.12, 0.12)),
    }


def _place_rest(rng: np.random.Generator, slots: dict[str, str], main: dict[str, float]) -> dict[str, float]:
    """Place landmark, sun or moon, and tiny group: inside the view, apart, and out of the main object's way."""
    tries, radius = 32, RADIUS[slots["size"]]
    views = view_at(slots["camera"], _TIMES)
    travel, phase, turn = (np.asarray(main[name], dtype=np.float64) for name in ("travel", "phase", "turn"))
    dx, dy = _offset(slots["motion"], travel, phase, turn, _TIMES)
    path = (main["x"] + dx, main["y"] + dy)
    blocked: list[tuple[Array, Array, float]] = [(path[0], path[1], radius)]

    def place(x: Array, y: Array, reach: float, margin: float) -> tuple[float, float]:
        """Best of the candidates (K, 1); reach is the radius of the thing to place."""
        cost = 4 * _overflow((x - views[0]) / views[2] + 0.5, (y - views[1]) / views[2] + 0.5, margin)
        for other_x, other_y, other_reach in blocked:
            gap = np.hypot(x - other_x, y - other_y) - reach - other_reach
            cost = cost + np.maximum(-gap, 0).mean(axis=-1) * 8
        best = int(np.argmin(cost.round(6)))
        return float(x[best, 0]), float(y[best, 0])

    spread = TINY_SPACING / 2 if slots["count"] != "one" else 0.0
    reach = spread * 1.2 + TINY_RADIUS
    tiny = place(rng.uniform(0.1, 0.9, (tries, 1)), rng.uniform(0.6, 0.85, (tries, 1)), reach, reach * 0.9)
    blocked.append((np.asarray([tiny[0]]), np.asarray([tiny[1]]), reach))
    middle = LANDMARK_BASE - LANDMARK_HEIGHT / 2
    landmark = place(rng.uniform(0.15, 0.85, (tries, 1)), np.full((tries, 1), middle), 0.13, 0.10)
    blocked.append((np.asarray([landmark[0]]), np.asarray([landmark[1]]), 0.15))
    sky = place(rng.uniform(0.12, 0.88, (tries, 1)), rng.uniform(0.14, 0.24, (tries, 1)), SKY_RADIUS, SKY_RADIUS)
    return {"tiny_x": tiny[0], "tiny_y": tiny[1], "landmark_x": landmark[0], "sky_x": sky[0], "sky_y": sky[1]}


def sample_scene(seed: int, split: str = "train") -> Scene:
    """Draw a scene.

    Every slot is uniform, but an object that travels sideways starts at the other side, and a tiny object never has the
    main object's colour. Splits never share a random stream.

    Args:
        seed: Any integer >= 0.
        split: "train" and "val" never show a held-out (colour, shape) pair, "heldout" shows only those, "test" all.

    Raises:
        ValueError: if split is unknown or seed is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: want one of {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"seed={seed}: want an integer >= 0")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    pairs = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if split == "test" or ((colour, shape) in HELD_OUT_PAIRS) == (split == "heldout")
    ]
    slots = {name: str(values[rng.integers(len(values))]) for name, values in SLOTS.items()}
    slots["colour"], slots["shape"] = pairs[rng.integers(len(pairs))]
    slots["start"] = {"leftward": "right", "rightward": "left"}.get(slots["motion"], slots["start"])
    others = [colour for colour in TINY_COLOURS if colour != slots["colour"]]
    slots["tiny_colour"] = others[rng.integers(len(others))]
    main = _place_main(rng, slots)
    rest = _place_rest(rng, slots, main)
    return Scene(seed=seed, split=split, texture=int(rng.integers(2**31)), **slots, **main, **rest)  # type: ignore[arg-type]


def position_bin(value: float | Array) -> int:
    """Frame coordinate -> class in [0, NUM_BINS), clamped at the border."""
    return int(np.clip(np.floor(np.asarray(value) * NUM_BINS), 0, NUM_BINS - 1))


def view_bin(camera: str, t: float) -> int:
    """How wide the view is at time t, as a class: 0 closest, NUM_VIEW_BINS - 1 widest."""
    side = float(view_at(camera, t)[2])
    place = (np.log(side) / np.log(ZOOM) + 1) / 2
    return int(np.clip(np.rint(place * (NUM_VIEW_BINS - 1)), 0, NUM_VIEW_BINS - 1))


def frame_targets(scene: Scene, t: float) -> dict[str, int]:
    """Class of every task in `FRAME_TASKS` for the frame at time t."""
    targets = {name: SLOTS[name].index(getattr(scene, name)) for name in SLOTS if name in FRAME_TASKS}
    main_x, main_y = main_centre(scene, t)
    places: dict[str, tuple[float | Array, float | Array]] = {
        "main": (main_x, main_y),
        "tiny": (scene.tiny_x, scene.tiny_y),
        "landmark": (scene.landmark_x, LANDMARK_BASE - LANDMARK_HEIGHT / 2),
        "sky": (scene.sky_x, scene.sky_y),
    }
    for name, (x, y) in places.items():
        frame_x, frame_y = to_frame(scene, x, y, t)
        targets[f"{name}_x"], targets[f"{name}_y"] = position_bin(frame_x), position_bin(frame_y)
    targets["view"] = view_bin(scene.camera, t)
    return targets
