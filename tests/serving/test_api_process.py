"""The server as a process, and the clients that people have: OpenAI's package, our judge's client, plain sockets."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import pytest

from aurora.data.bundled import MEDIA, read_clips
from aurora.evaluation.chat_client import ChatClient
from aurora.evaluation.judge import JudgeConfig, Request
from tests.serving.processes import server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CLIPS = [MEDIA / clip.file for clip in read_clips(MEDIA)]
PROMPT = "Describe the video in detail."
LONG = {"max_tokens": 1500, "min_tokens": 1500, "n": 8, "temperature": 1.0}
"""Answers that take a while: ten seconds on two fast cores."""
SETTINGS = ("limits.max_new_tokens=1500",)


def message(number: int) -> dict:
    content = base64.b64encode(CLIPS[number].read_bytes()).decode()
    video = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{content}"}}
    return {"role": "user", "content": [video, {"type": "text", "text": PROMPT}]}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server("serve", *SETTINGS) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def post(address: str, body: dict) -> http.client.HTTPConnection:
    """Send a request and do not wait for its answer."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def half_a_request(address: str) -> socket.socket:
    """Announce a body, and send its first letter."""
    connection = socket.create_connection((urlsplit(address).hostname, urlsplit(address).port))
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{"
    )
    return connection


def health(address: str) -> dict:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())


def waits_for(address: str, **counts: int) -> None:
    deadline = time.monotonic() + 30
    while not health(address).items() >= counts.items():
        assert time.monotonic() < deadline, health(address)
        time.sleep(0.05)


def test_openais_client(client):
    (model,) = client.models.list().data
    made = client.chat.completions.create(
        model=model.id, messages=[message(0)], max_tokens=64, extra_body={"token_kept_ratio": 0.4}
    )
    assert "triangle" in made.choices[0].message.content
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.completion_tokens > 20
    assert made.aurora["visual_tokens"] == 576
    stream = client.chat.completions.create(
        model=model.id, messages=[message(0)], max_tokens=64, stream=True, stream_options={"include_usage": True},
        extra_body={"token_kept_ratio": 0.4},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == made.choices[0].message.content
    assert chunks[-1].usage == made.usage
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.chat.completions.create(model="gpt", messages=[message(0)])
    with pytest.raises(openai.BadRequestError, match="token_keep_ratio"):
        client.chat.completions.create(model=model.id, messages=[message(0)], extra_body={"token_keep_ratio": 1})


def test_many_at_once_get_what_each_gets_alone(client):
    def ask(number: int) -> str:
        made = client.chat.completions.create(model="aurora-tiny", messages=[message(number % 4)], max_tokens=64)
        return made.choices[0].message.content

    alone = [ask(number) for number in range(4)]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == alone * 3


def test_the_judges_client(address):
    judge = ChatClient(JudgeConfig(url=f"{address}/v1", retries=0, max_new_tokens=8))
    assert judge.name.startswith("aurora-tiny")
    assert isinstance(judge.reply(Request(messages=({"role": "user", "content": "Hello?"},), question="Hello?")), str)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_hangs_up_costs_nothing(address, stream):
    connection = post(address, {"messages": [message(1)], "stream": stream, **LONG})
    waits_for(address, running=1)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    started = time.monotonic()
    waits_for(address, running=0)
    assert time.monotonic() - started < 3


def test_a_body_that_never_comes_holds_nobody_up(address, client):
    slow = half_a_request(address)
    made = client.chat.completions.create(model="aurora-tiny", messages=[message(2)], max_tokens=4)
    assert made.choices[0].message.content
    slow.close()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_it_ends_when_told_to(sign):
    with server("serve", *SETTINGS) as (address, process):
        half_a_request(address).close()
        connection = post(address, {"messages": [message(3)], "stream": True, **LONG})
        waits_for(address, running=1)
        process.send_signal(sign)
        assert process.wait(20) == 0
        assert process.stdout.read() in ("", "stopped\n"), "nothing that happened is an error"
        connection.close()


def test_a_taken_port_is_told_before_the_model_loads():
    taken = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(AssertionError, match="want a free address"), server("serve", f"port={taken.getsockname()[1]}"):
        pass
    taken.close()


def test_a_queue_that_is_full():
    with server("serve", *SETTINGS, "limits.max_waiting=1", "max_batch=8") as (address, _):
        held = [post(address, {"messages": [message(0)], **LONG})]
        waits_for(address, running=1)
        held.append(post(address, {"messages": [message(1)], **LONG}))
        waits_for(address, waiting=1)
        refused = post(address, {"messages": [message(2)]}).getresponse()
        assert refused.status == 429
        assert refused.headers["Retry-After"] == "1"
        for connection in held:
            threading.Thread(target=connection.close).start()
