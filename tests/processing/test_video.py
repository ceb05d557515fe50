import io
import struct
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from aurora.processing import decode, video
from aurora.processing.image import AuroraImageProcessor, ImageConfig
from aurora.processing.video import AuroraVideoProcessor, VideoError, frame_indices, load_visual, probe, sample_frames
from tests.golden import load_index
from tests.processing.clips import HEIGHT, WIDTH, decode_plainly, picture, write_animation, write_audio, write_clip

CLIPS = {
    "gop12.mp4": {},
    "gop250.mp4": {"gop": 250},
    "dense_b.mp4": {"options": {"x264-params": "bframes=8:b-adapt=0:keyint=20:scenecut=0"}},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:keyint=12:scenecut=0"}},
    "intra_refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12"}},
    "vfr.mp4": {"pts": [number + number // 7 * 5 for number in range(60)]},
    "clip.mov": {},
    "clip.mkv": {},
    "vfr.mkv": {"pts": [number * 2 + number % 2 for number in range(60)]},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "h264.avi": {},
    "clip.gif": {"codec": "gif", "pix_fmt": "rgb8", "num_frames": 12},
    "clip.ts": {},
    "mpeg1.m1v": {"codec": "mpeg1video"},
}
SEEKABLE = [
    "gop12.mp4",
    "dense_b.mp4",
    "open_gop.mp4",
    "vfr.mp4",
    "clip.mov",
    "clip.mkv",
    "vfr.mkv",
    "vp9.webm",
    "mpeg4.avi",
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {name: write_clip(folder / name, **kinds) for name, kinds in CLIPS.items()}


def message_of(path, num_frames=4, reader=sample_frames):
    with pytest.raises(VideoError) as error:
        reader(path, num_frames)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert "want" in text
    return text


def test_indices_equal_golden():
    for case in load_index("video_indices")["cases"]:
        if case["num_frm"] > 1:
            assert frame_indices(case["total_frames"], case["num_frm"]) == case["indices"]


def test_one_frame_is_one_frame():
    # The reference returns the first and the last frame when asked for one.
    cases = [case for case in load_index("video_indices")["cases"] if case["num_frm"] == 1 and case["total_frames"] > 1]
    assert cases
    for case in cases:
        assert len(case["indices"]) == 2
        assert frame_indices(case["total_frames"], 1) == [(case["total_frames"] - 1) // 2]
    assert frame_indices(1, 1) == [0]


@pytest.mark.parametrize(("total", "num_frames"), [(0, 4), (4, 0), (-1, 1)])
def test_indices_of_nothing(total, num_frames):
    with pytest.raises(ValueError, match="want both at least 1"):
        frame_indices(total, num_frames)


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_plain_decoding(clips, name):
    plain = decode_plainly(clips[name])
    for num_frames in (1, 2, 3, 5, 8, len(plain)):
        for seek in (None, True, False):
            sampled = sample_frames(clips[name], num_frames, seek=seek)
            assert sampled.indices == frame_indices(len(plain), num_frames)
            assert sampled.total_frames == len(plain)
            np.testing.assert_array_equal(sampled.frames, plain[sampled.indices])


@pytest.mark.parametrize("name", CLIPS)
def test_arbitrary_frames_by_seeking(clips, name):
    # Not only the uniform choice: every pair of frames, wherever the keyframes lie.
    plain = decode_plainly(clips[name])
    with decode.open_video(str(clips[name])) as (container, stream):
        index = decode.read_packets(str(clips[name]), container, stream)
    if index.pts is None:
        assert name in ("vp8.webm", "clip.gif")
        return
    delivered = 0
    for first in range(0, len(plain), 7):
        for second in range(first + 1, len(plain), 9):
            try:
                decoded = decode.decode_seeking(str(clips[name]), index, [first, second], min_skip=1)
            except decode.InconsistentError:
                continue  # the caller decodes the whole clip then
            delivered += 1
            np.testing.assert_array_equal(decoded.frames.pixels, plain[[first, second]])
    assert delivered or name in ("intra_refresh.mp4", "h264.avi", "clip.ts")


@pytest.mark.parametrize("name", SEEKABLE)
def test_seeking_really_seeks(clips, name, monkeypatch):
    def forbidden(*_):
        raise AssertionError("decoded the whole clip")

    expected = sample_frames(clips[name], 3, seek=False)
    monkeypatch.setattr(video, "decode_all", forbidden)
    sampled = sample_frames(clips[name], 3)
    np.testing.assert_array_equal(sampled.frames, expected.frames)
    assert sampled.seconds == expected.seconds


def test_dense_choice_does_not_seek(clips, monkeypatch):
    monkeypatch.setattr(video, "decode_seeking", lambda *_: pytest.fail("sought"))
    assert sample_frames(clips["gop12.mp4"], 30).total_frames == 60
    assert sample_frames(clips["gop250.mp4"], 3).total_frames == 60


@pytest.mark.parametrize("wrong", ["shifted", "missing", "keyframe"])
def test_a_wrong_packet_index_falls_back(clips, wrong, monkeypatch):
    # What a header lies about must not change a pixel.
    real = video.read_packets

    def lie(*arguments):
        index = real(*arguments)
        if wrong == "shifted":
            return replace(index, pts=[time + 7 for time in index.pts])
        if wrong == "missing":
            return replace(index, pts=index.pts[1:], num_frames=index.num_frames - 1)
        return replace(index, keyframes=[5, 17, 40])

    path = clips["gop12.mp4"]
    plain = decode_plainly(path)
    monkeypatch.setattr(video, "read_packets", lie)
    sampled = sample_frames(path, 4)
    assert sampled.total_frames == 60
    np.testing.assert_array_equal(sampled.frames, plain[frame_indices(60, 4)])


def test_times(clips):
    assert sample_frames(clips["gop12.mp4"], 4).seconds == pytest.approx([0, 19 / 25, 39 / 25, 59 / 25])
    assert sample_frames(clips["gop12.mp4"], 4).fps == 25
    pts = CLIPS["vfr.mp4"]["pts"]
    sampled = sample_frames(clips["vfr.mp4"], 4)
    assert sampled.seconds == pytest.approx([pts[index] / 25 for index in sampled.indices], abs=1e-3)


def test_probe(clips):
    info = probe(clips["clip.mkv"])
    assert (info.num_frames, info.width_px, info.height_px, info.fps, info.codec) == (60, WIDTH, HEIGHT, 25, "h264")


def write_turned_clip(path, a, b, c, d):
    """Give an mp4's track the display matrix (a b; c d): x' = ax + cy, y' = bx + dy."""
    write_clip(path, num_frames=30)
    content = path.read_bytes()
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = content.index(plain, content.index(b"tkhd"))
    turned = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:at] + turned + content[at + len(turned) :])
    return path


# The first is what phones write for a clip held upright: to be shown turned clockwise.
@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), 3), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2), ((1, 0, 0, 1), 0)]
)
def test_rotation_is_applied(tmp_path, matrix, turns):
    path = write_turned_clip(tmp_path / "turned.mp4", *matrix)
    plain = decode_plainly(path)
    for seek in (True, False):
        frames = sample_frames(path, 3, seek=seek).frames
        np.testing.assert_array_equal(frames, np.rot90(plain[[0, 14, 29]], turns, axes=(1, 2)))
    corner = {3: (0, -1), 1: (-1, 0), 2: (-1, -1), 0: (0, 0)}[turns]  # where the white patch of the upper left goes
    assert frames[0][corner].min() > 200
    assert load_visual(path, 3).frames.shape == frames.shape


def test_a_stream_that_changes_its_size_keeps_the_first(tmp_path):
    # Raw H.264 streams of two sizes, one behind the other.
    content = b""
    for size in ((64, 48), (32, 96)):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="h264") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for number in range(10):
                frame = np.full((size[1], size[0], 3), 20 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        content += buffer.getvalue()
    (tmp_path / "sizes.h264").write_bytes(content)
    sampled = sample_frames(tmp_path / "sizes.h264", 4)
    assert sampled.total_frames == 20
    assert sampled.frames.shape == (4, 48, 64, 3)
    assert sampled.frames[:, 24, 32, 0] == pytest.approx([0, 120, 40, 180], abs=3)


def test_more_frames_than_the_clip_has(clips):
    text = message_of(clips["gop12.mp4"], 64)
    assert text.endswith("num_frm=64, but the clip has 60 frames; want 1 to 60")
    whole = sample_frames(clips["gop12.mp4"], 64, strict=False)
    assert whole.indices == list(range(60))
    assert "want at least 1" in message_of(clips["gop12.mp4"], 0)
    assert "the clip has 12 frames" in message_of(clips["clip.gif"], 13, load_visual)


def test_count_comes_from_the_data_not_the_header(clips, tmp_path):
    # Matroska writes no frame count at all, and this mp4 promises 60 frames through an edit list that shows 30.
    with av.open(str(clips["clip.mkv"])) as container:
        assert container.streams.video[0].frames == 0
    assert sample_frames(clips["clip.mkv"], 8).total_frames == 60
    content = clips["gop250.mp4"].read_bytes()
    edit = content.index(b"elst")
    duration = struct.unpack(">I", content[edit + 12 : edit + 16])[0]
    half = content[: edit + 12] + struct.pack(">I", duration // 2) + content[edit + 16 :]
    (tmp_path / "edited.mp4").write_bytes(half)
    plain = decode_plainly(tmp_path / "edited.mp4")
    assert 25 <= len(plain) <= 35
    sampled = sample_frames(tmp_path / "edited.mp4", 5)
    assert sampled.total_frames == len(plain)
    np.testing.assert_array_equal(sampled.frames, plain[sampled.indices])


@pytest.mark.parametrize("reader", [sample_frames, load_visual])
def test_bad_paths(tmp_path, reader):
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "no such file" in message_of(tmp_path / "gone.mp4", reader=reader)
    assert "empty file" in message_of(tmp_path / "empty.mp4", reader=reader)
    assert "a folder" in message_of(tmp_path, reader=reader)


@pytest.mark.parametrize("reader", [sample_frames, load_visual])
def test_no_video_inside(tmp_path, reader):
    (tmp_path / "text.mp4").write_text("Once upon a time there was no video.\n" * 50)
    assert "not a readable video" in message_of(tmp_path / "text.mp4", reader=reader)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    assert "not a readable video" in message_of(tmp_path / "noise.mp4", reader=reader)
    assert "no video stream, only audio" in message_of(write_audio(tmp_path / "audio.mp4"), reader=reader)


def test_cover_art_is_no_video(tmp_path):
    path = write_audio(tmp_path / "song.mp3", cover=True)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    assert "no video stream" in message_of(path)


@pytest.mark.parametrize("faststart", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.97])
def test_truncated_mp4(tmp_path, faststart, share):
    options = {"movflags": "faststart"} if faststart else {}
    content = write_clip(tmp_path / "whole.mp4", num_frames=100, container_options=options).read_bytes()
    path = tmp_path / "half.mp4"
    path.write_bytes(content[: int(len(content) * share)])
    text = message_of(path)
    assert "truncated" in text
    assert message_of(path, reader=load_visual) == text


def test_every_truncation_between_two_frames_is_seen(tmp_path):
    path = write_clip(tmp_path / "whole.mp4", num_frames=30, container_options={"movflags": "faststart"})
    content = path.read_bytes()
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    for end in sorted(ends)[5:-1:6]:
        (tmp_path / "cut.mp4").write_bytes(content[:end])
        assert "truncated" in message_of(tmp_path / "cut.mp4")


def test_undecodable_frames(clips, tmp_path):
    path = clips["gop12.mp4"]
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in packets:
        content[position : position + size] = b"\xff" * size
    (tmp_path / "all.mp4").write_bytes(content)
    assert "not one frame can be decoded" in message_of(tmp_path / "all.mp4")
    content = bytearray(path.read_bytes())
    for position, size in packets[30:]:
        content[position : position + size] = b"\xff" * size
    (tmp_path / "half.mp4").write_bytes(content)
    assert "damaged after frame" in message_of(tmp_path / "half.mp4")


def test_playlists_open_nothing(clips, tmp_path):
    (tmp_path / "list.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{clips['clip.ts']}\n#EXT-X-ENDLIST\n"
    )
    assert "not a readable video" in message_of(tmp_path / "list.mp4")
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{clips['gop12.mp4']}'\n")
    assert "not a readable video" in message_of(tmp_path / "concat.mp4")
    assert "no such file" in message_of(f"concat:{clips['gop12.mp4']}")


@pytest.mark.parametrize(
    "name", ["a clip (1), [x]=y.mp4", "http:clip.mp4", "视频 %03d.mp4", "clip.txt", "CLIP.MP4", "clip"]
)
def test_any_name_is_a_name(clips, tmp_path, name):
    (tmp_path / name).write_bytes(clips["gop12.mp4"].read_bytes())
    assert sample_frames(tmp_path / name, 2).total_frames == 60
    assert not load_visual(tmp_path / name, 2).is_image


@pytest.mark.parametrize("name", CLIPS)
def test_clips_are_videos(clips, name):
    loaded = load_visual(clips[name], 3)
    assert not loaded.is_image
    np.testing.assert_array_equal(loaded.frames, sample_frames(clips[name], 3).frames)


def test_images_by_content(tmp_path):
    for name in ("x.png", "X.PNG", "x.jpeg", "x.webp", "x.mp4"):
        buffer = io.BytesIO()
        Image.fromarray(picture(3)).save(buffer, "PNG")
        (tmp_path / name).write_bytes(buffer.getvalue())
        loaded = load_visual(tmp_path / name, 8)
        assert loaded.is_image
        assert (loaded.total_frames, loaded.indices, loaded.seconds) == (1, [0], [0.0])
        np.testing.assert_array_equal(loaded.frames, picture(3)[None])
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.png: broken image"):
        load_visual(tmp_path / "half.png", 8)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_are_videos(tmp_path, suffix):
    path = write_animation(tmp_path / f"moving.{suffix}")
    loaded = load_visual(path, 3)
    assert not loaded.is_image
    assert (loaded.total_frames, loaded.indices) == (6, [0, 2, 5])
    assert loaded.seconds == pytest.approx([0, 0.2, 0.5])
    assert loaded.fps == pytest.approx(10)
    expected = np.stack([picture(number) for number in loaded.indices])
    assert np.abs(loaded.frames.astype(int) - expected).mean() < (6 if suffix == "gif" else 0.01)
    assert "the clip has 6 frames" in message_of(path, 7, load_visual)


def test_a_still_gif_is_an_image(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "still.gif")
    assert load_visual(tmp_path / "still.gif", 8).is_image


def test_too_much_memory_is_refused(clips, monkeypatch):
    monkeypatch.setattr(decode, "MAX_CLIP_BYTES", 8 * WIDTH * HEIGHT * 3 - 1)
    assert sample_frames(clips["gop12.mp4"], 7).frames.shape[0] == 7
    assert "8 frames of 64x48" in message_of(clips["gop12.mp4"], 8)


def test_only_chosen_frames_are_converted(clips, monkeypatch):
    taken = []
    real = decode.KeptFrames.take

    def count(self, index, frame):
        before = self.found
        real(self, index, frame)
        taken.extend([index] * (self.found - before))

    monkeypatch.setattr(decode.KeptFrames, "take", count)
    sample_frames(clips["gop250.mp4"], 4)
    assert taken == frame_indices(60, 4)


def test_video_processor(clips, tmp_path):
    images = AuroraImageProcessor(ImageConfig(image_size=28))
    processor = AuroraVideoProcessor(images, num_frames=4)
    sampled = sample_frames(clips["gop12.mp4"], 4)
    expected = images.preprocess_frames(sampled.frames)
    for form in (clips["gop12.mp4"], str(clips["gop12.mp4"]), sampled, [sampled], sampled.frames):
        np.testing.assert_array_equal(processor(form)[0], expected)
    processor.save_pretrained(tmp_path)
    assert AuroraVideoProcessor.from_pretrained(tmp_path, num_frames=4).image_processor.config == images.config
    with pytest.raises(ValueError, match="num_frames=0"):
        AuroraVideoProcessor(images, num_frames=0)
