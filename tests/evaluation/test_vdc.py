"""VDC from a folder in the published format to a report, on a checkpoint with random weights."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from aurora import cli
from aurora.config import load_config
from aurora.data.tinyworld.dataset import DatasetConfig, Layout, _write_vdc, write_dataset
from aurora.data.tinyworld.language import STATED_SLOTS
from aurora.data.tinyworld.scene import sample_scene
from aurora.evaluation import run, tinyvdc, vdc_run
from aurora.evaluation.config import Benchmark, EvaluateConfig, VdcConfig
from aurora.evaluation.judge import JudgeConfig, JudgeKind
from aurora.evaluation.judge_stub import serve
from aurora.evaluation.run import evaluate
from aurora.evaluation.structured import StructuredCaptioner
from aurora.evaluation.tinyvdc import CATEGORIES, REQUIRED
from aurora.evaluation.vdc import read_vdc
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor
from tests.evaluation import judge_servers as servers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Five clips with every file of the published format."""
    folder = tmp_path_factory.mktemp("vdc")
    config = DatasetConfig(folder=str(folder), split="test", num_clips=5, image_size=48, layout=Layout.vdc)
    assert write_dataset(config, progress=False) == folder / "VDC_1k.jsonl"
    return folder


@pytest.fixture
def copy(published, tmp_path):
    """The same folder, to be damaged."""
    target = tmp_path / "vdc"
    for path in published.rglob("*"):
        if path.is_file():
            (target / path.relative_to(published)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(published)).write_bytes(path.read_bytes())
    return target


def settings(folder, checkpoint, root, kind=JudgeKind.rules, *, data=None, judge=None, **more):
    named = {"ratios": [0.25], "num_frm": 16, "max_new_tokens": 6, "threads": 1, "num_clips": None, **more}
    return EvaluateConfig(
        benchmark=Benchmark.vdc,
        model_path=str(checkpoint),
        output=str(folder / "out"),
        data=VdcConfig(root=str(root), **(data or {})),
        judge=JudgeConfig(kind=kind, **(judge or {})),
        **named,
    )


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]


def test_tinyworld_writes_the_published_format(published):
    rows = [json.loads(line) for line in (published / "VDC_1k.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert set(rows[0]) == {"video_id", "video_name", *(f"{name}_caption" for name in CATEGORIES)}
    for name in CATEGORIES:
        lines = [json.loads(line) for line in (published / "VDCScore_qa" / f"{name}.jsonl").read_text().splitlines()]
        assert [list(line) for line in lines] == [[row["video_id"]] for row in rows]
        assert {entry["category"] for entry in lines[0][rows[0]["video_id"]]} == set(STATED_SLOTS[name])
        assert set(lines[0][rows[0]["video_id"]][0]) == {"question", "answer", "category"}
    assert {name.value: set(slots) for name, slots in STATED_SLOTS.items()} == {
        name: set(slots) for name, slots in REQUIRED.items()
    }


def test_the_reference_captions_of_tinyworld_answer_every_question(published):
    """With the rules as judge, the truth scores all and another clip's caption little."""
    vdc = read_vdc(VdcConfig(root=str(published)))
    rows = {clip.video_id: {"captions": clip.captions} for clip in vdc.clips}
    judge = vdc_run.RuleJudge()
    judged = vdc_run._judge(judge, vdc.clips, rows, vdc_run.Wording(), 2, "")
    assert vdc_run.score_categories(judged)["mean"]["all"] == {"score": 5, "accuracy": 1}
    ids = [clip.video_id for clip in vdc.clips]
    turned = {name: rows[other] for name, other in zip(ids, [*ids[1:], ids[0]], strict=True)}
    judged = vdc_run._judge(judge, vdc.clips, turned, vdc_run.Wording(), 2, "")
    assert vdc_run.score_categories(judged)["mean"]["all"]["accuracy"] < 0.6


def test_captions_of_one_clip_with_the_questions_of_another_score_chance(tmp_path):
    """500 clips, whose files nobody opens: the questions and reference answers are all that a score knows of a clip."""
    scenes = [sample_scene(seed, "test") for seed in range(500)]
    _write_vdc(tmp_path, scenes)
    (tmp_path / "clips").mkdir()
    for scene in scenes:
        (tmp_path / "clips" / f"test_{scene.seed:07d}.mp4").touch()
    clips = read_vdc(VdcConfig(root=str(tmp_path))).clips
    rows = {clip.video_id: {"captions": other.captions} for clip, other in zip(clips, [*clips[1:], clips[0]])}
    judged = vdc_run._judge(vdc_run.RuleJudge(), clips, rows, vdc_run.Wording(), 1, "")
    found = vdc_run.score_categories(judged, resamples=50)
    other = tinyvdc.score(
        [rows[clip.video_id]["captions"] for clip in clips], [scene.to_dict() for scene in scenes], resamples=50
    )
    for name, entry in found["categories"].items():
        assert entry["all"]["num_videos"] == 500
        assert entry["all"]["accuracy"] == pytest.approx(other.categories[name].accuracy)
    assert found["mean"]["all"]["accuracy"] == pytest.approx(other.mean.chance, abs=0.03)


def test_a_folder_is_read_as_published(published):
    vdc = read_vdc(VdcConfig(root=str(published)))
    assert [clip.video_id for clip in vdc.clips] == [f"test_{seed:07d}" for seed in range(5)]
    assert vdc.notes == {}
    for clip in vdc.clips:
        assert Path(clip.path).name == f"{clip.video_id}.mp4"
        assert set(clip.captions) == set(clip.questions) == set(CATEGORIES)
    few = read_vdc(VdcConfig(root=str(published), categories=["camera"]), 2)
    assert [list(clip.questions) for clip in few.clips] == [["camera"], ["camera"]]


def test_the_authors_code_has_other_names_and_the_reader_takes_them(copy):
    """Captions nested in VDC_1k_captions.jsonl, questions in post_eval/, upper-case endings, an id that comes twice."""
    rows = [json.loads(line) for line in (copy / "VDC_1k.jsonl").read_text().splitlines()]
    nested = [
        {"video_id": row["video_id"], "captions": {key: row[key] for key in row if key.endswith("caption")}}
        for row in rows
    ]
    (copy / "VDC_1k.jsonl").unlink()
    (copy / "post_eval").mkdir()
    (copy / "post_eval" / "VDC_1k_captions.jsonl").write_text("\n".join(map(json.dumps, nested)) + "\n")
    (copy / "VDCScore_qa").rename(copy / "post_eval" / "qa")
    main = copy / "post_eval" / "qa" / "main_object.jsonl"
    twice = {rows[0]["video_id"]: [{"question": "What?", "answer": "this"}, {"question": "Who"}, "odd"]}
    main.write_text(main.read_text() + json.dumps(twice) + "\n\n")
    captions = copy / "post_eval" / "VDC_1k_captions.jsonl"
    captions.write_text(captions.read_text() + json.dumps(nested[1]) + "\n")
    clip = copy / "clips" / "test_0000002.mp4"
    clip.rename(clip.with_suffix(".MP4"))
    vdc = read_vdc(VdcConfig(root=str(copy)))
    assert len(vdc.clips) == 5
    assert vdc.clips[2].path.endswith(".MP4")
    assert [entry.answer for entry in vdc.clips[0].questions["main_object"]] == ["this"]
    assert vdc.clips[0].captions["short"] == rows[0]["short_caption"]
    assert vdc.notes == {
        "lines of main_object.jsonl that replace another": 1,
        "questions of main_object.jsonl without question or answer": 2,
        "rows of captions that replace another": 1,
    }


def damage(copy, how):
    if how == "no captions":
        (copy / "VDC_1k.jsonl").unlink()
    elif how == "no questions":
        (copy / "VDCScore_qa" / "camera.jsonl").unlink()
    elif how == "no video":
        (copy / "clips" / "test_0000001.mp4").unlink()
    elif how == "cut captions":
        text = (copy / "VDC_1k.jsonl").read_text()
        (copy / "VDC_1k.jsonl").write_text(text[: len(text) - 40])
    elif how == "empty captions":
        (copy / "VDC_1k.jsonl").write_text("")
    elif how == "list of questions":
        (copy / "VDCScore_qa" / "short.jsonl").write_text('{"test_0000000": "none"}\n')
    elif how == "rows without id":
        (copy / "VDC_1k.jsonl").write_text('{"video_name": "a"}\n')


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("no captions", "found no VDC_1k.jsonl or VDC_1k_captions.jsonl"),
        ("no questions", "found no camera.jsonl"),
        ("no video", "1 of 5 videos are missing, such as test_0000001"),
        ("cut captions", r"VDC_1k.jsonl, line 5: got .* want a JSON object"),
        ("empty captions", "the captions file is empty"),
        ("list of questions", r"short.jsonl, line 1: got no list for 'test_0000000'"),
        ("rows without id", "got no video_id"),
    ],
)
def test_a_damaged_folder_is_named(copy, how, wanted):
    damage(copy, how)
    with pytest.raises(ValueError, match=wanted):
        read_vdc(VdcConfig(root=str(copy)))


def test_missing_and_broken_videos_may_be_left_out(copy, tmp_path, random_checkpoint):
    broken = copy / "clips" / "test_0000003.mp4"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"test_0000003\.mp4.*1 of 5 videos; data\.allow_missing=true"):
        evaluate(settings(tmp_path, random_checkpoint, copy))
    damage(copy, "no video")
    record = evaluate(settings(tmp_path, random_checkpoint, copy, data={"allow_missing": True}))
    assert record["notes"] == {"videos that are missing": 1, "videos that cannot be read": 1}
    assert record["points"][0]["scores"]["categories"]["short"]["videos"] == 3


def test_one_encoding_serves_all_prompts_of_a_clip(random_checkpoint):
    """Prompts differ from clip to clip; ids are those of one `generate` for each, with a fifth of the encoding."""
    model = AuroraForConditionalGeneration.from_pretrained(random_checkpoint)
    processor = AuroraProcessor.from_pretrained(random_checkpoint)
    captioner = StructuredCaptioner(model, processor, {}, max_new_tokens=8)
    clips = list(np.random.default_rng(0).integers(0, 256, (2, 8, 48, 48, 3), dtype=np.uint8))
    asked = [{"short": "Summarize the video.", "camera": "How was it filmed?"}, {"short": "What?", "camera": "Camera?"}]
    encoded = []
    hook = model.model.vision_tower.register_forward_hook(lambda module, args, out: encoded.append(args[0].shape[0]))
    made = captioner.caption(clips, asked, token_kept_ratio=0.25)
    hook.remove()
    assert sum(encoded) == 2 * 8
    for frames, prompts, written in zip(clips, asked, made, strict=True):
        pixels = processor.image_processor.preprocess_frames(frames)[None]
        for name, prompt in prompts.items():
            ids = processor(text=processor.build_prompt(prompt, 8))["input_ids"]
            out = model.generate(ids, pixel_values_videos=pixels, max_new_tokens=8, token_kept_ratio=0.25)
            assert written.captions[name] == processor.decode(out[0], skip_special_tokens=True).strip()
    with pytest.raises(ValueError, match=r"questions: got \[2, 1\] for 2 clips"):
        captioner.caption(clips, [asked[0], {"short": "What?"}])


def test_a_run_reports_and_continues(published, tmp_path, random_checkpoint, capsys, monkeypatch):
    """Through a real server: the second run captions nothing, asks nothing, and says the same."""
    kind = servers.handler()
    with serve(kind) as url:
        config = settings(tmp_path, random_checkpoint, published, JudgeKind.server, judge={"url": url})
        record = evaluate(config)
        asked = sum(kind.seen.values())
        captions = (tmp_path / "out" / "captions.jsonl").read_bytes()
        verdicts = rows_of(tmp_path, "verdicts.jsonl")
        printed = capsys.readouterr().out
        monkeypatch.setattr("aurora.evaluation.clip_captions._caption_batch", None)
        again = evaluate(config)
    assert sum(kind.seen.values()) == asked
    assert (tmp_path / "out" / "captions.jsonl").read_bytes() == captions
    assert again["points"] == record["points"]
    assert len(verdicts) == 5 * sum(map(len, REQUIRED.values()))
    assert {row["status"] for row in verdicts} == {"judged"}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["points"] == record["points"]
    for text in ("main_object", "accuracy (all)", "accuracy (reference)", "CIDEr-D", "exact 0.25", "8 frames"):
        assert text in printed
    rules = evaluate(settings(tmp_path, random_checkpoint, published))
    assert rules["points"][0]["scores"] == record["points"][0]["scores"]


@pytest.mark.parametrize(
    ("behave", "status"), [(servers.garbage, "unparsed"), (servers.always_500, "failed"), (servers.hangs, "failed")]
)
def test_a_bad_judge_leads_to_a_finished_report(published, tmp_path, random_checkpoint, capsys, behave, status):
    with serve(servers.handler(behave)) as url:
        judge = {
            "url": url,
            "retries": 0,
            "timeout_s": 0.3 if behave is servers.hangs else 20.0,
            "concurrency": 25,
            "give_up_after": 25,
        }
        record = evaluate(settings(tmp_path, random_checkpoint, published, JudgeKind.server, judge=judge, num_clips=2))
    scores = record["points"][0]["scores"]
    questions = 2 * sum(map(len, REQUIRED.values()))
    assert (scores["mean"][status], scores["mean"]["judged"], scores["mean"]["questions"]) == (questions, 0, questions)
    assert scores["mean"]["all"] is scores["mean"]["reference"] is None
    assert "none" in capsys.readouterr().out


def test_prompts_are_chosen_by_seed_and_recorded(published, tmp_path, random_checkpoint):
    lists = {name: [f"{name} {number}" for number in range(6)] for name in CATEGORIES}
    (tmp_path / "prompts.json").write_text(json.dumps(lists))
    data = {"prompts_file": str(tmp_path / "prompts.json")}
    record = evaluate(settings(tmp_path, random_checkpoint, published, data=data, num_clips=3))
    rows = rows_of(tmp_path, "captions.jsonl")
    used = [row["prompts"] for row in rows]
    assert all(prompts[name] in lists[name] for prompts in used for name in CATEGORIES)
    assert len({json.dumps(prompts) for prompts in used}) == 3
    assert record["prompts"]["lists"] == lists
    evaluate(settings(tmp_path, random_checkpoint, published, data=data, num_clips=2))
    assert len(rows_of(tmp_path, "captions.jsonl")) == 3
    evaluate(settings(tmp_path, random_checkpoint, published, data=data, num_clips=3, seed=1))
    assert [row["prompts"] for row in rows_of(tmp_path, "captions.jsonl")[3:]] != used


def test_the_experiment_is_the_protocol():
    with initialize_config_module("aurora.configs", version_base="1.3"):
        config = load_config(compose("evaluate", ["experiment=vdc", "data.root=x"]), EvaluateConfig)
        stub = load_config(compose("evaluate", ["experiment=vdc", "judge=stub"]), EvaluateConfig)
    assert (config.benchmark, config.num_frm, config.ratios, config.num_clips) == (Benchmark.vdc, 16, [0.4], None)
    assert config.judge == JudgeConfig(kind=JudgeKind.server)
    assert stub.judge.kind is JudgeKind.stub


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ([], "data.root: no value given"),
        (["data.root=nowhere"], "data.root=nowhere: no such folder"),
        (["data.categories=[short,long]"], "data.categories=['short', 'long']"),
        (["num_clips=0"], "num_clips=0"),
        (["benchmark=tinyvdc"], "num_clips=null"),
        (["num_frm=0"], "num_frm=0"),
        (["judge=rule"], "judge/rule"),
        (["judge.url=nowhere"], "judge.url=nowhere"),
    ],
)
def test_a_mistake_gets_one_line(setting, wanted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.run(run.main, ["experiment=vdc", *setting])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert wanted in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_run_asks_for_nothing_that_it_has(published, tmp_path, random_checkpoint):
    slow = servers.handler(lambda handler, number, tries: time.sleep(0.02))
    with serve(slow) as url:
        command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "experiment=vdc", f"data.root={published}"]
        command += [f"model_path={random_checkpoint}", f"judge.url={url}", "judge.model=m", "judge.concurrency=3"]
        command += ["threads=1", "max_new_tokens=6", f"output={tmp_path / 'out'}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while sum(slow.seen.values()) < 60:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.3)
        before = dict(slow.seen)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        again = sum(count > before.get(key, 0) for key, count in slow.seen.items() if key in before)
    assert 60 <= sum(before.values()) < sum(slow.seen.values())
    assert again <= 3  # those that were under way
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["points"][0]["scores"]["mean"]["judged"] == 5 * sum(map(len, REQUIRED.values()))
    assert report["judge"]["requests"]["cached"] >= 50


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/evaluate.md"])
def test_the_commands_of_the_page_run_word_for_word(tmp_path, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) if "layout=vdc" in block)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "outputs" / "vdc_report" / "report.json").read_text())["points"][0]["scores"]
    assert scores["mean"]["judged"] == 5 * sum(map(len, REQUIRED.values()))
    assert scores["mean"]["all"]["accuracy"] > 0.9
