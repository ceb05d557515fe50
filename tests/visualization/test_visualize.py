"""The verb `visualize`: figures of images and clips, through the command line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aurora.cli import run
from aurora.data.tinyworld import render_clip, sample_scene, write_mp4
from aurora.model.merge import MergeConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.image import AuroraImageProcessor
from aurora.processing.video import load_visual
from aurora.visualization.merge_map import trace_frames
from aurora.visualization.visualize import TracedRun, VisualizeConfig, main, seen_pictures, visualize

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
    assert f"{figure.shape[1]}x{figure.shape[0]}" in printed


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["visual_input=nowhere.mp4"], ["nowhere.mp4"]),
        (["visual_input=x.png", "token_kept_ratio=[0.5,1.5]"], ["token_kept_ratio", "1.5", "(0, 1]"]),
        (["visual_input=x.png", "token_kept_ratio=[]"], ["token_kept_ratio=[]", "at least one"]),
        (["visual_input=x.png", "output=figure.jpg"], ["output=figure.jpg", ".png"]),
        (["visual_input=x.png", "num_frm=0"], ["num_frm=0"]),
        (["visual_input=x.png", "layers=[1]"], ["layers", "did you mean layer?"]),
        ([], ["visual_input"]),
    ],
    ids=["path", "ratio", "no ratio", "output", "frames", "typo", "nothing"],
)
def test_mistakes_get_one_line(
    arguments: list[str], words: list[str], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [f"output={tmp_path / 'out.png'}"] if not any(a.startswith("output=") for a in arguments) else []
    with pytest.raises(SystemExit) as stopped:
        _draw(*arguments, f"model_path={tiny_checkpoint}", *output)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    for word in words:
        assert word in printed
    assert not list(tmp_path.iterdir())
