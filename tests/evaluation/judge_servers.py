"""Judges behind a real local HTTP server that answer well, badly, late or not at all."""

import json
import threading
import time
from collections import Counter
from typing import ClassVar

from aurora.evaluation.judge_stub import RuleHandler


def handler(behave=None):
    """A handler that counts requests by content; `behave(handler, number, key)` may answer instead and return True."""
    lock = threading.Lock()

    class Handler(RuleHandler):
        seen: ClassVar = Counter()
        authorizations: ClassVar = set()

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            key = json.dumps(json.loads(body)["messages"])
            with lock:
                Handler.seen[key] += 1
                Handler.authorizations.add(self.headers.get("Authorization"))
                number = sum(Handler.seen.values())
            if behave is not None and behave(self, number, Handler.seen[key]):
                return
            self.rfile = _Again(body)
            super().do_POST()

        def say(self, text):
            self.answer(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})
            return True

    return Handler


class _Again:
    def __init__(self, body):
        self.body = body

    def read(self, size):
        return self.body

    def close(self):
        pass


def garbage(handler, number, tries):
    """Chats instead of judging, in ever other forms."""
    return handler.say(["I think it is right.", "{'pred': 'yes'", "", "🙂 \ud800", "yes\n5"][number % 5])


def endless(handler, number, tries):
    """Never stops talking, up to the limit of an answer."""
    return handler.say("so " * 500_000)


def sometimes_500(handler, number, tries):
    """Fails every first try of a request."""
    if tries % 2 == 1:
        handler.answer(500, {"error": "overloaded"})
        return True
    return False


def always_500(handler, number, tries):
    handler.answer(500, {"error": "overloaded"})
    return True


def hangs(handler, number, tries):
    time.sleep(3)
    handler.close_connection = True
    return True


def trickles(handler, number, tries):
    """A byte now and then, so that no single read times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(60):
        try:
            handler.wfile.write(b" ")
        except OSError:
            break
        time.sleep(0.05)
    handler.close_connection = True
    return True


def drops(handler, number, tries):
    """Hangs up in the middle of every first answer."""
    if tries == 1:
        handler.send_response(200)
        handler.send_header("Content-Length", "5000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        handler.close_connection = True
        return True
    return False


def not_json(handler, number, tries):
    if tries == 1:
        handler.send_response(200)
        handler.send_header("Content-Length", "6")
        handler.end_headers()
        handler.wfile.write(b"<html>")
        return True
    return False


def refuses(status):
    def behave(handler, number, tries):
        handler.answer(status, {"error": {"message": "no"}})
        return True

    return behave
