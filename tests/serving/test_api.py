"""The server in this process: what it answers, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from aurora.captioning import BUNDLED_MODEL, CaptionConfig, Captioner
from aurora.data.bundled import MEDIA, read_clips
from aurora.modeling import AuroraForConditionalGeneration
from aurora.serving import api
from aurora.serving.api import ServeConfig, Service, make_app
from aurora.serving.limits import Limits

CLIP = MEDIA / read_clips(MEDIA)[0].file
PROMPT = "Describe the video in detail."
CHAT = "/v1/chat/completions"


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(size: tuple[int, int] = (24, 24), colour: str = "navy") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def message(*parts: str | bytes) -> dict:
    """A message of user; bytes are files."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str)
        else {"type": "video_url", "video_url": {"url": data_url(part)}}
        for part in parts
    ]  # fmt: skip
    return {"role": "user", "content": content}


def about_clip(**fields: object) -> dict:
    return {"messages": [message(CLIP.read_bytes(), PROMPT)], "max_tokens": 64} | fields


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    config = ServeConfig(
        device="cpu", limits=Limits(max_upload_mb=1, max_frames=16, max_new_tokens=512), media_folder=str(MEDIA)
    )
    one = Service(config)
    yield one
    one.scheduler.close()


@pytest.fixture(scope="module")
def server(service) -> TestClient:
    return TestClient(make_app(service), base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def caption() -> str:
    """What `aurora caption` says about the clip."""
    config = CaptionConfig(visual_input=str(CLIP), token_kept_ratio=0.2, max_new_tokens=64, device="cpu")
    return Captioner.load(config).caption(CLIP)["caption"]


def events(text: str) -> list[dict]:
    """The chunks of a streamed reply; it must end as OpenAI's do."""
    *chunks, end, rest = text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def test_a_clip_gets_the_caption_of_the_command_line(server, caption):
    reply = server.post(CHAT, json=about_clip(model="aurora-tiny"))
    assert reply.status_code == 200
    body = reply.json()
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": caption}
    assert choice["finish_reason"] == "stop"
    assert body["model"] == "aurora-tiny"
    assert body["aurora"]["visual_tokens"] == 384
    assert body["aurora"]["patches"] == 8 * 144
    assert body["usage"]["prompt_tokens"] > 384
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


def test_pieces_make_up_the_caption(server, caption):
    fields = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    reply = server.post(CHAT, json=about_clip(**fields))
    assert reply.headers["content-type"].startswith("text/event-stream")
    first, *chunks, last, usage = events(reply.text)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert len(chunks) > 5
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == caption
    assert last["choices"][0]["finish_reason"] == "stop"
    assert len(last["choices"][0]["logprobs"]["content"]) == usage["usage"]["completion_tokens"]
    assert usage["choices"] == []


def test_a_request_says_how_tokens_merge(server):
    tokens = {}
    for key, value in (("token_kept_ratio", 1.0), ("token_kept_ratio", 0.1), ("visual_token_budget", 100)):
        reply = server.post(CHAT, json=about_clip(max_tokens=1, **{key: value}))
        tokens[key, value] = reply.json()["aurora"]["visual_tokens"]
    exact = server.post(CHAT, json=about_clip(max_tokens=1, token_kept_ratio=0.1, schedule="exact", num_frames=4))
    assert list(tokens.values()) == [1152, 288, 96]
    assert exact.json()["aurora"]["visual_tokens_per_frame"] == [14] * 4


def test_the_same_clip_is_encoded_once(server):
    again = [server.post(CHAT, json=about_clip(num_frames=5)).json()["aurora"] for _ in range(2)]
    assert [extra["encoding_was_cached"] for extra in again] == [False, True]


def test_images_and_a_conversation(server, service):
    picture, other = png(), png((30, 20), "red")
    turns = [
        {"role": "system", "content": "Be brief."},
        message(picture, "What colour?"),
        {"role": "assistant", "content": "Blue."},
        message("And this?", other, other),
    ]
    reply = server.post(CHAT, json={"messages": turns, "max_tokens": 8, "token_kept_ratio": 1.0})
    assert reply.json()["aurora"]["visual_tokens_per_frame"] == [144] * 3
    images = [np.asarray(Image.open(io.BytesIO(one))) for one in (picture, other, other)]
    parts = [[{"type": "image"}, {"type": "text", "text": "What colour?"}], "Blue.",
             [{"type": "text", "text": "And this?"}, {"type": "image"}, {"type": "image"}]]  # fmt: skip
    conversation = [{"role": "system", "content": "Be brief."}] + [
        {"role": role, "content": content} for role, content in zip(("user", "assistant", "user"), parts, strict=True)
    ]
    prompt = service.processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = service.processor(images=images, text=prompt)
    ids = service.model.generate(**inputs, max_new_tokens=8, token_kept_ratio=1.0)
    assert reply.json()["choices"][0]["message"]["content"] == service.processor.decode(ids[0]).strip()


def test_text_alone(server):
    reply = server.post(CHAT, json={"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4})
    assert reply.json()["aurora"]["visual_tokens"] == 0
    assert reply.json()["usage"]["completion_tokens"] <= 4


def test_several_answers(server):
    body = about_clip(n=3, temperature=2.0, seed=7, max_tokens=12)
    texts = [choice["message"]["content"] for choice in server.post(CHAT, json=body).json()["choices"]]
    assert len(set(texts)) == 3
    streamed = events(server.post(CHAT, json=body | {"stream": True}).text)
    for number, text in enumerate(texts):
        own = [chunk["choices"][0] for chunk in streamed if chunk["choices"][0]["index"] == number]
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert own[-1]["finish_reason"] in ("stop", "length")
    second = server.post(CHAT, json=body | {"n": 1, "seed": 8}).json()["choices"][0]["message"]["content"]
    assert second == texts[1], "each answer has a seed of its own"


def test_a_file_of_the_folder(server, caption):
    part = {"type": "video_url", "video_url": {"url": CLIP.resolve().as_uri()}}
    content = [part, {"type": "text", "text": PROMPT}]
    reply = server.post(CHAT, json={"messages": [{"role": "user", "content": content}], "max_tokens": 64})
    assert reply.json()["choices"][0]["message"]["content"] == caption


def test_models_and_health(server):
    (model,) = server.get("/v1/models").json()["data"]
    assert model["id"] == "aurora-tiny"
    assert server.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (about_clip(model="gpt-4o"), 404, "model=gpt-4o: no such model, want aurora-tiny"),
        (about_clip(max_tokens=513), 400, "max_tokens=513: want at most 512"),
        (about_clip(num_frames=17), 400, "num_frames=17: want at most 16"),
        (about_clip(temperature=-1), 400, "temperature=-1"),
        (about_clip(top_p=0), 400, "top_p=0"),
        (about_clip(min_tokens=100), 400, "min_new_tokens=100"),
        (about_clip(token_kept_ratio=1.5), 400, "token_kept_ratio=1.5: want a number in (0, 1]"),
        (about_clip(schedule="fast"), 400, "schedule='fast': want one of"),
        (about_clip(r=["a"], schedule="list"), 400, 'r=["a"]: want whole numbers'),
        (about_clip(r=[1], schedule="list"), 400, "merge.r"),
        (about_clip(visual_token_budget=2), 400, "visual_token_budget=2"),
        ({"messages": [message(b"nothing", PROMPT)]}, 400, "image or video 1: "),
        ({"messages": [message(*[png()] * 17, PROMPT)]}, 400, "more than 16 frames"),
        ({"messages": [message("word " * 4000)]}, 400, "2048"),
        ({"messages": [message("\ud800 half a pair")]}, 400, "half a surrogate pair"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, 400, "holds <image>"),
        ({"temperature": float("nan"), **about_clip()}, 400, "temperature=nan"),
        ([], 400, "want an object"),
    ],
)
def test_what_is_asked_wrongly(server, body, status, words):
    reply = server.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["type"].endswith("error")


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (json.dumps(about_clip()).encode(), "text/plain", 415),
        (b" " * 3_000_000, "application/json", 413),
    ],
)
def test_bodies_that_are_not_read(server, content, kind, status):
    reply = server.post(CHAT, content=content, headers={"content-type": kind})
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_other_paths_names_and_methods(server):
    assert server.get("/docs").status_code == 404
    assert server.get(CHAT).status_code == 405
    assert server.get(CHAT).json()["error"]["message"]
    assert server.get("/health", headers={"host": "evil.example"}).status_code == 400


def test_an_error_in_a_stream_is_told_there(server):
    (*_, told) = events(server.post(CHAT, json={"messages": [message("word " * 4000)], "stream": True}).text)
    assert "2048" in told["error"]["message"]
    assert told["error"]["type"] == "invalid_request_error"


def test_a_bug_is_not_described_to_clients(server, monkeypatch, capsys):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret path /root")

    monkeypatch.setattr(AuroraForConditionalGeneration, "generate", broken)
    reply = server.post(CHAT, json=about_clip())
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert "secret" in capsys.readouterr().err


def test_no_memory_is_said_so(server, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AuroraForConditionalGeneration, "generate", full)
    reply = server.post(CHAT, json=about_clip())
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"


def test_a_key_is_asked_for(service, monkeypatch):
    monkeypatch.setattr(service, "api_key", "abc")
    locked = TestClient(make_app(service), base_url="http://127.0.0.1")
    assert locked.get("/v1/models").status_code == 401
    assert locked.post(CHAT, json=about_clip(), headers={"authorization": "Bearer abd"}).status_code == 401
    assert locked.get("/v1/models", headers={"authorization": "Basic abc"}).status_code == 401
    assert locked.get("/v1/models", headers={"authorization": "Bearer abc"}).status_code == 200
    assert locked.get("/health").status_code == 200


def test_a_full_queue_is_told_with_when_to_come_again(server, service, monkeypatch):
    monkeypatch.setattr(service.scheduler, "max_waiting", 0)
    reply = server.post(CHAT, json=about_clip())
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 70000}, "port=70000"),
        ({"num_frm": 0}, "num_frm=0"),
        ({"num_frm": 33}, "num_frm=33: want at most limits.max_frames=32"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"token_kept_ratio": 0.0}, "token_kept_ratio=0"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"cached_clips": -1}, "cached_clips=-1"),
        ({"quantization": "int3"}, "quantization=int3"),
        ({"attn_implementation": "fast"}, "attn_implementation=fast"),
        ({"limits": Limits(max_new_tokens=8)}, "max_new_tokens=256: want at most limits.max_new_tokens=8"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(**fields)


def test_settings_that_only_loading_finds_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match=r"media_folder=.*: no such folder"):
        Service(ServeConfig(media_folder=str(tmp_path / "none")))
    (tmp_path / "key").write_text("two words")
    with pytest.raises(ValueError, match=r"api_key_file=.*: want a file with one key"):
        Service(ServeConfig(api_key_file=str(tmp_path / "key")))


def test_a_name_for_the_model():
    one = Service(ServeConfig(model_path=f"{BUNDLED_MODEL}/", device="cpu"))
    assert one.name == BUNDLED_MODEL.name
    one.scheduler.close()


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs starlette; pip install 'aurora-captioner\[serve\]'"):
        api.serve(ServeConfig())
