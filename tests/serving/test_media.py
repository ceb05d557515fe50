"""Images and videos that a client sends."""

from __future__ import annotations

import base64
import io
import os
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from aurora.data.bundled import MEDIA, read_clips
from aurora.serving.media import load_media

CLIP = MEDIA / read_clips(MEDIA)[0].file


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.fixture
def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), "navy").save(buffer, "PNG")
    return buffer.getvalue()


def test_an_image(png):
    media = load_media(data_url(png), "image 1", num_frames=8)
    assert media.visual.frames.shape == (1, 4, 6, 3)
    assert media.visual.is_image
    assert media.key == load_media(data_url(png, "video/mp4"), "x", num_frames=8).key, "the content decides"
    assert media.key != load_media(data_url(png), "image 1", num_frames=4).key


def test_a_video_and_a_url_written_otherwise():
    content = CLIP.read_bytes()
    encoded = base64.b64encode(content).decode()
    folded = "\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76))
    media = load_media(f"DATA:video/mp4;BASE64,{folded}".replace("+", "%2B"), "video 1", num_frames=3)
    assert len(media.visual.frames) == 3
    percent = "data:video/mp4," + "".join(f"%{byte:02x}" for byte in content)
    assert load_media(percent, "video 1", num_frames=3).key == media.key


def test_nothing_is_left_behind(png, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load_media(data_url(png), "image 1", num_frames=1)
    with pytest.raises(ValueError, match="image 1"):
        load_media(data_url(png[:30]), "image 1", num_frames=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64,!!!!", "base64 is broken"),
        ("data:image/png;base64,iVBOR", "base64 is broken or cut short"),
        ("data:image/png;base64,", "video 2: empty file"),
        ("data:text/plain,hello", "video 2: "),
        ("https://example.com/a.png", "does not fetch"),
        ("file:///etc/passwd", "got 'file:///etc/passwd', want a data: URL"),
        ("/etc/passwd", "want a data: URL"),
        ("", "want a data: URL"),
    ],
)
def test_what_is_refused(url, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_media(url, "video 2", num_frames=8)
    assert tempfile.gettempdir() not in str(caught.value)


def test_files_of_the_folder_alone(tmp_path, png):
    folder, outside = tmp_path / "media", tmp_path / "secret.png"
    folder.mkdir()
    outside.write_bytes(png)
    inside = folder / "a photo.png"
    inside.write_bytes(png)
    (folder / "link.png").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")
    read = load_media(f"file://{folder}/a%20photo.png", "image 1", num_frames=1, folder=folder)
    assert read.visual.is_image
    inside.write_bytes(png + b"\n")
    assert load_media(inside.as_uri(), "image 1", num_frames=1, folder=folder).key != read.key
    for url in (
        outside.as_uri(),
        f"file://{folder}/../secret.png",
        f"file://{folder}/%2e%2e/secret.png",
        f"file://{folder}/link.png",
        f"file://{folder}/pipe.png",
        f"file://{folder}/none.png",
        f"file://{folder}",
        f"file://elsewhere{inside}",
        f"file://{folder}/a%00.png",
        "file:a photo.png",
    ):
        with pytest.raises(ValueError, match="no such file below the folder") as caught:
            load_media(url, "image 1", num_frames=1, folder=folder)
        assert str(tmp_path) not in str(caught.value)


def test_a_damaged_file_is_not_named_by_its_path(tmp_path):
    file = Path(tmp_path) / "clip.mp4"
    file.write_bytes(CLIP.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"^video 1: ") as caught:
        load_media(file.as_uri(), "video 1", num_frames=8, folder=tmp_path)
    assert str(tmp_path) not in str(caught.value)
