"""The verb `visualize`: figures of images and clips, through the command line."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aurora.cli import run
from aurora.data.tinyworld import render_clip, sample_scene, write_mp4
from aurora.model.merge import MergeConfig, Schedule
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.image import AuroraImageProcessor, ImageConfig
from aurora.processing.video import load_visual
from aurora.visualization.merge_map import trace_frames
from aurora.visualization.visualize import TracedRun, VisualizeConfig, main, seen_pictures, trace_runs, visualize

_PAPER = 255


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "a clip (1), [2].mp4"
    write_mp4(render_clip(sample_scene(3), num_frames=6, image_size=64), path)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(path)
    return path


def _draw(*arguments: str) -> None:
    run(main, list(arguments))


def _pictures_across(figure: np.ndarray, y: int) -> int:
    """Count the pictures that a horizontal line meets: runs of 30 or more pixels that are not paper."""
    inked = np.concatenate([[False], (figure[y] != _PAPER).any(-1), [False]])
    edges = np.flatnonzero(np.diff(inked.astype(int)))
    return int((edges[1::2] - edges[::2] >= 30).sum())


def test_an_image_stands_beside_its_maps(
    image: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures" / "merged.png"
    _draw(f"visual_input={image}", f"model_path={tiny_checkpoint}", f"output={output}", "token_kept_ratio=[0.5,0.1]")
    figure = np.asarray(Image.open(output))
    assert _pictures_across(figure, figure.shape[0] // 2) == 3  # original and two ratios
    printed = capsys.readouterr().out
    assert str(output) in printed
    assert "kept ratio 0.5  40 of 64 visual tokens" in printed


def test_a_clip_becomes_a_film_strip(clip: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "strip.png"
    _draw(f"visual_input={clip}", f"model_path={tiny_checkpoint}", f"output={output}", "num_frm=4", "layer=[0,-1]")
    figure = np.asarray(Image.open(output))
    assert _pictures_across(figure, figure.shape[0] - 40) == 4
    assert figure.shape[0] > 7 * 168  # the original, and two layers of three ratios


def test_merging_settings_reach_the_picture(image: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    figures = []
    for index, setting in enumerate(["merge.schedule=constant", "merge.schedule=exact", "borders=false"]):
        output = tmp_path / f"{index}.png"
        _draw(f"visual_input={image}", f"model_path={tiny_checkpoint}", f"output={output}", setting)
        figures.append(np.asarray(Image.open(output)))
    assert not np.array_equal(figures[0], figures[1])
    assert not np.array_equal(figures[0], figures[2])


def test_labels_state_what_the_encoder_delivers(clip: Path, tiny_checkpoint: Path) -> None:
    model = AuroraForConditionalGeneration.from_pretrained(tiny_checkpoint).model
    pixels = AuroraImageProcessor.from_pretrained(tiny_checkpoint).preprocess_frames(load_visual(clip, 2).frames)
    merge = MergeConfig(token_kept_ratio=0.3)
    plan = model.plan(2, 64, 64, merge)[0]
    run_ = TracedRun("kept 0.3", trace_frames(model, pixels, merge))
    assert run_.labels(1) == f"kept 0.3\n{plan.num_visual_tokens} of 64 tokens"
    assert run_.labels(0, layer=0) == f"kept 0.3\n{plan.tokens[1]} of 64 tokens"


def test_pictures_are_what_the_tower_sees(image: Path, tiny_checkpoint: Path) -> None:
    processor = AuroraImageProcessor.from_pretrained(tiny_checkpoint)
    pixels = processor(Image.open(image))
    (whole,), (cut,) = seen_pictures(pixels, processor, 8), seen_pictures(pixels, processor, 14)
    assert whole.shape == (64, 64, 3)
    assert np.array_equal(cut, whole[:56, :56])  # what fills no patch is not drawn
    again = processor(Image.fromarray(whole))
    assert (again - pixels).abs().max() < 1e-5


def test_layers_that_do_not_run_are_refused(image: Path, tiny_checkpoint: Path) -> None:
    model = AuroraForConditionalGeneration.from_pretrained(tiny_checkpoint).model
    processor = AuroraImageProcessor.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match=r"layer=4: want -4 to 3"):
        visualize(model, processor, load_visual(image, 1), VisualizeConfig(visual_input=str(image), layer=[4]))


def test_counts_are_delivered_exactly(image: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = AuroraForConditionalGeneration.from_pretrained(tiny_checkpoint).model
    model.config.feature_layer = -1
    pixels = AuroraImageProcessor(ImageConfig(image_size=216))(Image.open(image))
    config = VisualizeConfig(visual_input="x.png", tokens=[490, 154, 23], image_size=216)
    assert [run.token_counts()[0, -1] for run in trace_runs(model, pixels, config)] == [490, 154, 23]


def test_a_budget_and_a_list_are_drawn_once_under_their_name(clip: Path, tiny_checkpoint: Path) -> None:
    model = AuroraForConditionalGeneration.from_pretrained(tiny_checkpoint).model
    pixels = AuroraImageProcessor.from_pretrained(tiny_checkpoint).preprocess_frames(load_visual(clip, 2).frames)
    for merge, name, count in (
        (MergeConfig(visual_token_budget=40), "visual token budget=40", 20),
        (MergeConfig(schedule=Schedule.list, r=[10, 0, 5, 1]), "r=[10, 0, 5, 1]", 48),
    ):
        (run_,) = trace_runs(model, pixels, VisualizeConfig(visual_input="x.png", merge=merge))
        assert (run_.name, run_.token_counts()[:, -1].tolist()) == (name, [count, count])


def test_the_papers_panel_of_490_154_18_and_6_tokens(image: Path, tmp_path: Path) -> None:
    output = tmp_path / "panel.svg"
    _draw(
        f"visual_input={image}", f"output={output}", "image_size=216", "feature_layer=-1", "tokens=[490,154,18,6]"
    )  # fmt: skip
    _, *maps = output.read_text().split('<g shape-rendering="crispEdges">')
    sizes = [[int(size) for size in re.findall(r'data-patches="(\d+)"', text)] for text in maps]
    assert [len(groups) for groups in sizes] == [490, 154, 18, 6]
    assert [sum(groups) for groups in sizes] == [729] * 4


@pytest.mark.parametrize("ending", [".png", ".svg", ".gif", ".mp4", ".html"])
@pytest.mark.parametrize("aspect_ratio", ["crop", "native"])
def test_every_ending_is_written_for_images_and_clips(
    ending: str, aspect_ratio: str, image: Path, clip: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    starts = {".png": b"\x89PNG", ".svg": b"<svg ", ".gif": b"GIF89a", ".mp4": b"\0\0\0", ".html": b"<!doctype html>"}
    for name, source in (("image", image), ("clip", clip)):
        output = tmp_path / f"{name}{ending}"
        _draw(
            f"visual_input={source}", f"model_path={tiny_checkpoint}", f"output={output}", "num_frm=3", "theme=dark",
            f"image_aspect_ratio={aspect_ratio}",
        )  # fmt: skip
        assert output.read_bytes().startswith(starts[ending])
    if ending == ".gif":  # a step for each layer, and for each frame
        assert [Image.open(tmp_path / f"{name}.gif").n_frames for name in ("image", "clip")] == [4, 3]
    if ending == ".html" and aspect_ratio == "native":
        assert '"grid":[10,8]' in (tmp_path / "image.html").read_text()  # 90 x 70 pixels


@pytest.mark.parametrize("figure", ["sizes", "similarity", "budget"])
def test_charts_are_figures_too(figure: str, clip: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for ending in (".png", ".svg"):
        output = tmp_path / f"chart{ending}"
        _draw(
            f"visual_input={clip}", f"model_path={tiny_checkpoint}", f"output={output}", f"figure={figure}", "num_frm=3"
        )
        assert output.stat().st_size > 5000


def test_a_failed_drawing_leaves_the_old_file(
    image: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "figure.png"
    output.write_bytes(b"before")

    def full_disk(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(SystemExit):
        _draw(f"visual_input={image}", f"model_path={tiny_checkpoint}", f"output={output}")
    assert output.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [output]


def test_a_file_in_place_of_the_folder_is_told(
    image: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        _draw(f"visual_input={image}", f"model_path={tiny_checkpoint}", f"output={tmp_path / 'file' / 'a.png'}")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: a file, want a folder\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["visual_input=nowhere.mp4"], ["nowhere.mp4"]),
        (["visual_input=x.png", "token_kept_ratio=[0.5,1.5]"], ["token_kept_ratio", "1.5", "(0, 1]"]),
        (["visual_input=x.png", "token_kept_ratio=[]"], ["token_kept_ratio=[]", "at least one"]),
        (["visual_input=x.png", "output=figure.jpg"], ["output=figure.jpg", ".png", ".html"]),
        (["visual_input=x.png", "figure=sizes", "output=a.gif"], ["figure=sizes", ".svg", "a.gif"]),
        (["visual_input=x.png", "figure=sizes", "layer=[0,1]"], ["layer=[0, 1]", "one layer", "figure=sizes"]),
        (["visual_input=x.png", "tokens=[5]", "token_kept_ratio=[0.5]"], ["tokens=[5]", "one of them"]),
        (["visual_input=x.png", "tokens=[0]"], ["tokens=[0]", "at least 1"]),
        (["visual_input={image}", "tokens=[65]"], ["tokens=[65]", "64 patches"]),
        (["visual_input={image}", "tokens=[1]"], ["1 of 64", "at least 4"]),
        (["visual_input={image}", "feature_layer=-9"], ["feature_layer=-9", "-6"]),
        (["visual_input={image}", "image_size=5"], ["5x5", "patch"]),
        (["visual_input=x.png", "fps=51"], ["fps=51", "1 to 50"]),
        (
            ["visual_input=x.png", "merge.visual_token_budget=40", "token_kept_ratio=[0.5]"],
            ["merge.visual_token_budget=40", "without token_kept_ratio"],
        ),
        (["visual_input=x.png", "num_frm=0"], ["num_frm=0"]),
        (["visual_input=x.png", "layers=[1]"], ["layers", "did you mean layer?"]),
        ([], ["visual_input"]),
    ],
    ids=[
        "path",
        "ratio",
        "no ratio",
        "output",
        "kind",
        "layers",
        "both",
        "no token",
        "many",
        "few",
        "depth",
        "small",
        "speed",
        "budget",
        "frames",
        "typo",
        "nothing",
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str],
    words: list[str],
    image: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [argument.replace("{image}", str(image)) for argument in arguments]
    output = [f"output={tmp_path / 'out.png'}"] if not any(a.startswith("output=") for a in arguments) else []
    with pytest.raises(SystemExit) as stopped:
        _draw(*arguments, f"model_path={tiny_checkpoint}", *output)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    for word in words:
        assert word in printed
    assert not list(tmp_path.iterdir())
