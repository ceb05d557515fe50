"""A judge behind HTTP: any server with OpenAI's chat completions.

Every request has one deadline from connecting to the last byte, because a server that trickles would never time out.
What may pass is tried again, after pauses that double and differ; what cannot pass for any request ends the run.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from aurora.evaluation.judge import JudgeConfig, JudgeFailed, Request
from aurora.evaluation.reply_cache import ReplyCache, reply_key
from aurora.runtime import read_key

MAX_RESPONSE_BYTES = 4 << 20
MAX_REPLY_CHARS = 16_000
"""Of a reply that is kept: far above any verdict, so that a judge that does not stop cannot fill the disk."""
MAX_PAUSE_S = 30.0
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
_HOPELESS = {401, 402, 403, 404, 405}


class _Unanswered(Exception):  # noqa: N818 - caught here, and tried again
    """One try failed; `pause_s` is what the server asked for."""

    def __init__(self, reason: str, *, pause_s: float = 0.0, may_pass: bool = True) -> None:
        super().__init__(reason)
        self.pause_s = pause_s
        self.may_pass = may_pass


class ChatClient:
    """Asks a server, with a cache, retries and deadlines; safe to call from several threads."""

    def __init__(self, config: JudgeConfig, cache: ReplyCache | None = None) -> None:
        """Find out which model is asked.

        Args:
            config: The server and how patiently it is asked.
            cache: Replies of earlier runs.

        Raises:
            ValueError: if no model is named and the server does not list one, or the key cannot be read.
        """
        self.config = config
        self.cache = cache
        self.counts: Counter[str] = Counter()
        """Of `cached`, `sent`, `answered` and `retried` requests, and those `skipped` after too many failures."""
        self._base = config.url.rstrip("/")
        self._key = read_key("judge.api_key_file", config.api_key_file)
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        self._failed_in_a_row = 0
        self._stopped = threading.Event()
        self.model = config.model or self._first_model()

    @property
    def name(self) -> str:
        """Model and server."""
        return f"{self.model} at {self._base}"

    def reply(self, request: Request) -> str:
        """Reply to one request; see `Judge`."""
        body = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "temperature": 0,
            "max_tokens": self.config.max_new_tokens,
        }
        if self.cache is None:
            return self._ask(body)
        key = reply_key(body)
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:  # of equal requests at once, one is sent
            if (found := self.cache.get(key)) is not None:
                self._count("cached")
                return found
            text = self._ask(body)
            self.cache.put(key, text)
            return text

    def stop(self) -> None:
        """Give up what waits for another try."""
        self._stopped.set()

    def _ask(self, body: Mapping[str, Any]) -> str:
        """Send a request, unless too many before it failed."""
        if self._failed_in_a_row >= self.config.give_up_after:
            self._count("skipped")
            raise JudgeFailed(f"{self._base}: {self._failed_in_a_row} requests in a row failed; not asked")
        try:
            text = self._try("POST", "/chat/completions", body, _content, retries=self.config.retries)
        except JudgeFailed:
            with self._lock:
                self._failed_in_a_row += 1
            raise
        with self._lock:
            self._failed_in_a_row = 0
        self._count("answered")
        return text

    def _first_model(self) -> str:
        try:
            return self._try("GET", "/models", None, _model_name, retries=min(1, self.config.retries))
        except JudgeFailed as error:
            raise ValueError(
                f"judge.url={self.config.url}: {error}; want an OpenAI-compatible server there, or judge=rules"
            ) from None

    def _try(
        self, method: str, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], str], *, retries: int
    ) -> str:
        """Send until there is an answer of the right form, or the tries are used up."""
        for attempt in range(retries + 1):
            if body is not None:
                self._count("sent" if attempt == 0 else "retried")
            try:
                return read(self._send(method, path, body))
            except _Unanswered as error:
                last = error
            if not last.may_pass or attempt == retries:
                break
            pause = min(self.config.backoff_s * 2**attempt, MAX_PAUSE_S) * random.uniform(0.5, 1.5)
            if self._stopped.wait(max(pause, min(last.pause_s, MAX_PAUSE_S))):
                break
        raise JudgeFailed(str(last))

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """One request and its JSON."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        content = None if body is None else json.dumps(body).encode()
        connection, target = _connection(self._base + path, self.config.timeout_s)
        late = threading.Event()
        deadline = threading.Timer(self.config.timeout_s, _cut, (connection, late))
        deadline.daemon = True
        deadline.start()
        try:
            connection.connect()
            if late.is_set():
                raise TimeoutError
            connection.request(method, target, content, headers)
            response = connection.getresponse()
            text = response.read(MAX_RESPONSE_BYTES + 1)
            status, wanted_pause = response.status, response.headers.get("Retry-After", "")
        except (OSError, http.client.HTTPException, ValueError) as error:
            # A socket that is shut at its deadline reads as an empty or cut answer.
            if late.is_set() or isinstance(error, TimeoutError):
                raise _Unanswered(f"no answer within {self.config.timeout_s:g} s") from error
            raise _Unanswered(_describe(error)) from error
        finally:
            deadline.cancel()
            connection.close()
        if late.is_set():
            raise _Unanswered(f"no answer within {self.config.timeout_s:g} s")
        if status in _HOPELESS:
            raise ValueError(f"judge.url={self._base}{path}: got HTTP {status} ({_excerpt(text)}); {_advice(status)}")
        if status != 200:
            pause_s = float(wanted_pause) if wanted_pause.isdecimal() else 0.0
            reason = f"HTTP {status} ({_excerpt(text)})"
            raise _Unanswered(reason, pause_s=pause_s, may_pass=status in _TRY_AGAIN or status >= 500)
        if len(text) > MAX_RESPONSE_BYTES:
            raise _Unanswered(f"an answer of more than {MAX_RESPONSE_BYTES >> 20} MiB", may_pass=False)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise _Unanswered(f"an answer that is not JSON ({_excerpt(text)})") from None

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def _connection(url: str, timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    """A connection to the server, through a proxy where the system names one, and what to ask for there."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError(f"judge.url={url}: want a port from 0 to 65535") from None
    is_local = host == "localhost" or host.startswith("127.") or host == "::1"
    proxy = None if is_local or urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
    if not proxy:
        return kind(host, port, timeout=timeout_s), parts.path
    through = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = kind(through.hostname or "", through.port, timeout=timeout_s)
    if parts.scheme == "https":
        connection.set_tunnel(host, port)
        return connection, parts.path
    return connection, url


def _cut(connection: http.client.HTTPConnection, late: threading.Event) -> None:
    """End a request at its deadline: whoever reads from the socket wakes up."""
    late.set()
    if connection.sock is not None:  # else it is still connecting, and looks at `late` when it is done
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def _content(answer: Any) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (TypeError, LookupError):
        content = None
    if not isinstance(content, str):
        raise _Unanswered(f"an answer without choices[0].message.content ({_excerpt(json.dumps(answer).encode())})")
    return content[:MAX_REPLY_CHARS].encode(errors="replace").decode()  # half a surrogate pair cannot be stored


def _model_name(answer: Any) -> str:
    try:
        return str(answer["data"][0]["id"])
    except (TypeError, LookupError):
        raise _Unanswered(f"a list of models without data[0].id ({_excerpt(json.dumps(answer).encode())})") from None


def _describe(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _advice(status: int) -> str:
    if status in (401, 402, 403):
        return "want judge.api_key_file=... with a key that may use it"
    return "want the address up to /v1, and a judge.model that the server has"


def _excerpt(text: bytes) -> str:
    return " ".join(text[:200].decode(errors="replace").split())[:120]
