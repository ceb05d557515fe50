import threading

import pytest
import torch

from aurora.data.conversation import encode_conversation
from aurora.data.loader import BatchLoader
from aurora.data.records import Placeholders, SourceConfig
from aurora.data.tinyworld import DatasetConfig
from aurora.data.tinyworld import write_dataset as write_tinyworld
from aurora.processing.image import AspectRatio
from tests.data.datasets import StubTokenizer, opened, turns, write_dataset, write_image, write_jsonl


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path)


def same(a, b):
    pixels = (a.pixel_values is None) == (b.pixel_values is None)
    return a[:2] == b[:2] and a[3:] == b[3:] and pixels and (a[2] is None or torch.equal(a[2], b[2]))


def test_samples(dataset):
    data = opened(dataset)
    assert len(data) == 12
    kinds = [data[index].kind for index in range(12)]
    assert kinds == ["image"] * 6 + ["video"] * 3 + ["text"] * 3
    assert data[7].where == f"{dataset}:8"
    for index, count in ((0, 1), (6, 2), (9, 0)):
        sample = data[index]
        assert (0 if sample.pixel_values is None else len(sample.pixel_values)) == count
        assert sample.input_ids.count(-200) == count  # one placeholder in the record is one per frame here
        assert sample.length == len(sample.input_ids) + 3 * count  # four visual tokens a frame
    expected = encode_conversation(turns("<image><image>\nWhat?", "Clip 0.", "And?", "Yes."), StubTokenizer())
    assert data[6][:2] == expected
    learned = [label for label in data[6].labels if label != -100]
    assert learned == [*StubTokenizer().encode("Clip 0."), 2, *StubTokenizer().encode("Yes."), 2]


def test_one_placeholder_for_the_clip(dataset):
    sample = opened(dataset, placeholders=Placeholders.clip)[6]
    assert sample.input_ids.count(-200) == 1
    assert sample.length == len(sample.input_ids) - 1 + 8


def test_long_samples_are_cut_behind_the_images(dataset):
    full, cut = opened(dataset)[5], opened(dataset, max_length=38)[5]
    assert full.length > 38 == cut.length
    assert cut.input_ids == full.input_ids[: len(cut.input_ids)]
    assert cut.labels == full.labels[: len(cut.labels)]


def test_unreadable_samples_are_replaced_reported_once_and_counted(dataset):
    (dataset.parent / "im/2.png").write_bytes(b"no image")
    (dataset.parent / "im/3.png").write_bytes(b"")
    lines = []
    data = opened(dataset, max_unreadable_share=0.2, report=lines.append)
    assert [data[2].where, data[3].where, data[2].where] == [data.where(4)] * 3
    assert same(data[2], data[4])
    assert len(lines) == len(data.unreadable) == 2
    assert f"{dataset}:3: im/2.png: not an image" in lines[0]
    # Another order of reading replaces by the same samples.
    other = opened(dataset, max_unreadable_share=0.2)
    assert same(other[3], data[3])
    assert same(other[2], data[2])


def test_too_many_unreadable_samples_stop_training(dataset):
    for number in (1, 2):
        (dataset.parent / f"im/{number}.png").write_bytes(b"no image")
    data = opened(dataset, max_unreadable_share=0.1)
    with pytest.raises(ValueError, match=r"2 of 12 samples are unreadable, .*max_unreadable_share=0\.1 allows 1 of 12"):
        data[1]


def test_the_last_readable_sample_of_a_kind_is_the_end(dataset):
    for number in range(6):
        (dataset.parent / f"im/{number}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not one sample of kind image is readable"):
        opened(dataset, max_unreadable_share=1)[0]


def test_batches_and_loader_agree_and_resume(dataset):
    data = opened(dataset, num_threads=3, prefetch_batches=2)
    wanted = [data.batch(step, 4, 1, 2, 7) for step in range(8)]
    loader = BatchLoader(data, batch_size=4, rank=1, world_size=2, seed=7, end_step=8)
    got = list(loader)
    assert all(same(a, b) for one, other in zip(got, wanted, strict=True) for a, b in zip(one, other, strict=True))
    resumed = list(BatchLoader(opened(dataset), batch_size=4, start_step=5, rank=1, world_size=2, seed=7, end_step=8))
    assert [s.where for b in resumed for s in b] == [s.where for b in wanted[5:] for s in b]


def test_the_loader_passes_errors_on_when_due_and_reads_no_further_than_allowed(dataset):
    data = opened(dataset, num_threads=1, prefetch_batches=2)
    read, gate = [], threading.Event()
    real = data.batch

    def batch(step, *rest):
        read.append(step)
        if step == 3:
            raise ValueError("step 3 is broken")
        if step > 4:
            gate.set()
        return real(step, *rest)

    data.batch = batch
    batches = iter(BatchLoader(data, batch_size=2))
    next(batches)
    assert not gate.wait(0.2)
    assert max(read) <= 2
    assert len(next(batches)) == len(next(batches)) == 2
    with pytest.raises(ValueError, match="step 3 is broken"):
        next(batches)


def test_a_mixture(tmp_path):
    one = write_dataset(tmp_path / "one", num_images=4, num_clips=0, num_texts=0)
    other = write_dataset(tmp_path / "two", num_images=2, num_clips=0, num_texts=2)
    sources = {"one": SourceConfig(path=str(one), weight=0.5), "two": SourceConfig(path=str(other), weight=2.0)}
    data = opened(sources=sources)
    assert len(data) == 8
    assert data.sampler.epoch_size == 2 + 8
    assert data.num_steps(4, 2) == 5
    where = [sample.where for step in range(5) for sample in data.batch(step, 2)]
    assert sorted(where.count(data.where(index)) for index in range(4)) == [0, 0, 1, 1]
    assert [where.count(data.where(index)) for index in range(4, 8)] == [2] * 4


def test_cached_ids_are_the_same_and_never_stale(dataset, tmp_path):
    cache = str(tmp_path / "cache")
    fresh, plain = opened(dataset, cache_dir=cache), opened(dataset)
    again = opened(dataset, cache_dir=cache)
    assert [fresh.from_cache, again.from_cache] == [False, True]
    assert all(same(again[index], plain[index]) for index in range(12))
    assert not opened(dataset, cache_dir=cache, max_length=60).from_cache
    lines = dataset.read_text().replace("Clip 0", "Film 0")
    dataset.write_text(lines)
    changed = opened(dataset, cache_dir=cache)
    assert not changed.from_cache
    assert changed[6].input_ids != plain[6].input_ids
    dataset.write_text("{}\n" * 12)
    with pytest.raises(ValueError, match=r"data\.jsonl:\d+: changed while in use"):
        changed[0]


def test_native_aspect_keeps_the_shape_and_counts_its_tokens(tmp_path):
    write_image(tmp_path / "wide.png", size=(60, 30))
    path = write_jsonl(tmp_path / "d.jsonl", [{"image": "wide.png", "conversations": turns("<image>Q", "A")}])
    sample = opened(path, aspect=AspectRatio.native)[0]
    assert sample.pixel_values.shape == (1, 3, 28, 56)
    assert sample.length == len(sample.input_ids) - 1 + 8


def test_reads_what_tinyworld_writes(tmp_path):
    path = write_tinyworld(
        DatasetConfig(folder=str(tmp_path), num_clips=1, num_frames=4, image_size=32), progress=False
    )
    data = opened(path, num_frames=6)
    sample = data[0]
    assert len(data) == 6
    assert sample.kind == "video"
    assert sample.pixel_values.shape == (4, 3, 28, 28)  # the clip is shorter than asked
    assert sample.input_ids.count(-200) == 4
    assert sample.length == len(sample.input_ids) + 3 * 4
    assert int(data.table.lengths[0]) == sample.length + 2 * 5  # six frames were expected, each with a blank before it
