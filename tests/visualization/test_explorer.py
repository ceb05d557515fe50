"""The page to explore: its data is the trace, it needs nothing but itself, and in a browser its groups light up."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aurora.model.captioner import AuroraModel
from aurora.model.merge import MergeConfig, Schedule
from aurora.model.vision import VisionTrace
from aurora.visualization.explorer import explorer_page
from aurora.visualization.film import TracedRun
from aurora.visualization.merge_map import FrameTrace, Picture, group_colours, to_pictures, trace_frames
from tests.visualization.browser import chromium, open_tab

HEIGHT, WIDTH = 48, 80
TITLE = 'a "clip" </script><b>&amp; löwe.mp4'


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    pixels = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    return to_pictures(pixels, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.fixture(scope="module")
def runs(small_model: AuroraModel) -> list[TracedRun]:
    pixels = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    wishes = [MergeConfig(token_kept_ratio=ratio, schedule=Schedule.exact) for ratio in (0.2, 1.0, 0.5)]
    return [TracedRun(f"kept ratio {w.token_kept_ratio:g}", trace_frames(small_model, pixels, w)) for w in wishes]


@pytest.fixture(scope="module")
def page(pictures: list[Picture], runs: list[TracedRun]) -> str:
    return explorer_page(pictures, runs, title=TITLE, seconds=[0.0, 1.5])


def _data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_the_trace(page: str, runs: list[TracedRun]) -> None:
    data = _data(page)
    assert data["title"] == TITLE
    assert (data["grid"], data["size"], data["seconds"]) == ([6, 10], [WIDTH, HEIGHT], [0.0, 1.5])
    ordered = [runs[1], runs[2], runs[0]]  # from the most tokens to the fewest
    assert [run["name"] for run in data["runs"]] == [run.name for run in ordered]
    for stored, run in zip(data["runs"], ordered, strict=True):
        assert stored["tokens"] == run.token_counts().tolist()
        for frame, packed in enumerate(stored["groups"]):
            groups = np.frombuffer(base64.b64decode(packed), dtype="<u2").reshape(4, 6, 10)
            assert np.array_equal(groups, np.stack([run.groups(frame, layer) for layer in range(4)]))
    merged = data["runs"][2]["similarity"][1]
    trace, row = runs[0].traces[1]
    np.testing.assert_allclose(merged, [np.median(s[row].numpy()) for s in trace.similarities], atol=1e-4)
    assert data["runs"][0]["similarity"] == [[None] * 4] * 2


def test_the_page_is_one_file_and_fetches_nothing(page: str) -> None:
    assert "{{DATA}}" not in page
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<script[^>]+src=|@import|fetch\(|XMLHttpRequest|WebSocket|url\(", page)
    assert "default-src 'none'" in page
    assert page.count("</script>") == 2  # the title ended none


def test_what_makes_no_page_is_refused(pictures: list[Picture], runs: list[TracedRun]) -> None:
    with pytest.raises(ValueError, match=r"runs: got \[\]"):
        explorer_page(pictures, [], title="")
    with pytest.raises(ValueError, match=r"got \[2, 2, 2\] traced frames.*each over 1 frames"):
        explorer_page(pictures[:1], runs, title="")
    huge = VisionTrace((257, 256), 0, [torch.ones(1, 1, 1)], [torch.zeros(1, 257 * 256).long()], [torch.zeros(1, 0)])
    with pytest.raises(ValueError, match=r"got 65792 patches a frame, want at most 65536"):
        explorer_page(pictures[:1], [TracedRun("a", [FrameTrace(huge, 0)])], title="")


@pytest.fixture(scope="module")
def file(page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explorer") / "page to explore.html"
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def tab(browser: Any, file: Path) -> Iterator[Any]:
    """The page from disk without a network; nothing is requested, and nothing goes wrong in its script."""
    tab = open_tab(browser, offline=True, viewport={"width": 1000, "height": 900})
    problems, requests = [], []
    tab.on("console", lambda message: message.type == "error" and problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(file.as_uri())
    tab.wait_for_selector("html[data-ready=yes]")
    yield tab
    assert problems == []
    assert {url.partition("#")[0] for url in requests if not url.startswith("data:")} == {file.as_uri()}
    tab.context.close()


def _centre(tab: Any, canvas: str, row: int, column: int) -> tuple[float, float]:
    box = tab.locator(canvas).bounding_box()
    return box["x"] + (column + 0.5) / 10 * box["width"], box["y"] + (row + 0.5) / 6 * box["height"]


def _pixel(tab: Any, canvas: str, row: int, column: int) -> list[int]:
    """Colour of the middle of a patch, where no outline runs."""
    script = """([id, row, column]) => { const canvas = document.querySelector(id);
        const at = [(column + 0.5) / 10 * canvas.width, (row + 0.5) / 6 * canvas.height].map(Math.floor);
        return [...canvas.getContext("2d").getImageData(...at, 1, 1).data].slice(0, 3); }"""
    return tab.evaluate(script, [canvas, row, column])


@pytest.mark.slow
@pytest.mark.parametrize("canvas", ["#original", "#map"])
def test_pointing_at_a_patch_lights_up_its_group(
    tab: Any, canvas: str, runs: list[TracedRun], pictures: list[Picture]
) -> None:
    tab.locator("#run").fill("2")
    groups = runs[0].groups(0)
    colours = np.rint(group_colours(pictures[0], groups)).astype(int)
    for row, column in np.ndindex(groups.shape):
        assert _pixel(tab, "#map", row, column) == colours[groups[row, column]].tolist()
    largest = int(np.bincount(groups.ravel()).argmax())
    row, column = (int(index) for index in np.argwhere(groups == largest)[-1])
    tab.mouse.move(*_centre(tab, canvas, row, column))
    tab.wait_for_selector(f"#map[data-group='{largest}']")
    said = tab.locator("#status").inner_text()
    assert f"Token {largest + 1} of 12: {(groups == largest).sum()} patches" in said
    assert f"row {row + 1}, column {column + 1}" in said
    for other in np.argwhere(groups != largest)[::5].tolist():  # all others step back
        assert _pixel(tab, "#map", *other) != colours[groups[tuple(other)]].tolist()
    assert _pixel(tab, "#map", row, column) == colours[largest].tolist()
    tab.mouse.move(5, 5)
    tab.wait_for_selector("#map[data-group='']")


@pytest.mark.slow
def test_sliders_choose_ratio_layer_and_frame(tab: Any, runs: list[TracedRun]) -> None:
    heading = tab.locator("#mapTitle")
    tab.locator("#run").fill("2")
    assert "12 of 60 tokens" in heading.inner_text()
    tab.locator("#run").focus()
    tab.keyboard.press("ArrowLeft")
    assert "30 of 60 tokens" in heading.inner_text()
    assert tab.locator("#run").get_attribute("aria-valuetext") == "0.5"
    tab.locator("#layer").fill("1")
    assert f"{runs[2].token_counts()[0, 1]} of 60 tokens" in heading.inner_text()
    tab.locator("#layer").fill("0")
    assert "60 of 60 tokens" in heading.inner_text()
    before = _pixel(tab, "#map", 2, 2)
    tab.locator("#frame").fill("1")
    assert _pixel(tab, "#map", 2, 2) != before
    assert tab.locator("#frameName").inner_text() == "2 of 2, 1.5 s"


@pytest.mark.slow
def test_the_keyboard_reaches_everything(tab: Any, runs: list[TracedRun]) -> None:
    tab.locator("#run").fill("2")
    seen = []
    for _ in range(9):
        tab.keyboard.press("Tab")
        seen.append(tab.evaluate("document.activeElement.id"))
    assert {"layer", "frame", "play", "borders", "original", "map"} <= set(seen)
    tab.locator("#map").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        tab.keyboard.press(key)
    assert tab.locator("#map").get_attribute("data-group") == str(runs[0].groups(0)[1, 1])
    tab.mouse.move(*_centre(tab, "#map", 5, 9))  # held: the pointer changes nothing
    assert "row 2, column 2. Held." in tab.locator("#status").inner_text()
    tab.keyboard.press("Escape")
    assert tab.locator("#map").get_attribute("data-group") == ""


@pytest.mark.slow
def test_the_layers_play_and_a_view_can_be_linked_to(tab: Any, file: Path) -> None:
    tab.evaluate("""() => {
        window.shown = [];
        const name = document.querySelector("#layerName");
        new MutationObserver(() => window.shown.push(name.textContent)).observe(name, { childList: true });
    }""")
    tab.locator("#play").click()
    tab.locator("#play[aria-pressed=false]").wait_for()
    assert tab.evaluate("window.shown") == ["0 of 4: patches", "1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    tab.goto("about:blank")
    tab.goto(file.as_uri() + "#run=2&layer=3&frame=1&patch=59&held=7&run=99&title=x")
    tab.wait_for_selector("html[data-ready=yes]")
    assert (tab.locator("#layerName").inner_text(), tab.locator("#runName").inner_text()) == ("3 of 4", "0.2")
    assert "row 6, column 10. Held." in tab.locator("#status").inner_text()


@pytest.mark.slow
def test_light_and_dark_follow_the_reader_and_the_button(browser: Any, file: Path, tmp_path: Path) -> None:
    papers = {}
    for scheme, width in (("light", 1200), ("dark", 1200), ("dark", 390)):
        tab = open_tab(browser, offline=True, color_scheme=scheme, viewport={"width": width, "height": 800})
        tab.goto(file.as_uri())
        tab.wait_for_selector("html[data-ready=yes]")
        paper = "getComputedStyle(document.body).backgroundColor"
        papers[scheme] = tab.evaluate(paper)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
        tab.screenshot(path=tmp_path / f"{scheme}_{width}.png", full_page=True)
        tab.locator("#theme").click()
        assert tab.evaluate(paper) == "rgb(255, 255, 255)"
        tab.locator("#theme").click()
        assert tab.evaluate(paper) == "rgb(13, 17, 23)"
        tab.context.close()
    assert papers == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}
