"""The web page in a browser, on aurora-tiny: real files in, captions out. Screenshots stay in outputs/tests/web."""

import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aurora.data.bundled import MEDIA, read_clips
from aurora.data.tinyworld import render_clip, sample_scene
from aurora.visualization.figure import save_picture
from tests.serving.web_process import ROOT, web_page
from tests.visualization.browser import chromium

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SHOTS = ROOT / "outputs" / "tests" / "web"
CLIP = read_clips(MEDIA)[1]
RECORD = """() => {
    window.texts = [];
    const look = () => {
        const text = document.querySelector("#caption-a textarea").value;
        if (text && text !== window.texts.at(-1)) window.texts.push(text);
        window.requestAnimationFrame(look);
    };
    look();
}"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with web_page() as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    shutil.rmtree(SHOTS, ignore_errors=True)
    SHOTS.mkdir(parents=True)
    with chromium() as started:
        yield started


class Visitor:
    """Somebody at the page."""

    def __init__(self, browser: Any, address: str, *, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.tab = self.context.new_page()
        self.elsewhere: list[str] = []
        self.complaints: list[str] = []
        self.tab.on("request", lambda request: self._note(request.url, address))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.tab.goto(address)
        self.tab.locator("button#start").wait_for()
        self.tab.locator(".aurora-note").wait_for()

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def upload(self, file: Path) -> None:
        if self.tab.locator("#file button[aria-label='Clear']").count():
            self.tab.locator("#file button[aria-label='Clear']").click()
        self.tab.locator("#file input[type=file]").set_input_files(file)

    def says(self, text: str) -> None:
        self.tab.locator("#status .aurora-note", has_text=text).wait_for(timeout=60_000)

    def caption(self, side: str = "a") -> str:
        return self.tab.locator(f"#caption-{side} textarea").input_value()

    def start(self) -> None:
        self.tab.locator("button#start").click()

    def type_number(self, slider: str, value: float) -> None:
        box = self.tab.locator(f"#{slider} input[type=number]")
        box.fill(str(value))
        box.blur()
        assert float(box.input_value()) == value

    def keep_shot(self, name: str) -> None:
        self.tab.mouse.move(0, 0)
        self.tab.wait_for_timeout(400)  # for fades
        self.tab.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def map_of(self, side: str = "a") -> str:
        return self.tab.locator(f"#map-{side} img.merged").first.get_attribute("src")

    def overflow_px(self) -> int:
        return self.tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, address)
    yield visitor
    assert visitor.elsewhere == []
    assert visitor.complaints == []
    visitor.context.close()


def test_a_video_is_captioned_word_by_word(visitor: Visitor) -> None:
    visitor.keep_shot("opened")
    visitor.upload(MEDIA / CLIP.file)
    visitor.says("Ready")
    visitor.tab.evaluate(RECORD)
    visitor.start()
    visitor.says("Done.")
    visitor.keep_shot("video")
    texts = visitor.tab.evaluate("window.texts")
    assert len(texts) >= 2, "the caption came at once"
    assert all(texts[-1].startswith(text) for text in texts)
    assert CLIP.facts["colour"] in texts[-1]
    assert CLIP.facts["shape"] in texts[-1]
    told = visitor.tab.locator("#figures-a").inner_text()
    assert "384 of 1,152 (33%)" in told
    assert re.search(r"decode \d", told)
    assert re.search(r"memory in use\s+\d", told)


def test_the_map_follows_the_ratio(visitor: Visitor) -> None:
    visitor.upload(MEDIA / CLIP.file)
    visitor.says("Ready")
    before = visitor.map_of()
    track = visitor.tab.locator("#ratio-a input[type=range]")
    box = track.bounding_box()
    visitor.tab.mouse.click(box["x"] + 0.6 * box["width"], box["y"] + box["height"] / 2)
    visitor.tab.locator("#map-a h4", has_text=re.compile(r"kept ratio 0\.[56]")).wait_for()
    assert visitor.map_of() != before
    assert int(visitor.tab.locator("#map-a section").get_attribute("data-tokens")) > 500
    figure = visitor.tab.locator("#map-a figure").first
    figure.hover()
    visitor.tab.wait_for_timeout(400)
    assert figure.locator("img.merged").evaluate("image => getComputedStyle(image).opacity") == "0"
    visitor.keep_shot("ratio_moved")
    visitor.tab.get_by_label("budget of the clip").check()
    visitor.tab.locator("#map-a h4", has_text="budget 512: 512 of 1,152").wait_for()
    visitor.type_number("budget-a", 256)
    visitor.tab.locator("#map-a h4", has_text="budget 256: 256 of 1,152").wait_for()


def test_an_image_is_compared_at_two_ratios(visitor: Visitor, tmp_path: Path) -> None:
    frames = render_clip(sample_scene(5, split="test"), num_frames=8, image_size=192)
    visitor.upload(save_picture(frames[4], tmp_path / "still.png"))
    visitor.says("Ready")
    visitor.tab.get_by_label("Compare two side by side").check()
    visitor.tab.get_by_label("main object").check()
    visitor.start()
    visitor.says("Done.")
    visitor.keep_shot("image_compared")
    assert "main object" in visitor.tab.locator("#prompt textarea").input_value()
    assert visitor.caption("a")
    assert visitor.caption("b")
    assert visitor.map_of("a") != visitor.map_of("b")
    assert "144 of 144" in visitor.tab.locator("#figures-b").inner_text()


def test_a_run_is_cancelled(visitor: Visitor) -> None:
    visitor.tab.locator("#examples button").nth(2).click()
    visitor.says("Ready")
    visitor.tab.locator("#advanced button").first.click()
    visitor.tab.wait_for_timeout(500)  # it unfolds, and its boxes take their values
    visitor.type_number("max-new", 1000)
    visitor.type_number("min-new", 1000)
    visitor.start()
    visitor.tab.wait_for_function("document.querySelector('#caption-a textarea').value.length > 20")
    visitor.tab.locator("button#cancel").click()
    visitor.says("Cancelled.")
    visitor.keep_shot("cancelled")
    cut = visitor.caption()
    visitor.tab.wait_for_timeout(1000)
    assert visitor.caption() == cut
    assert visitor.tab.locator("#figures-a section").count() == 0
    assert visitor.tab.locator("button#start").is_enabled()
    visitor.type_number("min-new", 0)
    visitor.start()  # the model is free again
    visitor.says("Done.")


def test_a_broken_file_is_refused_in_words(visitor: Visitor, tmp_path: Path) -> None:
    for name, content in (("broken.mp4", (MEDIA / CLIP.file).read_bytes()[:9000]), ("notes.txt", b"no picture")):
        (tmp_path / name).write_bytes(content)
        visitor.upload(tmp_path / name)
        visitor.says(f"{name}: ")
        assert visitor.tab.locator("#status [role=alert]").is_visible()
        assert str(Path(tempfile.gettempdir())) not in visitor.tab.locator("#status").inner_text()
        visitor.keep_shot(f"refused_{name.partition('.')[0]}")
    visitor.upload(MEDIA / CLIP.file)
    visitor.says("Ready")


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 390), ("dark", 1280)])
def test_it_fits_phones_and_dark_pages(browser: Any, address: str, scheme: str, width: int) -> None:
    visitor = Visitor(browser, address, width=width, scheme=scheme)
    visitor.tab.locator("#examples button").nth(3).click()
    visitor.says("Ready")
    visitor.tab.get_by_label("Compare two side by side").check()
    visitor.start()
    visitor.says("Done.")
    visitor.keep_shot(f"{scheme}_{width}")
    assert visitor.overflow_px() <= 0
    visitor.context.close()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_an_open_page(browser: Any, end: signal.Signals) -> None:
    def stored() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob("aurora-web-*"))

    before = stored()
    with web_page() as (address, process):
        visitor = Visitor(browser, address)
        visitor.tab.locator("#examples button").first.click()
        visitor.says("Ready")
        assert len(stored() - before) == 1
        began = time.monotonic()
        process.send_signal(end)
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - began < 10
        assert process.stdout.read().strip() == "stopped"
        visitor.context.close()
    assert stored() == before


def test_a_taken_port_is_told(address: str) -> None:
    port = address.rpartition(":")[2]
    said = rf"error: host=127\.0\.0\.1 port={port}: .*want a free address"
    with pytest.raises(AssertionError, match=said), web_page(f"port={port}"):
        pass
