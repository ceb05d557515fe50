"""Exact decoding of chosen frames with PyAV.

Frames are counted by reading the packets (and by decoding where that is not certain), never taken from the header. To
reach a chosen frame the decoder seeks when a keyframe lies well ahead of it and decodes on otherwise; every frame it
meets on the way must be the one the packets promise, else the caller decodes the whole clip. Both give the same pixels.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

MAX_CLIP_BYTES = 8 * 2**30
"""The chosen frames of one clip may take this much memory."""
MIN_SKIP_FRAMES = 8
"""A seek pays when it saves decoding at least this many frames."""
# Only containers that hold their own data: a playlist or an image pattern could open other files or addresses.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,live_flv,asf,ogg,ivf,dv,mxf,"
    "nut,rm,wav,mp3,flac,aac,obu,av1,vc1,y4m,yuv4mpegpipe"
)
WANTED = "want a video (mp4, mkv, webm, avi, mov, gif)"


class VideoError(ValueError):
    """A video that cannot be used; one line that names the file, what was found and what was wanted."""


class InconsistentError(Exception):
    """Seeking gave another frame than the packets promise."""


@dataclass(frozen=True, slots=True)
class PacketIndex:
    """Order of a clip's frames as its packets tell it."""

    num_frames: int
    pts: list[int] | None
    """Presentation times in order, `None` if they cannot be relied on."""
    keyframes: list[int]
    """Positions in `pts` where decoding can start."""


class KeptFrames:
    """Collects the wanted frames of a clip; nothing else is kept."""

    def __init__(self, path: str, wanted: Sequence[int]) -> None:
        self._path = path
        self._slots = {index: slot for slot, index in enumerate(wanted)}
        self._rotation = 0
        self._size_px = (0, 0)
        self.pixels: NDArray[np.uint8] | None = None
        self.times: list[float | None] = [None] * len(wanted)
        self.found = 0

    def take(self, index: int, frame: VideoFrame) -> None:
        """Keep the frame if it is wanted, scaled to the first kept one where a stream changes its size."""
        slot = self._slots.get(index)
        if slot is None:
            return
        if self.pixels is None:
            self._size_px = (frame.width, frame.height)
            self._rotation = round((frame.rotation or 0) / 90) % 4
        width, height = self._size_px
        array = np.rot90(frame.reformat(width=width, height=height, format="rgb24").to_ndarray(), self._rotation)
        if self.pixels is None:
            shape = (len(self._slots), *array.shape)
            if np.prod(shape, dtype=np.int64) > MAX_CLIP_BYTES:
                size = f"{shape[0]} frames of {width}x{height}"
                raise VideoError(
                    f"{self._path}: {size} take over {MAX_CLIP_BYTES >> 30} GiB; want fewer or smaller frames"
                )
            self.pixels = np.empty(shape, np.uint8)
        self.pixels[slot] = array
        self.times[slot] = frame.time
        self.found += 1


def check_file(name: str) -> None:
    """Refuse what no decoder can open, in plain words."""
    path = Path(name)
    if path.is_dir():
        raise VideoError(f"{name}: a folder; {WANTED} or an image")
    try:
        empty = path.stat().st_size == 0
    except OSError as error:
        found = "no such file" if error.errno == errno.ENOENT else error.strerror or "unreadable"
        raise VideoError(f"{name}: {found}; {WANTED} or an image") from None
    except ValueError:  # a null byte in the name
        raise VideoError(f"{name!r}: no such file; {WANTED} or an image") from None
    if empty:
        raise VideoError(f"{name}: empty file; {WANTED} or an image")


@contextmanager
def open_video(name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a local file and its first real video stream; every failure of FFmpeg inside becomes a `VideoError`."""
    check_file(name)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        # The prefix keeps a name such as "concat:a.mp4" or "a:b.mp4" from being read as a protocol.
        with av.open(f"file:{name}", options=options) as container:
            # Cover art is a video stream to FFmpeg.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = sorted({str(s.type) for s in container.streams}) or ["nothing"]
                raise VideoError(f"{name}: no video stream, only {' and '.join(kinds)}; {WANTED}")
            if streams[0].codec_context is None:
                raise VideoError(f"{name}: truncated, or of a codec that FFmpeg does not know; {WANTED}")
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise VideoError(f"{name}: not a readable video, or a truncated one ({reason}); {WANTED}") from None


def read_packets(name: str, container: InputContainer, stream: VideoStream) -> PacketIndex:
    """Count the frames and find the keyframes without decoding.

    Raises:
        VideoError: if the file ends before its data does.
    """
    times: list[int | None] = []
    keys: set[int | None] = set()
    reliable = True
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise VideoError(f"{name}: truncated or damaged after {len(times)} frames; want the whole file")
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.add(packet.pts)
        # Discarded packets (edit lists) give no frame, and a packet of VP8 need not either.
        reliable = reliable and not packet.is_discard and packet.pts is not None
    if not times:
        raise VideoError(f"{name}: no frame in the video stream; want a whole video")
    if "mov" in container.format.name:
        _check_boxes(name)
    pts = sorted(time for time in times if time is not None)
    if not reliable or len(set(pts)) != len(times) or stream.codec_context.name in ("vp8", "gif"):
        return PacketIndex(len(times), None, [])
    return PacketIndex(len(times), pts, [position for position, time in enumerate(pts) if time in keys])


def _check_boxes(name: str) -> None:
    """Refuse an mp4 whose media data ends too early; cut between two frames, FFmpeg takes it for a short clip."""
    total = Path(name).stat().st_size
    position = 0
    with Path(name).open("rb") as file:
        while position + 8 <= total:
            file.seek(position)
            header = file.read(16)
            size = int.from_bytes(header[:4], "big")
            if size == 1:  # the size stands behind the name, in 64 bits
                size = int.from_bytes(header[8:16], "big")
            if header[4:8] == b"mdat" and position + size > total:
                raise VideoError(f"{name}: truncated, {total} of at least {position + size} bytes; want the whole file")
            if size < 8:  # 0 reaches to the end of the file
                break
            position += size


def frame_rate(stream: VideoStream) -> float | None:
    """Return the average frames per second, `None` where the container does not tell."""
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def seeking_pays(index: PacketIndex, wanted: Sequence[int], min_skip: int) -> bool:
    """Return whether seeking would save decoding anything."""
    if index.pts is None:
        return False
    starts = (_keyframe_before(index, target) for target in wanted)
    return any(start - before >= min_skip for start, before in zip(starts, [0, *wanted]))


def _keyframe_before(index: PacketIndex, position: int) -> int:
    """Return the last keyframe at or before a position, 0 if there is none."""
    found = bisect_right(index.keyframes, position)
    return index.keyframes[found - 1] if found else 0


@dataclass(slots=True)
class Decoded:
    """What a decoder kept and saw."""

    frames: KeptFrames
    total: int
    """Frames that came out; of a seeking decoder those it was promised."""
    start_time: float
    """Time of the clip's first frame, s."""


def decode_all(name: str, wanted: Sequence[int]) -> Decoded:
    """Decode the clip from its start to its end."""
    frames = KeptFrames(name, wanted)
    total = 0
    start_time = 0.0
    with open_video(name) as (container, stream):
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError as error:
                if total == 0:
                    continue  # a recording may begin in the middle of a group of pictures
                raise VideoError(
                    f"{name}: damaged after frame {total} ({error.strerror}); want an intact video"
                ) from None
            for frame in decoded:
                if total == 0:
                    start_time = frame.time or 0.0
                frames.take(total, frame)
                total += 1
    if not total:
        raise VideoError(f"{name}: not one frame can be decoded; want an intact video")
    return Decoded(frames, total, start_time)


def decode_seeking(name: str, index: PacketIndex, wanted: Sequence[int], min_skip: int) -> Decoded:
    """Decode only the stretches that lead to the wanted frames.

    Raises:
        InconsistentError: if any frame on the way is not the one the packets promise.
    """
    assert index.pts is not None
    frames = KeptFrames(name, wanted)
    with open_video(name) as (container, stream):
        start_time = float(index.pts[0] * (stream.time_base or Fraction(0)))
        decoder: Iterator[VideoFrame] = _decode(container, stream)
        position = 0  # the next frame the decoder should give
        for target in wanted:
            start = _keyframe_before(index, target)
            if start - position >= min_skip:
                decoder = _decode(container, stream, start=index.pts[start])
                position = start
            while position <= target:
                frame = next(decoder, None)
                if frame is None or frame.pts != index.pts[position] or frame.is_corrupt:
                    raise InconsistentError
                frames.take(position, frame)
                position += 1
    return Decoded(frames, index.num_frames, start_time)


def _decode(container: InputContainer, stream: VideoStream, start: int | None = None) -> Iterator[VideoFrame]:
    """Give frames from the time `start` on, by default from where the container stands.

    A seek may land on an earlier keyframe, and pictures shown before a keyframe may follow it in the file: both are
    left out.
    """
    try:
        if start is not None:
            container.seek(start, stream=stream)
        for packet in container.demux(stream):
            for frame in packet.decode():
                if start is None or frame.pts is None or frame.pts >= start:
                    yield frame
    except av.FFmpegError:
        raise InconsistentError from None
