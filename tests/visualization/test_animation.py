"""GIFs and mp4s hold every step, in order and in time."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from aurora.visualization.animation import gif_bytes, mp4_bytes

COLOURS = [(220, 30, 30), (30, 200, 60), (40, 60, 210)]


def _steps(height: int, width: int) -> list[np.ndarray]:
    return [np.full((height, width, 3), colour, dtype=np.uint8) for colour in COLOURS]


def test_a_gif_holds_every_step_and_repeats() -> None:
    with Image.open(io.BytesIO(gif_bytes(_steps(31, 45), fps=4))) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (3, (45, 31), 0)
        for number, colour in enumerate(COLOURS):
            gif.seek(number)
            assert gif.info["duration"] == 250
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - colour).max() <= 4


def test_an_mp4_plays_every_step_and_takes_odd_sides(tmp_path: Path) -> None:
    path = tmp_path / "steps.mp4"
    path.write_bytes(mp4_bytes(_steps(63, 65), fps=4))
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 4
    assert [frame.shape for frame in frames] == [(64, 66, 3)] * 3
    for frame, colour in zip(frames, COLOURS):
        assert np.abs(frame[10:50, 10:50].astype(int) - colour).max() <= 12


@pytest.mark.parametrize("encode", [gif_bytes, mp4_bytes])
def test_what_makes_no_animation_is_refused(encode) -> None:
    with pytest.raises(ValueError, match="got 0 of differing sizes"):
        encode([])
    with pytest.raises(ValueError, match="got 2 of differing sizes"):
        encode([*_steps(8, 8)[:1], *_steps(8, 10)[:1]])
    with pytest.raises(ValueError, match=r"fps=51: want 1 to 50"):
        encode(_steps(8, 8), fps=51)
