"""A large collection: shards, workers, what is kept, and that captions are those of `aurora caption`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aurora.captioning import CaptionConfig, Captioner
from aurora.cli import main
from aurora.data.bundled import MEDIA, read_clips
from aurora.serving import corpus
from aurora.serving.corpus import CorpusConfig, Worker, caption_corpus, deal_out

CLIPS = [MEDIA / clip.file for clip in read_clips(MEDIA)]
ROOT = Path(__file__).parents[2]
FEW = {"max_new_tokens": 8, "num_frm": 2, "device": "cpu", "threads": 1}


@pytest.fixture
def collection(tmp_path) -> Path:
    """Nine clips, one of them no clip at all."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(8):
        shutil.copy(CLIPS[number % len(CLIPS)], folder / f"clip {number}.mp4")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def config_for(collection: Path, **fields: object) -> CorpusConfig:
    given = {"visual_input": str(collection), "output": str(collection.parent / "out"), "workers": 1, "shard_size": 3}
    return CorpusConfig(**(given | FEW | fields))


def rows_of(folder: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len({row["file"] for row in rows}) == len(rows)
    return {Path(row["file"]).name: row for row in rows}


def expected(collection: Path) -> dict[str, str]:
    captioner = Captioner.load(CaptionConfig(visual_input=str(collection), **FEW))
    return {file.name: captioner.caption(file)["caption"] for file in collection.glob("clip*")}


@pytest.fixture
def captioned(monkeypatch) -> list[Path]:
    """The files that workers went through."""
    seen: list[Path] = []
    run = Worker.run

    def note(worker: Worker, shard):
        seen.extend(shard.files)
        return run(worker, shard)

    monkeypatch.setattr(Worker, "run", note)
    return seen


def test_captions_are_those_of_the_caption_command(collection, capsys):
    counts = caption_corpus(config_for(collection))
    assert counts == (8, 1)
    rows = rows_of(collection.parent / "out")
    assert len(rows) == 9
    assert "no video" in rows["broken.mp4"]["error"] or "video" in rows["broken.mp4"]["error"]
    assert {name: row["caption"] for name, row in rows.items() if "caption" in row} == expected(collection)
    printed = capsys.readouterr()
    assert printed.out.strip().endswith("captions.jsonl")
    assert "9 of 9 files" in printed.err
    assert "8 captioned, 1 failed" in printed.err
    assert not list((collection.parent / "out").glob(".*.part"))


def test_again_only_what_failed_and_what_is_new(collection, captioned, capsys):
    caption_corpus(config_for(collection))
    captioned.clear()
    shutil.copy(CLIPS[0], collection / "new.mp4")
    assert caption_corpus(config_for(collection, shard_size=99)) == (1, 1)
    assert {file.name for file in captioned} == {"broken.mp4", "new.mp4"}
    assert "8 files are captioned already" in capsys.readouterr().err.replace("8 of 10 ", "8 ")
    (collection / "broken.mp4").unlink()
    captioned.clear()
    assert caption_corpus(config_for(collection)) == (0, 0)
    assert not captioned
    assert rows_of(collection.parent / "out").keys() == {f"clip {n}.mp4" for n in range(8)} | {"new.mp4"}


def test_other_settings_caption_anew_and_overwrite_does(collection, captioned):
    caption_corpus(config_for(collection))
    captioned.clear()
    assert caption_corpus(config_for(collection, token_kept_ratio=1.0)) == (8, 1)
    assert {row.get("token_kept_ratio") for row in rows_of(collection.parent / "out").values()} == {1.0}
    captioned.clear()
    assert caption_corpus(config_for(collection, token_kept_ratio=1.0, overwrite=True)) == (8, 1)
    assert len(captioned) == 9


def test_a_half_written_row_is_done_again(collection):
    caption_corpus(config_for(collection))
    out = collection.parent / "out"
    before = rows_of(out)
    shards = sorted((out / "shards").iterdir())
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:-40])
    caption_corpus(config_for(collection))
    after = rows_of(out)
    assert {name: row.get("caption") for name, row in before.items()} == {n: r.get("caption") for n, r in after.items()}


def test_files_stay_in_their_shards_whatever_is_added(tmp_path):
    files = [Path(f"{number}.mp4") for number in range(1000)]
    few, many = deal_out(files[:500], tmp_path, 16), deal_out(files, tmp_path, 16)
    assert sum(len(shard.files) for shard in many) == 1000
    assert all(set(before.files) <= set(after.files) for before, after in zip(few, many, strict=True))
    assert min(len(shard.files) for shard in many) > 30


def test_parts_share_the_work_and_the_last_puts_it_together(collection, captioned, capsys, monkeypatch):
    monkeypatch.chdir(collection.parent)  # the names decide the shards: the same ones in each run of this test
    few = {"visual_input": "clips", "output": "out", "shard_size": 2, "num_parts": 2}
    caption_corpus(config_for(collection, part=0, **few))
    assert not Path("out/captions.jsonl").exists()
    assert "the last part writes captions.jsonl" in capsys.readouterr().err
    first = set(captioned)
    caption_corpus(config_for(collection, part=1, **few))
    assert len(captioned) == len(set(captioned)) == 9
    assert 0 < len(first) < 9
    assert len(rows_of(Path("out"))) == 9


def test_a_list_of_files(collection, captioned):
    listed = collection / "list.txt"
    listed.write_text("clip 0.mp4\n\nclip 3.mp4\nclip 0.mp4\n")
    assert caption_corpus(config_for(listed, output=str(collection.parent / "out"))) == (2, 0)
    assert [file.name for file in sorted(captioned)] == ["clip 0.mp4", "clip 3.mp4"]
    listed.write_text("\n")
    with pytest.raises(ValueError, match="no path in this list"):
        caption_corpus(config_for(listed))


def test_two_runs_of_one_part_do_not_mix(collection):
    out = collection.parent / "out"
    out.mkdir()
    with (
        corpus.lock_file(out / ".lock-0-of-1", "output=out"),
        pytest.raises(ValueError, match="another run writes there now; want its end, or another output"),
    ):
        caption_corpus(config_for(collection))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workers": -1}, "workers=-1"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"part": 2, "num_parts": 2}, "part=2: want 0 to 1"),
        ({"output": None}, "output=null: want a folder"),
        ({"num_frm": 0}, "num_frm=0"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        CorpusConfig(**({"visual_input": "x"} | fields))


def test_mistakes_are_one_line(tmp_path, collection, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        caption_corpus(CorpusConfig(visual_input=str(tmp_path / "none"), output=str(tmp_path / "out")))
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "corpus.json").write_text("{}")
    with pytest.raises(ValueError, match="this is no folder of `aurora corpus`"):
        caption_corpus(config_for(collection))
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="engine=ray: needs Ray"):
        caption_corpus(config_for(collection, engine=corpus.Engine.ray))


def test_nothing_but_failures_is_an_error(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"all 1 files failed; the first: .*a.mp4"):
        caption_corpus(config_for(folder))


def test_the_command_line(collection, capsys):
    out = collection.parent / "cli"
    main(["corpus", f"visual_input={collection}", f"output={out}", "workers=1", "max_new_tokens=2", "num_frm=1",
          "device=cpu", "threads=1"])  # fmt: skip
    assert len(rows_of(out)) == 9


def command(collection: Path, *settings: str, out: str = "out") -> list[str]:
    few = [f"{key}={value}" for key, value in FEW.items() if key != "threads"]
    return [sys.executable, str(ROOT / "scripts" / "corpus.py"), f"visual_input={collection}",
            f"output={collection.parent / out}", "shard_size=3", *few, *settings]  # fmt: skip


@pytest.mark.slow
def test_two_processes_caption_what_one_does(collection):
    subprocess.run(command(collection, "workers=2"), check=True, timeout=200)
    rows = rows_of(collection.parent / "out")
    assert {name: row["caption"] for name, row in rows.items() if "caption" in row} == expected(collection)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("workers=2",), ("engine=ray", "workers=2")], ids=["local", "ray"])
def test_kill_9_loses_nothing_and_the_same_command_goes_on(collection, settings):
    for number in range(8, 40):
        shutil.copy(CLIPS[number % len(CLIPS)], collection / f"clip {number}.mp4")
    out = collection.parent / "out"

    def num_rows() -> int:
        return sum(file.read_bytes().count(b"\n") for file in (out / "shards").glob("*"))

    running = subprocess.Popen(command(collection, *settings), start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while num_rows() < 5:
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    time.sleep(3)  # workers notice that nobody wants them
    kept = num_rows()
    assert 5 <= kept < 41
    done = subprocess.run(command(collection, *settings), check=True, timeout=250, stderr=subprocess.PIPE, text=True)
    assert "files are captioned already" in done.stderr
    rows = rows_of(out)
    assert len(rows) == 41
    assert {name: row["caption"] for name, row in rows.items() if "caption" in row} == expected(collection)
    assert num_rows() <= 41 + 1 + 2, "only the broken file, and rows cut by the kill, were done twice"


@pytest.mark.slow
def test_ctrl_c_ends_all_and_says_so(collection):
    running = subprocess.Popen(
        command(collection, "workers=2", "max_new_tokens=1500", "min_new_tokens=1500"), start_new_session=True,
        stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    shards = collection.parent / "out" / "shards"
    deadline = time.monotonic() + 120
    while not any(file.stat().st_size for file in shards.glob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_ray_worker_that_dies_is_replaced(collection):
    for number in range(8, 60):
        shutil.copy(CLIPS[number % len(CLIPS)], collection / f"clip {number}.mp4")
    out = collection.parent / "out"
    running = subprocess.Popen(
        command(collection, "engine=ray", "workers=2"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    killed = False
    while running.poll() is None:
        assert time.monotonic() < deadline
        rows = sum(file.read_bytes().count(b"\n") for file in (out / "shards").glob("*"))
        if not killed and rows >= 4:
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    name = (process / "cmdline").read_bytes()
                except OSError:
                    continue
                if name.startswith(b"ray::Worker"):
                    os.kill(int(process.name), signal.SIGKILL)
                    killed = True
                    break
        time.sleep(0.05)
    _, errors = running.communicate()
    assert running.returncode == 0, errors
    assert killed
    assert len(rows_of(out)) == 61
