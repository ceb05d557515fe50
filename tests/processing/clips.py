"""Small clips of every kind, encoded on the spot."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48


def picture(number: int) -> np.ndarray:
    """Frame `number`: a bar that moves, a grey level that grows, and a white left quarter in the upper half."""
    frame = np.full((HEIGHT, WIDTH, 3), 20 + (number * 3) % 200, np.uint8)
    frame[:, (number * 2) % WIDTH] = (255, 0, 0)
    frame[: HEIGHT // 2, : WIDTH // 4] = 255
    return frame


def write_clip(
    path: Path,
    *,
    num_frames: int = 60,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: list[int] | None = None,
) -> Path:
    """Encode `num_frames` pictures; `pts` are their times in 1/25 s."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        stream.codec_context.gop_size = gop
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[number], Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path, *, cover: bool = False) -> Path:
    """Encode a second of silence; an mp3 can have a cover picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac" if path.suffix == ".mp4" else "mp3", rate=44100)
        for start in range(0, 44100, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if cover:  # an ID3v2.3 tag with one APIC frame in front
        png = io.BytesIO()
        Image.fromarray(picture(0)).save(png, "PNG")
        body = b"\x00image/png\x00\x03\x00" + png.getvalue()
        frame = b"APIC" + len(body).to_bytes(4, "big") + b"\x00\x00" + body
        size = bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0))
        path.write_bytes(b"ID3\x03\x00\x00" + size + frame + path.read_bytes())
    return path


def write_animation(path: Path, num_frames: int = 6) -> Path:
    """Write an animation with Pillow, 100 ms a frame."""
    frames = [Image.fromarray(picture(number)) for number in range(num_frames)]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0, **lossless)
    return path


def decode_plainly(path: Path) -> np.ndarray:
    """All frames, one after the other, (F, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
