"""A socket that is there before the model loads, and a server on it that ends quietly."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from types import FrameType
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine reaches."""


def listen(host: str, port: int) -> socket.socket:
    """Take an address, and from now on SIGTERM as Ctrl-C, so that what was begun is cleaned up.

    Args:
        host: Address of this machine.
        port: Port; 0 takes a free one.

    Raises:
        ValueError: if it is taken or not of this machine.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]  # Python adds the address
        raise ValueError(f"host={host} port={port}: {reason}; want a free address, port=0 takes one") from None


def address_of(listener: socket.socket, host: str) -> str:
    """How to reach a listener of `listen(host, ...)`, such as http://127.0.0.1:8000."""
    return f"http://{'127.0.0.1' if host in LOOPBACK else host}:{listener.getsockname()[1]}"


def run_server(app: Any, listener: socket.socket, *, limit_concurrency: int | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM; connections that are open then get a second.

    Args:
        app: An ASGI app.
        listener: From `listen`.
        limit_concurrency: Requests beyond so many at once are refused unread.
    """
    import uvicorn

    options: dict[str, Any] = {"log_level": "error", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, limit_concurrency=limit_concurrency, **options))
    handle_exit = server.handle_exit

    def end(sig: int, frame: FrameType | None) -> None:
        # Clients hold connections; that they are cut is no error then.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        handle_exit(sig, frame)

    server.handle_exit = end  # type: ignore[method-assign]
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
