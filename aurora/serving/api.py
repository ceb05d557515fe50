"""The verb `serve`: OpenAI's chat completions over HTTP, so that any client of theirs can caption.

The protocol is in `chat_request`, what clients send as pictures in `media`, the model's thread in `jobs`; here is what
listens. It trusts nobody: bodies are bounded before they are read whole, requests come as JSON alone (so that a page in
a browser cannot send one unasked), and a server that only this machine can reach answers to its own names alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import random
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
import torch
from omegaconf import DictConfig

from aurora.config import load_config, register_schema
from aurora.generation.options import MergeOptions, merge_for_call
from aurora.generation.sampling import SamplingConfig
from aurora.loading import BUNDLED_MODEL, ModelConfig
from aurora.model.merge import MergeConfig
from aurora.processing.chat import tokenize_prompt
from aurora.runtime import describe_error, read_key
from aurora.serving.chat_request import ChatRequest, Replies, RequestError, error_body, read_request
from aurora.serving.jobs import Clip, Done, Job, QueueFull, Scheduler
from aurora.serving.limits import Limits
from aurora.serving.listen import LOOPBACK, address_of, listen, run_server
from aurora.serving.media import load_media

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

DISCONNECT_S = 0.25
"""How often a request that waits looks whether its client is still there."""
_LOADING_AT_ONCE = 2
"""Requests whose files are decoded at the same time."""
_JSON_OVERHEAD = 2**20
"""What a body may hold beside its files."""
_SPARE_CONNECTIONS = 16
"""Beyond what waits and runs, for those that are still sending or only ask how things are."""
_CLOSED_REQUEST = 499
"""Status for a client that has gone; nobody reads it."""


@dataclass(kw_only=True, slots=True)
class ServeConfig(ModelConfig):
    """Serve a captioner to clients of OpenAI's chat completions."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    model_name: str | None = None
    """What clients call the model; null is the last part of model_path."""
    num_frm: int = 8
    """Frames sampled from a video, unless a request says num_frames."""
    max_new_tokens: int = 256
    """At most so many new tokens, unless a request says otherwise."""
    temperature: float = 0.0
    """Sampling temperature, unless a request says otherwise; 0 takes the likeliest token. OpenAI's own default is 1."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this probability, unless a request says otherwise."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens already written by this, unless a request says otherwise; 1 is no penalty."""
    limits: Limits = field(default_factory=lambda: Limits(max_waiting=64))
    """What one request may ask for."""
    max_batch: int = 16
    """Most answers that are generated together; fewer where memory is short."""
    cached_clips: int = 16
    """Encoded images and videos that are kept for further questions."""
    media_folder: str | None = None
    """Folder whose files clients may name as file:///...; null is none, files then come in the request."""
    api_key_file: str | None = None
    """File with a key that every request must bring; null lets everybody in who reaches the port."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ModelConfig.__post_init__(self)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: want 0 to 65535")
        for key, least in (("num_frm", 1), ("max_batch", 1), ("cached_clips", 0)):
            if (value := getattr(self, key)) < least:
                raise ValueError(f"{key}={value}: want at least {least}")
        if self.num_frm > self.limits.max_frames:
            raise ValueError(f"num_frm={self.num_frm}: want at most limits.max_frames={self.limits.max_frames}")
        if self.max_new_tokens > (most := self.limits.max_new_tokens):
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: want at most limits.max_new_tokens={most}")
        _ = self.sampling  # checks the rest

    @property
    def sampling(self) -> SamplingConfig:
        """How answers are generated where a request does not say."""
        return SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )


register_schema("serve_schema", ServeConfig)


class Service:
    """A model and everything that does not depend on HTTP: requests to jobs."""

    def __init__(self, config: ServeConfig) -> None:
        """Load the model.

        Raises:
            ValueError: if the device does not exist or the checkpoint cannot be read.
        """
        self.config = config
        self.media_folder = _media_folder(config.media_folder)
        self.api_key = read_key("api_key_file", config.api_key_file)
        self.name = config.model_name or (config.model_path or BUNDLED_MODEL.name).rstrip("/").rpartition("/")[2]
        self.created = int(time.time())
        self.model, self.processor = config.load()
        self.scheduler = Scheduler(
            self.model,
            self.processor,
            max_batch=config.max_batch,
            max_waiting=config.limits.max_waiting,
            max_seconds=config.limits.max_seconds,
            cached_clips=config.cached_clips,
        )

    def make_job(
        self, asked: ChatRequest, on_text: Callable[[int, str], None], on_end: Callable[[Done | Exception], None]
    ) -> Job:
        """Read the files of a request and write its prompt.

        Args:
            asked: The request.
            on_text: See `Job`.
            on_end: See `Job`.

        Raises:
            RequestError: if it asks for too much or for what does not exist.
            ValueError: if a file cannot be read or the template refuses the messages.
        """
        config = self.config
        if asked.model not in ("", self.name):
            raise RequestError(f"model={asked.model}: no such model, want {self.name}", param="model", status=404)
        sampling = self._sampling(asked)
        merge = merge_for_call(config.effective_merge, cast(MergeOptions, asked.merging))
        started = time.perf_counter()
        clip, messages = self._read_visuals(asked, merge)
        if asked.num_answers > config.max_batch:
            raise RequestError(f"n={asked.num_answers}: want at most {config.max_batch} here", param="n")
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        ids = tokenize_prompt(prompt, self.processor.tokenizer, self.processor.image_token_index)
        seed = asked.sampling.get("seed", random.getrandbits(62))
        return Job(
            ids=ids,
            clip=clip,
            sampling=sampling,
            seeds=[(seed + answer) % 2**63 for answer in range(asked.num_answers)],
            logprobs=asked.logprobs,
            on_text=on_text,
            on_end=on_end,
            seconds={"read": time.perf_counter() - started},
        )

    def _sampling(self, asked: ChatRequest) -> SamplingConfig:
        most = self.config.limits.max_new_tokens
        given = {key: value for key, value in asked.sampling.items() if key != "seed"}
        if given.get("max_new_tokens", 0) > most:
            raise RequestError(f"max_tokens={given['max_new_tokens']}: want at most {most}", param="max_tokens")
        return dataclasses.replace(self.config.sampling, **given)

    def _read_visuals(self, asked: ChatRequest, merge: MergeConfig) -> tuple[Clip | None, list[dict[str, Any]]]:
        """Decode what the request holds; its messages then say how many frames stand where."""
        frames = asked.num_frames or self.config.num_frm
        most = self.config.limits.max_frames
        if frames > most:
            raise RequestError(f"num_frames={frames}: want at most {most}", param="num_frames")
        urls = iter(enumerate(asked.visuals, start=1))
        pixels, keys, messages, total = [], [], [], 0
        for message in asked.messages:
            content = []
            for item in message["content"]:
                if item["type"] == "visual":
                    number, url = next(urls)
                    media = load_media(url, f"image or video {number}", num_frames=frames, folder=self.media_folder)
                    total += len(media.visual.frames)
                    if total > most:
                        raise RequestError(f"messages: hold more than {most} frames in all", param="messages")
                    pixels.append(self.processor.image_processor.preprocess_frames(media.visual.frames))
                    keys.append(media.key)
                    item = {"type": "video", "num_frames": len(media.visual.frames)}
                content.append(item)
            messages.append({"role": message["role"], "content": content})
        if not pixels:
            return None, messages
        if len({tuple(part.shape[1:]) for part in pixels}) > 1:
            raise RequestError("messages: images of this model keep their shapes; want all of one shape",
                               param="messages")  # fmt: skip
        frames_of_clip = torch.cat(pixels)
        height, width = frames_of_clip.shape[2:]
        self.model.model.plan(len(frames_of_clip), height, width, merge)  # refuses what cannot be
        key = json.dumps([keys, dataclasses.asdict(merge)], default=str)
        return Clip(frames_of_clip, merge, key), messages


class _Events:
    """What the model's thread tells a request, handed over to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, str] | Done | Exception] = asyncio.Queue()

    def on_text(self, answer: int, text: str) -> None:
        self._put((answer, text))

    def on_end(self, outcome: Done | Exception) -> None:
        self._put(outcome)

    async def next(self, timeout_s: float | None = None) -> tuple[int, str] | Done | Exception | None:
        """The next one, or None if there is none in time."""
        try:
            return await asyncio.wait_for(self._queue.get(), timeout_s)
        except TimeoutError:
            return None

    def _put(self, event: tuple[int, str] | Done | Exception) -> None:
        with suppress(RuntimeError):  # the loop has ended; nobody waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)


def make_app(service: Service) -> Starlette:
    """Build the server.

    Args:
        service: What answers.

    Returns:
        An ASGI app.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    loading = asyncio.Semaphore(_LOADING_AT_ONCE)

    async def health(request: Request) -> Response:
        return _json({"status": "ok", **service.scheduler.counts})

    async def models(request: Request) -> Response:
        _check_key(request, service.api_key)
        model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "aurora"}
        return _json({"object": "list", "data": [model]})

    async def chat(request: Request) -> Response:
        _check_key(request, service.api_key)
        service.scheduler.check_room()
        asked = read_request(await _read_json(request, service.config.limits))
        events = _Events()
        async with loading:
            job = await asyncio.to_thread(service.make_job, asked, events.on_text, events.on_end)
        replies = Replies(f"chatcmpl-{secrets.token_hex(12)}", service.name, int(time.time()))
        service.scheduler.submit(job)
        if asked.stream:
            pieces = _pieces(job, events, replies, include_usage=asked.include_usage)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"cache-control": "no-store"})
        done = await _outcome(events, request)
        if done is None:
            job.cancelled.set()
            return Response(status_code=_CLOSED_REQUEST)
        return _json(replies.whole(done.answers, done.costs))

    async def refuse(request: Request, error: Exception) -> Response:
        status, body = _refusal(error)
        return _json(body, status, {"retry-after": "1"} if status in (429, 503) else {})

    async def forget(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLOSED_REQUEST)

    # A page elsewhere could reach a server on this machine alone under a name of its own.
    own_names = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    kinds = (ValueError, QueueFull, HTTPException, torch.OutOfMemoryError, Exception)
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        middleware=[own_names] if service.config.host in LOOPBACK else [],
        exception_handlers={**dict.fromkeys(kinds, refuse), ClientDisconnect: forget},
    )


async def _outcome(events: _Events, request: Request) -> Done | None:
    """Wait for the end of a request; None if the client has gone meanwhile."""
    look_at = 0.0
    while True:
        event = await events.next(DISCONNECT_S)
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Done):
            return event
        if time.monotonic() >= look_at:
            if await request.is_disconnected():
                return None
            look_at = time.monotonic() + DISCONNECT_S


async def _pieces(job: Job, events: _Events, replies: Replies, *, include_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events of one request; if the client goes, the job is given up."""
    try:
        for answer in range(len(job.seeds)):
            yield _event(replies.begin(answer))
        while True:
            event = await events.next()
            if isinstance(event, Exception):
                yield _event(_refusal(event)[1])
                break
            if isinstance(event, Done):
                for number, answer_ in enumerate(event.answers):
                    yield _event(replies.end(number, answer_))
                if include_usage:
                    yield _event(replies.usage(event.answers, event.costs))
                break
            assert event is not None
            yield _event(replies.piece(*event))
        yield b"data: [DONE]\n\n"
    finally:
        job.cancelled.set()


async def _read_json(request: Request, limits: Limits) -> object:
    """Read a body without ever holding more of it than it may have."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("content-type: want application/json", status=415)
    most = limits.max_upload_mb * 2**20 * 4 // 3 + _JSON_OVERHEAD  # base64 takes four letters for three bytes
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise RequestError(f"body: larger than limits.max_upload_mb={limits.max_upload_mb} allows", status=413)
    try:
        return await asyncio.to_thread(json.loads, bytes(body))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"body: not JSON ({describe_error(error)})") from None


def _check_key(request: Request, key: str) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if key and not (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())):
        raise RequestError("authorization: want the key of this server as `Bearer <key>`", status=401)


def _refusal(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for what went wrong; what is no fault of the client is not described to it."""
    from starlette.exceptions import HTTPException

    if isinstance(error, RequestError):
        code = "model_not_found" if error.param == "model" else None
        return error.status, error_body(str(error), status=error.status, param=error.param, code=code)
    if isinstance(error, QueueFull):
        return 429, error_body(str(error), status=429, code="queue_full")
    if isinstance(error, HTTPException):
        return error.status_code, error_body(str(error.detail), status=error.status_code)
    if isinstance(error, torch.OutOfMemoryError):
        return 503, error_body("out of memory; want fewer frames or tokens, or try again later", status=503)
    if isinstance(error, ValueError):
        return 400, error_body(re.sub(r"^row \d+: ", "", describe_error(error)), status=400)
    return 500, error_body("internal error; the server's log has more", status=500)


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    from starlette.responses import Response

    return Response(_encode(content), status, headers, media_type="application/json")


def _event(content: object) -> bytes:
    return b"data: " + _encode(content) + b"\n\n"


def _encode(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode(errors="replace")


def _media_folder(name: str | None) -> Path | None:
    if name is None:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"media_folder={name}: no such folder")
    return folder.resolve()


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        config: Address, model and limits.

    Raises:
        ValueError: if starlette is not installed, the address is taken, or the model cannot be loaded.
    """
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise ValueError(f"serve: needs {package}; pip install 'aurora-captioner[serve]'")
    with listen(config.host, config.port) as listener:
        service = Service(config)
        print(f"{service.name} on {address_of(listener, config.host)}/v1 (Ctrl-C ends it)", flush=True)
        if config.host not in LOOPBACK and not service.api_key:
            print("everybody who reaches this port may use it; api_key_file=... asks for a key", file=sys.stderr)
        try:
            most = config.limits.max_waiting + config.max_batch + _SPARE_CONNECTIONS
            run_server(make_app(service), listener, limit_concurrency=most)
        finally:
            service.scheduler.close()


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="serve")
def main(raw: DictConfig) -> None:
    """Serve what the command line configures; called through `aurora.cli.run`."""
    serve(load_config(raw, ServeConfig))
