from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from aurora.captioning import BUNDLED_MODEL
from aurora.data.bundled import MEDIA, read_clips
from aurora.serving import web
from aurora.serving.limits import Limits
from aurora.serving.web import MAX_MESSAGE_BYTES, Gate, WebConfig, make_app, serve
from aurora.serving.web_page import BUDGET, SHARE, Page
from aurora.serving.web_runs import BUNDLED, FOLDER, HUB_ID, Models

CLIP = MEDIA / read_clips(MEDIA)[0].file
VISITOR = SimpleNamespace(session_hash="visitor")


@pytest.fixture(scope="module")
def models() -> Models:
    models = Models(WebConfig(device="cpu"), any_model=True)
    models.load(str(BUNDLED_MODEL))
    return models


@pytest.fixture(scope="module")
def page(models) -> Page:
    return Page(models, Limits())


def values(page: Page, **changed: object) -> dict:
    """What the page holds when it opens, with changes by attribute name."""
    boxes = [box for box in vars(page).values() if hasattr(box, "value")] + page.ratios + page.budgets
    held = {box: box.value for box in boxes} | {page.file: str(CLIP)}
    return held | {getattr(page, name): value for name, value in changed.items()}


def outcome(page: Page, held: dict) -> dict:
    """All that a run showed, the last of each component."""
    page.begin(VISITOR)
    shown: dict = {}
    for step in page.run(held, VISITOR):
        shown |= step
    return shown


def test_the_page_opens_with_what_the_scripts_use(page):
    (wish,) = page.wishes(values(page))
    assert wish.merge.token_kept_ratio == 0.2
    assert wish.num_frames == 8
    assert wish.prompt == "Describe the video in detail."
    assert wish.sampling.temperature == 0


def test_a_run_streams_and_ends(page):
    page.begin(VISITOR)
    steps = list(page.run(values(page), VISITOR))
    captions = [step[page.captions[0]] for step in steps if page.captions[0] in step]
    assert len(captions) >= 3
    assert "triangle" in captions[-1]
    assert sum(page.maps[0] in step for step in steps) == 1
    assert "384 of 1,152" in steps[-2][page.figures[0]]
    assert "Done." in steps[-1][page.status]
    assert not page.sessions.cancel("visitor"), "the run is forgotten"


def test_two_ratios_stand_side_by_side(page):
    shown = outcome(page, values(page, compare=True))
    assert "384 of 1,152" in shown[page.figures[0]]
    assert "1,152 of 1,152" in shown[page.figures[1]]
    assert shown[page.maps[0]] != shown[page.maps[1]]
    assert shown[page.captions[1]]


def test_a_budget_is_kept(page):
    held = values(page, amount=BUDGET) | {page.budgets[0]: 256}
    assert "256 of 1,152" in outcome(page, held)[page.figures[0]]


def test_looking_draws_the_map_of_the_ratio(page):
    few, many = (page.look(values(page) | {page.ratios[0]: ratio}, VISITOR)[page.maps[0]] for ratio in (0.1, 0.8))
    assert "kept ratio 0.1" in few
    assert few != many


def test_looking_with_a_model_that_is_not_loaded_loads_nothing(page, models, tmp_path):
    shown = page.look(values(page, model=FOLDER, typed=str(tmp_path)), VISITOR)
    assert "192x192 pixels" in shown[page.status]
    assert shown[page.maps[0]] == ""
    assert models.ready(str(BUNDLED_MODEL)) is not None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"file": None}, "no file yet"),
        ({"frames": 99}, "frames=99: want 1 to 32"),
        ({"prompt": ""}, "prompt: is empty"),
        ({"model": HUB_ID, "typed": "x"}, "hub id x: want owner/name"),
        ({"top_p": 7}, "top_p=7"),
        ({"min_new": 300}, "min_new_tokens=300"),
    ],
)
def test_mistakes_are_told(page, changed, message):
    shown = outcome(page, values(page, **changed))
    assert message in shown[page.status]
    assert 'role="alert"' in shown[page.status]


def test_a_broken_upload_is_named_as_its_visitor_knows_it(page, tmp_path):
    file = tmp_path / "broken.mp4"
    file.write_bytes(CLIP.read_bytes()[:5000])
    held = values(page, file=str(file))
    for shown in (page.look(held, VISITOR), outcome(page, held)):
        assert "broken.mp4: " in shown[page.status]
        assert str(tmp_path) not in shown[page.status]


def test_a_run_can_be_cancelled_before_and_while_it_runs(page):
    page.begin(VISITOR)
    assert "Cancelling" in page.stop(VISITOR)["value"]
    assert "Cancelled before" in list(page.run(values(page), VISITOR))[-1][page.status]
    page.begin(VISITOR)
    held = values(page, min_new=600, max_new=600)
    shown: dict = {}
    for step in page.run(held, VISITOR):
        shown |= step
        if shown.get(page.captions[0]):
            page.stop(VISITOR)
    assert "Cancelled." in shown[page.status]
    assert page.figures[0] not in shown


def test_another_file_ends_the_run_and_leaves_nothing_of_it(page):
    held = values(page, min_new=600, max_new=600)
    page.begin(VISITOR)
    shown: dict = {}
    for step in page.run(held, VISITOR):
        shown |= step
        if shown.get(page.captions[0]):
            page.clear(str(CLIP), VISITOR)
    assert "Reading" in shown[page.status]
    assert {shown[box] for box in (*page.captions, *page.figures, *page.maps)} == {""}


def test_a_redrawn_map_does_not_talk_over_a_run(page):
    held = values(page)
    assert "Ready" in page.look(held, VISITOR)[page.status]
    page.begin(VISITOR)  # it waits for its turn while the map is drawn
    assert page.status not in page.look(held, VISITOR)
    assert "Done." in outcome(page, held)[page.status]
    assert page.status not in page.look(held, VISITOR), "Done. stays while the maps are those of the caption"
    assert "Ready" in page.look(held | {page.ratios[0]: 0.4}, VISITOR)[page.status]


def test_a_run_that_finds_no_place_in_the_queue_is_refused_at_once(models):
    page = Page(models, Limits(max_waiting=1))
    for other in ("works", "waits"):
        page.begin(SimpleNamespace(session_hash=other))
    start, _, status, *_ = page.begin(VISITOR)
    assert start == gr.skip(), "the button can be pressed again"
    assert "Too many" in status
    assert list(page.run(values(page), VISITOR)) == []
    page.sessions.end("works")
    assert "Done." in outcome(page, values(page))[page.status]


def test_a_model_that_is_still_to_be_named_is_no_mistake(page):
    shown = page.look(values(page, model=HUB_ID, typed=""), VISITOR)
    assert "Name a Hugging Face hub id" in shown[page.status]
    assert "alert" not in shown[page.status]


def test_the_time_of_a_run_is_bounded(models):
    page = Page(models, Limits(max_seconds=1))
    shown = outcome(page, values(page, min_new=1000, max_new=1000, beams=1))
    assert "topped after 1 s" in shown[page.status]
    assert len(shown[page.captions[0]]) > 50


def test_presets_and_sliders_follow_their_boxes(page):
    assert page.fill_prompt("camera", BUNDLED) == "Describe the camera work."
    assert page.fill_prompt("camera", HUB_ID).startswith("Describe the camera work of the video")
    shown = [update["visible"] for update in page.show_sliders(SHARE, True)]
    assert shown == [True, True, False, False, True]
    shown = [update["visible"] for update in page.show_sliders(BUDGET, False)]
    assert shown == [False, False, True, False, False]
    assert Path(page.take_example(SimpleNamespace(index=0))) == CLIP


@pytest.fixture(scope="module")
def client(models, tmp_path_factory):
    from starlette.testclient import TestClient

    config = WebConfig(device="cpu", limits=Limits(max_upload_mb=1))
    uploads = tmp_path_factory.mktemp("uploads")
    app = make_app(config, models, uploads)
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        yield client


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "fonts.googleapis" not in answer.text + client.get("/theme.css").text
    assert client.get("/config").json()["analytics_enabled"] is False


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/gradio_api/file=/etc/passwd", 403),
        (f"/gradio_api/file={BUNDLED_MODEL / 'config.json'}", 403),
        ("/gradio_api/file=http://127.0.0.1:1/x", 404),
        ("/gradio_api/proxy=http://127.0.0.1:1/x", 404),
        ("/monitoring", 404),
        ("/gradio_api/openapi.json", 404),
        ("/gradio_api/call/run", 404),
        (f"/gradio_api/file={CLIP}", 200),
    ],
)
def test_only_what_the_page_needs_is_served(client, path, status):
    assert client.get(path).status_code == status


def test_a_request_under_another_name_is_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_uploads_and_messages_are_bounded(client):
    assert client.post("/gradio_api/upload", files={"files": ("a.mp4", b"x" * 1000)}).status_code == 200
    assert client.post("/gradio_api/upload", files={"files": ("a.mp4", bytes(2 * 2**20))}).status_code == 413
    assert client.post("/gradio_api/queue/join", content=b"x" * (MAX_MESSAGE_BYTES + 1)).status_code == 413
    assert client.post("/gradio_api/queue/join", content=iter([b"x"])).status_code == 413  # of unknown length


def test_stored_uploads_are_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    scope = {"type": "http", "path": "/gradio_api/upload", "method": "POST", "headers": []}
    assert Gate(None, uploads=tmp_path, max_stored_bytes=3).refusal(scope) is None
    assert Gate(None, uploads=tmp_path, max_stored_bytes=2).refusal(scope)[0] == 507


def call_with_file(client, named: str) -> str:
    """Ask for the merge maps as the page does, of a file that the caller names; returns what the server tells."""
    config = client.get("/config").json()
    boxes = {part["id"]: part["props"] for part in config["components"]}
    (box,) = (number for number, props in boxes.items() if props.get("elem_id") == "file")
    *_, event = (call for call in config["dependencies"] if box in call["inputs"] and call["queue"])  # a redraw
    file = {"path": named, "meta": {"_type": "gradio.FileData"}}
    sent = [file if number == box else boxes[number].get("value") for number in event["inputs"]]
    message = {"data": sent, "fn_index": event["id"], "session_hash": "stranger"}
    assert client.post("/gradio_api/queue/join", json=message).status_code == 200
    return client.get("/gradio_api/queue/data", params={"session_hash": "stranger"}).text


# Gradio's queue turns its events into a data frame in a way that pandas warns of.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_upload_is_used(client):
    (path,) = client.post("/gradio_api/upload", files={"files": ("a.mp4", CLIP.read_bytes())}).json()
    assert "384 of 1,152" in call_with_file(client, path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("named", ["/etc/hostname", "http://127.0.0.1:1/a.mp4", "tests/processing/clips.py"])
def test_a_client_cannot_name_a_file_or_an_address(client, named):
    told = call_with_file(client, named)
    assert '"success":false' in told.replace(" ", "")
    assert "not uploaded" in told


def test_visitors_of_an_open_address_name_no_models():
    assert WebConfig().visitors_name_models
    assert not WebConfig(host="0.0.0.0").visitors_name_models
    assert WebConfig(host="0.0.0.0", any_model=True).visitors_name_models


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(web, "find_spec", lambda name: None if name == "gradio" else name)
    with pytest.raises(ValueError, match=r"needs gradio; pip install 'aurora-captioner\[web\]'"):
        serve(WebConfig())


def test_an_offer_that_names_no_model_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"model x: no such folder; want one, or a hub id owner/name"):
        serve(WebConfig(models=["x"], port=0))


@pytest.mark.parametrize("bad", [{"port": 70000}, {"port": -1}, {"num_frm": 0}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=rf"{next(iter(bad))}="):
        WebConfig(**bad)
