"""The verb `caption` from file to JSON lines, with a tiny random model saved to a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

import aurora
from aurora import captioning, cli
from aurora.captioning import CaptionConfig, Captioner, caption
from aurora.model.llama import LlamaConfig
from aurora.model.vision import VisionConfig
from aurora.processing.image import ImageConfig
from aurora.processing.inputs import find_inputs
from aurora.processing.text import Tokenizer
from aurora.records import JsonLines
from aurora.runtime import Dtype

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random captioner of 36 patches a frame, in the Aurora layout."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = tmp_path_factory.mktemp("corpus") / "lines.txt"
    lines.write_text("USER: Describe the video in detail. ASSISTANT: a red ball moves.\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, pad_id=-1, bos_id=1, eos_id=2, unk_id=0, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    tokenizer = Tokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    vision = VisionConfig(hidden_size=32, intermediate_size=64, num_layers=4, num_heads=2, patch_size=8, image_size=48)
    text = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=512
    )
    model = aurora.AuroraForConditionalGeneration(aurora.AuroraConfig(vision=vision, text=text))
    model.save_pretrained(folder)
    aurora.AuroraProcessor(aurora.AuroraImageProcessor(ImageConfig(image_size=48)), tokenizer).save_pretrained(folder)
    return folder


def write_clip(path: Path, num_frames: int = 12) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(num_frames):
            picture = np.full((48, 64, 3), 20 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """Two clips, an image, and two files that are none of these."""
    folder = tmp_path_factory.mktemp("my clips (1)")
    write_clip(folder / "a, b=1.mp4")
    write_clip(folder / "short.mp4", num_frames=3)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "c [1].png")
    (folder / "text.mp4").write_text("not a video")
    (folder / "notes.txt").write_text("not media")
    return folder


def command(tiny_model: Path, *settings: str) -> list[str]:
    return ["caption", f"model_path={tiny_model}", "max_new_tokens=5", *settings]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    return printed.err


def test_a_clip_gives_text_and_a_row(tiny_model, media, tmp_path, capsys):
    output = tmp_path / "new folder" / "out.jsonl"
    prompt = '描述 "this", [now]: a=b, {c} (d) '
    cli.main(command(tiny_model, f"visual_input={media / 'a, b=1.mp4'}", f"output={output}", f"prompt={prompt}"))
    printed = capsys.readouterr()
    (row,) = rows_of(output)
    assert printed.out == row["caption"] + "\n"
    assert "8 of 12 frames" in printed.err
    assert row["file"] == str(media / "a, b=1.mp4")
    assert row["prompt"] == prompt
    assert row["frames"] == [0, 1, 3, 4, 6, 7, 9, 11]
    assert row["total_frames"] == 12
    assert (row["token_kept_ratio"], row["schedule"]) == (0.2, "constant")
    assert row["patches"] == 8 * 36
    assert row["visual_tokens"] == sum(row["visual_tokens_per_frame"]) < 8 * 36
    assert len(row["visual_tokens_per_frame"]) == 8
    assert set(row["seconds"]) == {"load_video", "preprocess", "encode", "prefill", "decode", "warmup"}
    assert 1 <= row["new_tokens"] <= 5


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (["token_kept_ratio=1.0"], 8 * 36),
        (["token_kept_ratio=0.5", "merge=exact"], 8 * 18),
        (["token_kept_ratio=0.25", "merge=exact", "merge.slowfast=true"], 36 + 7 * 9),
        (["merge.visual_token_budget=100"], 96),
        (["merge.token_kept_ratio=0.25", "merge.schedule=exact", "num_frm=2"], 2 * 9),
    ],
)
def test_delivered_tokens_follow_the_settings(tiny_model, media, tmp_path, settings, tokens):
    output = tmp_path / "out.jsonl"
    cli.main(command(tiny_model, f"visual_input={media / 'a, b=1.mp4'}", f"output={output}", *settings))
    assert rows_of(output)[0]["visual_tokens"] == tokens


def test_a_quantised_model_captions(tiny_model, media, tmp_path):
    output = tmp_path / "out.jsonl"
    clip = f"visual_input={media / 'a, b=1.mp4'}"
    cli.main(command(tiny_model, clip, f"output={output}", "quantization=int8", "attn_implementation=eager"))
    (row,) = rows_of(output)
    assert row["settings"]["quantization"] == "int8"
    assert row["caption"]


def test_an_image_is_one_frame(tiny_model, media, tmp_path):
    output = tmp_path / "out.jsonl"
    cli.main(command(tiny_model, f"visual_input={media / 'c [1].png'}", f"output={output}", "image_aspect_ratio=pad"))
    (row,) = rows_of(output)
    assert (row["frames"], row["total_frames"], row["patches"]) == ([0], 1, 36)


def test_a_folder_reports_the_bad_files_and_goes_on(tiny_model, media, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    cli.main(command(tiny_model, f"visual_input={media}", f"output={output}"))
    rows = rows_of(output)
    assert [Path(row["file"]).name for row in rows] == ["a, b=1.mp4", "c [1].png", "short.mp4", "text.mp4"]
    assert ["error" in row for row in rows] == [False, False, False, True]
    assert "text.mp4" in rows[3]["error"]
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1] == "1 of 4 failed"
    assert sum("error: " in line for line in errors) == 1


def test_a_clip_shorter_than_num_frm_gives_all_its_frames_and_says_so(tiny_model, media, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    for visual_input in (media / "short.mp4", f"{media}/*"):
        cli.main(command(tiny_model, f"visual_input={visual_input}", f"output={output}", "overwrite=true"))
        (row,) = [row for row in rows_of(output) if row["file"].endswith("short.mp4")]
        assert (row["frames"], row["total_frames"]) == ([0, 1, 2], 3)
        assert row["note"] == "num_frm=8, but the clip has 3 frames; all are taken"
        lines = capsys.readouterr().err.splitlines()
        assert lines.count(f"{media / 'short.mp4'}: {row['note']}") == 1
    assert sum("note" in row for row in rows_of(output)) == 1  # neither the long clip nor the image


def test_when_all_fail_the_run_fails(tiny_model, tmp_path, capsys):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit) as left:
        cli.main(command(tiny_model, f"visual_input={tmp_path}"))
    assert left.value.code == 2
    assert "error: all 2 inputs failed" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["visual_input={media}/gone.mp4"], "no such file or folder"),
        (["visual_input={media}/*.webm"], "no file matches this pattern"),
        (["visual_input="], "visual_input"),
        (["visual_input={media}/text.mp4"], "text.mp4"),
        (["visual_input={media}/short.mp4", "token_kept_ratio=0"], "token_kept_ratio=0"),
        (["visual_input={media}/short.mp4", "token_kept_ratio=1.5"], "token_kept_ratio=1.5"),
        (["visual_input={media}/short.mp4", "merge.inflection=2"], "merge.inflection=2"),
        (["visual_input={media}/short.mp4", "num_frm=0"], "num_frm=0"),
        (["visual_input={media}/short.mp4", "num_frm=two"], "num_frm=two: want a whole number"),
        (["visual_input={media}/short.mp4", "top_p=0"], "top_p=0"),
        (["visual_input={media}/short.mp4", "batch_size=0"], "batch_size=0: want auto or a number of at least 1"),
        (["visual_input={media}/short.mp4", "batch_size=all"], "batch_size=all: want auto or a number of at least 1"),
        (["visual_input={media}/short.mp4", "device=tpu"], "device=tpu"),
        (["visual_input={media}/short.mp4", "dtype=int8"], "dtype=int8: want one of auto, float32, float16, bfloat16"),
        (["visual_input={media}/short.mp4", "quantization=int7"], "quantization=int7: want null or one of int8"),
        (["visual_input={media}/short.mp4", "attn_implementation=fast"], "attn_implementation=fast: want one of auto"),
        (["visual_input={media}/short.mp4", "slowfast=true"], "did you mean merge.slowfast?"),
        (["visual_input={media}/short.mp4", "+num_frames=4"], "unknown key num_frames; did you mean num_frm?"),
        (["visual_input={media}/short.mp4", "merge=exactly"], "merge/exactly"),
        (["visual_input={media}/short.mp4", "model_path=nowhere/at/all"], "nowhere/at/all"),
        (
            ["visual_input={media}/short.mp4", "num_frm=3", "prompt=an extra <image>"],
            "prompt: holds 1 <image> of its own",
        ),
        (["visual_input={media}/short.mp4", "output={media}/short.mp4"], "is one of the inputs"),
        (["visual_input={media}/short.mp4", "output={media}/notes.txt"], "want JSON lines"),
        (["visual_input={media}/short.mp4", "output={media}"], "this is a folder"),
        ([], "visual_input: no value given"),
    ],
)
def test_a_mistake_gets_one_line(tiny_model, media, capsys, settings, wanted):
    before = {file: file.read_bytes() for file in media.iterdir()}
    line = refused(capsys, command(tiny_model, *(setting.format(media=media) for setting in settings)))
    assert wanted in line
    assert {file: file.read_bytes() for file in media.iterdir()} == before


def test_a_rerun_continues_and_mends_a_half_line(tiny_model, media, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    settings = [f"visual_input={media}/*.[mp][pn][4g]", f"output={output}", "num_frm=3"]
    cli.main(command(tiny_model, *settings))
    complete = rows_of(output)
    assert ["error" in row for row in complete] == [False, False, False, True]
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[1][:40])
    capsys.readouterr()
    cli.main(command(tiny_model, *settings))
    assert "1 of 4 are in" in capsys.readouterr().err
    again = rows_of(output)
    assert [row.get("caption") for row in again] == [row.get("caption") for row in complete]
    cli.main(command(tiny_model, *settings, "token_kept_ratio=0.5"))
    assert len(rows_of(output)) == 8
    cli.main(command(tiny_model, *settings, "overwrite=true"))
    assert len(rows_of(output)) == 4


def captions_of(tiny_model: Path, media: Path, **settings) -> list[dict]:
    config = {"num_frm": 12, "max_new_tokens": 8, "dtype": Dtype.float32, "threads": 1, **settings}
    return caption(CaptionConfig(visual_input=str(media), model_path=str(tiny_model), **config))


@pytest.fixture
def mixed_media(media, tmp_path) -> Path:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, frames in enumerate((3, 12, 1, 7, 12)):
        write_clip(folder / f"{number}.mp4", frames)
    shutil.copy(media / "c [1].png", folder / "2b.png")
    (folder / "3b.mp4").write_text("not a video")
    return folder


def untimed(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "sampled"])
def test_captions_do_not_depend_on_the_batch_and_keep_their_order(tiny_model, mixed_media, settings):
    alone = captions_of(tiny_model, mixed_media, batch_size=1, **settings)
    assert [Path(row["file"]).stem for row in alone] == ["0", "1", "2", "2b", "3", "3b", "4"]
    assert ["error" in row for row in alone] == [False] * 5 + [True, False]
    assert len({row.get("caption") for row in alone}) > 3
    for batch_size in (4, "auto"):
        assert untimed(captions_of(tiny_model, mixed_media, batch_size=batch_size, **settings)) == untimed(alone)
    single = captions_of(tiny_model, mixed_media / "1.mp4", **settings)
    assert untimed(single) == untimed(alone[1:2])


def test_a_batch_is_as_large_as_memory_and_the_setting_allow(tiny_model, mixed_media, monkeypatch):
    sizes: list[int] = []
    real = Captioner.caption_together

    def together(self, clips, **options):
        sizes.append(len(clips))
        return real(self, clips, **options)

    monkeypatch.setattr(Captioner, "caption_together", together)
    captions_of(tiny_model, mixed_media)
    assert sizes == [6]
    sizes.clear()
    captions_of(tiny_model, mixed_media, batch_size=4)
    assert sizes == [4, 2]
    sizes.clear()
    monkeypatch.setattr("aurora.captioning.available_bytes", lambda device: 1)
    captions_of(tiny_model, mixed_media)
    assert sizes == [1] * 6
    sizes.clear()
    monkeypatch.setattr("aurora.captioning.available_bytes", lambda device: None)
    monkeypatch.setattr("aurora.captioning.MAX_AUTO_BATCH", 3)
    captions_of(tiny_model, mixed_media)
    assert sizes == [3, 2, 1]


def test_one_clip_that_does_not_fit_spoils_no_other(tiny_model, mixed_media):
    # 12 x 36 visual tokens and the prompt do not fit 512, 7 x 36 do.
    rows = captions_of(tiny_model, mixed_media, token_kept_ratio=1.0, prompt="Describe the video in detail. " * 6)
    long = {"1", "4"}
    assert {Path(row["file"]).stem for row in rows if "error" in row} == long | {"3b"}
    for row in rows:
        if Path(row["file"]).stem in long:
            assert row["error"].startswith(f"{row['file']}: ")
            assert "leave no room for an answer" in row["error"]
            assert "visual_token_budget=" in row["error"]


def test_the_next_files_are_read_while_a_batch_is_captioned(tiny_model, mixed_media, monkeypatch):
    events: list[str] = []
    read, together = Captioner.read, Captioner.caption_together

    def reading(self, path):
        clip = read(self, path)
        events.append(f"read {path.stem}")
        return clip

    def captioning(self, clips, **options):
        deadline = time.monotonic() + 20
        while "4" not in self.expected and time.monotonic() < deadline:
            if f"read {self.expected[0]}" in events:
                break
            time.sleep(0.01)
        events.append(f"captioned {clips[-1].path.stem}")
        return together(self, clips, **options)

    monkeypatch.setattr(Captioner, "read", reading)
    monkeypatch.setattr(Captioner, "caption_together", captioning)
    monkeypatch.setattr(Captioner, "expected", ["2"], raising=False)  # read ahead of the first batch's end
    captions_of(tiny_model, mixed_media, batch_size=1)
    assert events.index("read 2") < events.index("captioned 0")
    assert events.index("captioned 0") < events.index("read 3")  # but no further: memory is bounded


def test_a_single_caption_is_printed_while_it_is_written(tiny_model, media, capsys, monkeypatch):
    pieces: list[str] = []
    real = captioning._Typewriter.put
    monkeypatch.setattr(
        captioning._Typewriter, "put", lambda self, row, text: (pieces.append(text), real(self, row, text))
    )
    arguments = command(tiny_model, f"visual_input={media / 'a, b=1.mp4'}", "max_new_tokens=12")
    cli.main(arguments)
    streamed = capsys.readouterr().out
    assert len(pieces) > 1
    cli.main([*arguments, "stream=false"])
    assert capsys.readouterr().out == streamed


def test_a_caption_ends_before_a_stop_string(tiny_model, media, capsys):
    arguments = command(tiny_model, f"visual_input={media / 'a, b=1.mp4'}", "max_new_tokens=12", "dtype=float32")
    cli.main(arguments)
    whole = capsys.readouterr().out.strip()
    stop = whole[len(whole) // 2]
    for more in ([], ["stream=false"]):
        cli.main([*arguments, f"stop=['{stop}']", *more])
        assert capsys.readouterr().out.strip() == whole[: whole.index(stop)].strip()


def test_a_finished_run_loads_no_model(media, tiny_model, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    config = {"visual_input": str(media / "c [1].png"), "output": str(output), "max_new_tokens": 2}
    assert len(caption(CaptionConfig(model_path=str(tiny_model), **config))) == 1
    capsys.readouterr()
    assert caption(CaptionConfig(model_path=str(tiny_model), **config)) == []
    assert capsys.readouterr().out == ""


def test_sampling_does_not_depend_on_what_came_before(tiny_model, media, tmp_path):
    alone = CaptionConfig(
        visual_input=str(media / "c [1].png"), model_path=str(tiny_model), temperature=1.0, seed=3, max_new_tokens=8
    )
    (row,) = caption(alone)
    among = CaptionConfig(
        visual_input=str(media), model_path=str(tiny_model), temperature=1.0, seed=3, max_new_tokens=8
    )
    assert row["caption"] in [other.get("caption") for other in caption(among)]


def test_an_existing_path_is_never_a_glob(tmp_path):
    odd = tmp_path / "clip[1].mp4"
    odd.touch()
    (tmp_path / "clip1.mp4").touch()
    assert find_inputs(str(odd)) == [odd]
    assert find_inputs(str(tmp_path / "clip?.mp4")) == [tmp_path / "clip1.mp4"]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image or video in this folder"):
        find_inputs(str(tmp_path))


def test_rows_survive_being_killed(tmp_path):
    code = (
        "import sys, time; from aurora.records import JsonLines; log = JsonLines(sys.argv[1])\n"
        "log.append({'n': 1}); log.append({'n': 2}); print('ready', flush=True); time.sleep(60)"
    )
    output = tmp_path / "out.jsonl"
    with subprocess.Popen([sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert JsonLines(output).rows == [{"n": 1}, {"n": 2}]


def test_a_full_disk_names_the_file_and_keeps_what_was_stored(tmp_path):
    code = (
        "import resource, sys; from aurora.records import JsonLines\n"
        "log = JsonLines(sys.argv[1]); log.append({'n': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); log.append({'text': 'x' * 200})"
    )
    output = tmp_path / "out.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.endswith(f"OSError: [Errno 27] File too large: '{output}'\n")
    assert output.stat().st_size == 100  # a part of the second row
    with JsonLines(output) as log:
        assert log.rows == [{"n": 1}]
        log.append({"n": 2})
    assert rows_of(output) == [{"n": 1}, {"n": 2}]


def test_a_file_whose_name_is_no_text_spoils_no_other(tiny_model, media, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in (b"a.mp4", b"b\xff.mp4", b"c\nd.mp4"):
        Path(os.fsdecode(bytes(clips) + b"/" + name)).symlink_to(media / "a, b=1.mp4")
    command = [sys.executable, str(ROOT / "scripts" / "caption.py"), f"model_path={tiny_model}", "max_new_tokens=5"]
    command += [f"visual_input={clips}", f"output={tmp_path / 'out.jsonl'}"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=tmp_path, env=strict)
    assert done.returncode == 0, done.stderr
    with JsonLines(tmp_path / "out.jsonl") as log:
        assert {row["file"] for row in log.rows} == {str(file) for file in clips.iterdir()}
    again = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=tmp_path, env=strict)
    assert "3 of 3 are in" in again.stderr


def test_a_device_is_no_output(tmp_path):
    for device in ("/dev/null", "/dev/full", "/dev/zero"):
        with pytest.raises(ValueError, match=f"output={device}: this is a device or a pipe, want a .jsonl file"):
            JsonLines(device)


def test_another_file_is_left_alone(tmp_path):
    for content in (b"hello\n", b"\x00\x01", b'[1]\n{"a": 1}\n', b"{\n  1\n}"):
        other = tmp_path / "other"
        other.write_bytes(content)
        with pytest.raises(ValueError, match="output="):
            JsonLines(other)
        assert other.read_bytes() == content


@pytest.mark.parametrize("size", ["2", "auto", "99"])
def test_the_batch_size_is_a_number_or_auto_on_the_command_line(tiny_model, mixed_media, tmp_path, monkeypatch, size):
    sizes, together = [], Captioner.caption_together

    def recorded(self, clips, **options):
        sizes.append(len(clips))
        return together(self, clips, **options)

    monkeypatch.setattr(Captioner, "caption_together", recorded)
    cli.main(command(tiny_model, f"visual_input={mixed_media}", f"batch_size={size}", f"output={tmp_path / 'o.jsonl'}"))
    assert max(sizes) == (2 if size == "2" else sum(sizes))
    assert sum(sizes) == sum("caption" in row for row in rows_of(tmp_path / "o.jsonl"))


@pytest.mark.parametrize("size", ["0", "-1", "many", "2.5"])
def test_no_other_batch_size_is(tiny_model, media, capsys, size):
    message = refused(capsys, command(tiny_model, f"visual_input={media}", f"batch_size={size}"))
    assert message == f"error: batch_size={size}: want auto or a number of at least 1\n"


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_script_is_continued(tiny_model, media, tmp_path, stop, code):
    clips, output = tmp_path / "clips", tmp_path / "out.jsonl"
    clips.mkdir()
    for number in range(30):
        (clips / f"{number:02}.mp4").symlink_to(media / "a, b=1.mp4")
    command = [sys.executable, str(ROOT / "scripts" / "caption.py"), f"model_path={tiny_model}", "max_new_tokens=5"]
    command += [f"visual_input={clips}", f"output={output}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout.readline()
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert errors.endswith("interrupted\n") == (stop is signal.SIGINT)
    done = len(output.read_bytes().splitlines())
    assert done < 30
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    rows = rows_of(output)
    assert [Path(row["file"]).name for row in rows] == [f"{number:02}.mp4" for number in range(30)]
    assert len({row["caption"] for row in rows}) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clips", "out.jsonl"]
