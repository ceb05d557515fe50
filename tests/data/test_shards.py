import io
import tarfile

import pytest
import torch

from aurora.data.shards import TarMedia, find_shards, group_parts, open_media
from tests.data.datasets import opened, write_dataset


def pack(path, files):
    """A tar with one folder entry, a long name and the files."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def split(path, sizes):
    content, start = path.read_bytes(), 0
    for number, size in enumerate([*sizes, len(content)]):
        path.with_name(f"{path.name}.part_a{'abcdef'[number]}").write_bytes(content[start : start + size])
        start += size
    path.unlink()


FILES = {f"./d/{'long' * 40}{i}.bin": bytes([i]) * (700 * i) for i in range(9)}


@pytest.mark.parametrize("sizes", [(512 * 3, 1111), (513, 5000, 1)])
def test_split_parts_read_as_one(tmp_path, sizes):
    split(pack(tmp_path / "x.tar", FILES), sizes)
    media = TarMedia(find_shards(str(tmp_path / "*.tar*")))
    assert len(media.names) == 9
    assert all(media.read(name) == content for name, content in FILES.items())
    assert media.extract(tmp_path / "out") == 9
    assert media.extract(tmp_path / "out") == 0
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in FILES.items())


def test_parts_that_are_tars_of_their_own(tmp_path):
    items = list(FILES.items())
    pack(tmp_path / "x_part_1.tar", dict(items[:4]))
    pack(tmp_path / "x_part_2.tar", dict(items[4:]))
    media = TarMedia(find_shards(str(tmp_path / "*.tar")))
    assert all(media.read(name) == content for name, content in FILES.items())


@pytest.mark.parametrize("lost", ["aa", "ab", "ac"])
def test_a_lost_part_is_noticed(tmp_path, lost):
    split(pack(tmp_path / "x.tar", FILES), (6000, 9001))
    (tmp_path / f"x.tar.part_{lost}").unlink()
    with pytest.raises(ValueError, match="want all its parts"):
        TarMedia(find_shards(str(tmp_path / "*.tar*")))


def test_names_of_parts(tmp_path):
    names = ["b.tar", "a.tar.part_ab", "a.tar.part_aa", "c_part_10.tar", "c_part_2.tar", "d.tar.001", "d.tar.000"]
    groups = group_parts([tmp_path / name for name in names])
    assert [[file.name for file in group] for group in groups] == [
        ["a.tar.part_aa", "a.tar.part_ab"],
        ["b.tar"],
        ["c_part_2.tar", "c_part_10.tar"],
        ["d.tar.000", "d.tar.001"],
    ]


def test_what_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError, match="compressed with gzip"):
        open_media(str(tmp_path / "x.tar"), beside=tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match="want a folder, a tar file"):
        open_media(str(tmp_path / "*.zip"), beside=tmp_path / "d.jsonl")
    evil = TarMedia([pack(tmp_path / "y.tar", {"../z": b"1"})])
    with pytest.raises(ValueError, match="leads out of the folder"):
        evil.extract(tmp_path / "out")
    with pytest.raises(ValueError, match="not in 1 tar"):
        evil.read("z")


def test_samples_from_tar_equal_those_from_files(tmp_path):
    path = write_dataset(tmp_path / "plain", num_images=2, num_clips=1, num_texts=0)
    images = sorted((tmp_path / "plain").rglob("*.png"))
    packed = pack(tmp_path / "s.tar", {str(f.relative_to(path.parent)): f.read_bytes() for f in images})
    plain, tarred = opened(path), opened(path, media=str(packed))
    for index in range(3):
        assert tarred[index].input_ids == plain[index].input_ids
        assert torch.equal(tarred[index].pixel_values, plain[index].pixel_values)
