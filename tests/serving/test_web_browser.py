"""The web page in a browser, on aurora-tiny: real files in, captions out. Screenshots stay in outputs/tests/web."""

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aurora.data.bundled import MEDIA, read_clips
from aurora.data.tinyworld import render_clip, sample_scene
from aurora.visualization.figure import save_picture
from tests.serving.processes import ROOT, server
from tests.visualization.browser import chromium, open_tab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SHOTS = ROOT / "outputs" / "tests" / "web"
CLIP = read_clips(MEDIA)[1]
LONG = 1000
"""New tokens of a caption that takes a while."""
# Text that stands in the first caption while the page says that it is being written.
WRITING = """(known) => {
    const text = document.querySelector("#caption-a textarea").value;
    return text.length > known && document.querySelector("#status").innerText.includes("Captioning with") && text;
}"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server("web") as (address, _):
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
        self.tab = open_tab(browser, viewport={"width": width, "height": 900}, color_scheme=scheme)
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
            self.says("Upload an image")
        self.tab.locator("#file input[type=file]").set_input_files(file)

    def says(self, text: str) -> None:
        self.tab.locator("#status .aurora-note", has_text=text).wait_for()

    def caption(self, side: str = "a") -> str:
        return self.tab.locator(f"#caption-{side} textarea").input_value()

    def start(self) -> None:
        self.tab.locator("button#start:enabled").click()

    def waits_for_caption(self) -> None:
        self.says("Done.")
        self.tab.locator("button#start:enabled").wait_for()

    def type_number(self, slider: str, value: float) -> None:
        box = self.tab.locator(f"#{slider} input[type=number]")
        box.fill(str(value))
        box.blur()
        assert float(box.input_value()) == value

    def ask_for_long_captions(self) -> None:
        self.tab.get_by_label("Compare two side by side").check()
        self.type_number("ratio-b", 0.1)  # so that prompt and caption fit the model
        self.map_says("kept ratio 0.1", "b")
        self.tab.locator("#advanced button").first.click()
        # Its boxes take their values when it has unfolded.
        self.tab.wait_for_function("document.querySelector('#max-new input[type=number]')?.value === '256'")
        self.type_number("max-new", LONG)
        self.type_number("min-new", LONG)

    def writes(self, known: int = 20) -> str:
        """Wait until a caption is being written and longer than `known` letters, and read what is there."""
        return self.tab.wait_for_function(WRITING, arg=known).json_value()

    def keep_shot(self, name: str) -> None:
        self.tab.mouse.move(0, 0)
        self.tab.screenshot(path=SHOTS / f"{name}.png", full_page=True, animations="disabled")

    def map_of(self, side: str = "a") -> str:
        return self.tab.locator(f"#map-{side} img.merged").first.get_attribute("src")

    def map_says(self, text: str | re.Pattern[str], side: str = "a") -> None:
        self.tab.locator(f"#map-{side} h4", has_text=text).wait_for()

    def overflow_px(self) -> int:
        return self.tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def leave(self) -> None:
        self.tab.context.close()


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, address)
    yield visitor
    assert visitor.elsewhere == []
    assert visitor.complaints == []
    visitor.leave()


def test_a_video_is_captioned(visitor: Visitor) -> None:
    visitor.keep_shot("opened")
    visitor.upload(MEDIA / CLIP.file)
    visitor.says("Ready")
    visitor.start()
    visitor.waits_for_caption()
    visitor.keep_shot("video")
    assert CLIP.facts["colour"] in visitor.caption()
    assert CLIP.facts["shape"] in visitor.caption()
    told = visitor.tab.locator("#figures-a").inner_text()
    assert "384 of 1,152 (33%)" in told
    assert re.search(r"decode \d", told)
    assert re.search(r"memory in use\s+\d", told)


def test_a_caption_is_shown_while_it_is_written(visitor: Visitor) -> None:
    visitor.upload(MEDIA / CLIP.file)
    visitor.says("Ready")
    visitor.ask_for_long_captions()
    visitor.start()
    early = visitor.writes()
    later = visitor.writes(len(early))
    assert later.startswith(early)
    assert CLIP.facts["colour"] in later[:200]
    visitor.tab.locator("button#cancel").click()
    visitor.says("Cancelled.")
    assert visitor.caption().startswith(later)


def test_the_map_follows_the_ratio(visitor: Visitor) -> None:
    visitor.upload(MEDIA / CLIP.file)
    visitor.says("Ready")
    before = visitor.map_of()
    track = visitor.tab.locator("#ratio-a input[type=range]")
    box = track.bounding_box()
    track.click(position={"x": 0.6 * box["width"], "y": box["height"] / 2})
    visitor.map_says(re.compile(r"kept ratio 0\.[56]"))
    assert visitor.map_of() != before
    assert int(visitor.tab.locator("#map-a section").get_attribute("data-tokens")) > 500
    visitor.keep_shot("ratio_moved")
    visitor.tab.locator("#map-a figure").first.hover()
    visitor.tab.wait_for_function(
        "getComputedStyle(document.querySelector('#map-a figure:hover img.merged')).opacity === '0'"
    )
    track.focus()
    visitor.tab.keyboard.press("Home")
    visitor.map_says("kept ratio 0.05")
    visitor.tab.get_by_label("budget of the clip").check()
    visitor.map_says("budget 512: 512 of 1,152")
    visitor.type_number("budget-a", 256)
    visitor.map_says("budget 256: 256 of 1,152")


def test_an_image_is_compared_at_two_ratios(visitor: Visitor, tmp_path: Path) -> None:
    frames = render_clip(sample_scene(5, split="test"), num_frames=8, image_size=192)
    visitor.upload(save_picture(frames[4], tmp_path / "still.png"))
    visitor.says("Ready")
    visitor.tab.get_by_label("Compare two side by side").check()
    visitor.map_says("kept ratio 1", "b")
    visitor.tab.get_by_label("main object").check()
    visitor.tab.wait_for_function("document.querySelector('#prompt textarea').value.includes('main object')")
    visitor.start()
    visitor.waits_for_caption()
    visitor.keep_shot("image_compared")
    assert visitor.caption("a")
    assert visitor.caption("b")
    assert visitor.map_of("a") != visitor.map_of("b")
    assert "144 of 144" in visitor.tab.locator("#figures-b").inner_text()


def test_a_run_is_cancelled(visitor: Visitor) -> None:
    visitor.tab.locator("#examples button").nth(2).click()
    visitor.says("Ready")
    visitor.ask_for_long_captions()
    visitor.start()
    visitor.writes()
    visitor.tab.locator("button#cancel").click()
    visitor.says("Cancelled.")
    visitor.tab.locator("button#start:enabled").wait_for()
    visitor.keep_shot("cancelled")
    cut = visitor.caption("a") + visitor.caption("b")
    visitor.tab.wait_for_timeout(1000)  # nothing happens
    assert visitor.caption("a") + visitor.caption("b") == cut
    assert visitor.tab.locator("#figures-b section").count() == 0
    visitor.type_number("min-new", 0)
    visitor.start()  # the model is free again
    visitor.waits_for_caption()


def test_another_file_ends_the_run(visitor: Visitor) -> None:
    visitor.tab.locator("#examples button").nth(2).click()
    visitor.says("Ready")
    visitor.ask_for_long_captions()
    visitor.start()
    visitor.writes()
    visitor.upload(MEDIA / CLIP.file)
    visitor.says("Ready")
    visitor.tab.locator("button#start:enabled").wait_for()
    assert visitor.caption() == ""
    assert visitor.tab.locator("#map-a figure").count() == 8


def test_two_visitors_take_turns(visitor: Visitor, browser: Any, address: str) -> None:
    second = Visitor(browser, address)
    for one, example in ((visitor, 0), (second, 2)):
        one.tab.locator("#examples button").nth(example).click()
        one.says("Ready")
    visitor.ask_for_long_captions()
    visitor.start()
    visitor.writes()
    second.start()
    second.says("Waiting for its turn")
    visitor.tab.locator("button#cancel").click()  # one's own run, not the other's
    visitor.says("Cancelled.")
    second.waits_for_caption()
    assert "green square" in second.caption()
    assert visitor.caption().startswith("The medium blue triangle")
    second.leave()


def test_a_full_queue_is_told(browser: Any) -> None:
    with server("web", "limits.max_waiting=1") as (address, _):
        visitors = [Visitor(browser, address) for _ in range(3)]
        for visitor in visitors:
            visitor.tab.locator("#examples button").first.click()
            visitor.says("Ready")
        first, second, third = visitors
        first.ask_for_long_captions()
        first.start()
        first.writes()
        second.start()
        second.says("Waiting for its turn")
        third.start()
        third.says("Too many captions wait")
        first.tab.locator("button#cancel").click()
        second.waits_for_caption()
        third.start()
        third.waits_for_caption()
        for visitor in visitors:
            assert visitor.complaints == []
            visitor.leave()


def test_a_broken_file_is_refused_in_words(visitor: Visitor, tmp_path: Path) -> None:
    for name, content in (("broken.mp4", (MEDIA / CLIP.file).read_bytes()[:9000]), ("notes.txt", b"no picture")):
        (tmp_path / name).write_bytes(content)
        visitor.upload(tmp_path / name)
        visitor.says(f"{name}: ")
        assert visitor.tab.locator("#status [role=alert]").is_visible()
        assert "/" not in visitor.tab.locator("#status [role=alert]").inner_text(), "it names a place on the server"
        visitor.keep_shot(f"refused_{name.partition('.')[0]}")
    visitor.upload(MEDIA / CLIP.file)
    visitor.says("Ready")


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 390), ("dark", 1280)])
def test_it_fits_phones_and_dark_pages(browser: Any, address: str, scheme: str, width: int) -> None:
    visitor = Visitor(browser, address, width=width, scheme=scheme)
    visitor.tab.locator("#examples button").nth(3).click()
    visitor.says("Ready")
    visitor.tab.get_by_label("Compare two side by side").check()
    visitor.map_says("kept ratio 1", "b")
    visitor.start()
    visitor.waits_for_caption()
    if width < 500:
        assert 0 <= visitor.tab.locator("#caption-a").bounding_box()["y"] < 800, "the caption is out of sight"
    visitor.keep_shot(f"{scheme}_{width}")
    assert visitor.overflow_px() <= 0
    assert visitor.complaints == []
    visitor.leave()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_an_open_page(browser: Any, end: signal.Signals, tmp_path: Path) -> None:
    with server("web", temporary=tmp_path) as (address, process):
        visitor = Visitor(browser, address)
        visitor.upload(MEDIA / CLIP.file)
        visitor.says("Ready")
        (stored,) = tmp_path.glob("aurora-web-*")
        assert list(stored.rglob(CLIP.file))
        process.send_signal(end)
        assert process.wait(timeout=120) == 0
        assert process.stdout.read().strip() == "stopped"
        visitor.leave()
    assert not list(tmp_path.glob("aurora-web-*"))


def test_a_taken_port_is_told(address: str) -> None:
    port = address.rpartition(":")[2]
    said = rf"^error: host=127\.0\.0\.1 port={port}: Address already in use; want a free address, port=0 takes one\n$"
    with pytest.raises(AssertionError, match=said), server("web", f"port={port}"):
        pass
