"""A local server that judges by TinyWorld's rules: the whole protocol over HTTP, without a language model.

It speaks as much of OpenAI's protocol as `ChatClient` needs, understands requests in our own wording, and listens on
127.0.0.1 alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aurora.evaluation.judge import Request, Wording, unfill
from aurora.evaluation.rule_judge import RuleJudge

MODEL = "tinyworld-rules"


class RuleHandler(BaseHTTPRequestHandler):
    """Answers `GET /v1/models` and `POST /v1/chat/completions`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """List the one model."""
        if self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        else:
            self.answer(404, {"error": {"message": f"no {self.path} here"}})

    def do_POST(self) -> None:
        """Judge one request."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/v1/chat/completions":
            self.answer(404, {"error": {"message": f"no {self.path} here"}})
            return
        try:
            text = RuleJudge().reply(read_request(json.loads(body)["messages"]))
        except (ValueError, LookupError, TypeError) as error:
            self.answer(400, {"error": {"message": str(error)}})
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.answer(200, {"object": "chat.completion", "model": MODEL, "choices": [choice]})

    def answer(self, status: int, content: Any) -> None:
        """Send JSON."""
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a line for each request would hide the progress."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait; with http.server's five, a burst of requests is refused


def read_request(messages: list[dict[str, str]]) -> Request:
    """Recognise a request in our own wording by its first question.

    Args:
        messages: As a client sent them.

    Raises:
        ValueError: if they are in other words.
    """
    wording = Wording()
    asked = next(message["content"] for message in messages if message["role"] == "user")
    for template in (wording.answer_user, wording.verdict_user):
        if (fields := unfill(template, asked)) is not None:
            return Request(messages=(), **fields)
    raise ValueError("the stub understands requests in our own wording only; want judge.wording_file=null")


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler] = RuleHandler) -> Iterator[str]:
    """Run a server on a free port of 127.0.0.1 for as long as the block runs.

    Args:
        handler: Who answers.

    Yields:
        Its address up to /v1.
    """
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
