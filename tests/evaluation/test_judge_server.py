"""The client against a real local HTTP server that misbehaves: every question ends, and every count is exact."""

import time

import pytest

from aurora.evaluation.chat_client import MAX_REPLY_CHARS, ChatClient
from aurora.evaluation.judge import JudgeConfig, JudgeFailed, Request, Wording, fill, unfill
from aurora.evaluation.judge_stub import serve
from aurora.evaluation.judging import Item, Status, judge_questions
from aurora.evaluation.reply_cache import ReplyCache
from tests.evaluation import judge_servers as servers

CAPTIONS = {"v1": "The small red star shows upward motion.", "v2": "The large blue cross.", "v3": ""}
ASKED = {"What color is the main object?": "red", "What shape is the main object?": "star",
         "What size is the main object?": "small", "What time is it?": "night"}  # fmt: skip
ITEMS = [
    Item(video=video, category="detailed", question=question, answer=answer, caption=caption)
    for video, caption in CAPTIONS.items()
    for question, answer in ASKED.items()
]


def run(behave, cache=None, **more):
    """Judge all items; returns the counts of statuses, the client and the handler."""
    kind = servers.handler(behave)
    with serve(kind) as url:
        config = JudgeConfig(url=url, **{"backoff_s": 0.01, "retries": 2, "concurrency": 4, **more})
        client = ChatClient(config, cache)
        found = list(judge_questions(client, ITEMS, Wording(), concurrency=config.concurrency))
    counts = {status: sum(entry.status is status for entry in found) for status in Status}
    assert sum(counts.values()) == len(ITEMS)
    return counts, client, kind, found


def test_a_good_judge_judges_everything_and_names_its_model():
    counts, client, kind, found = run(None)
    assert counts == {Status.judged: 12, Status.unparsed: 0, Status.failed: 0}
    assert client.name.startswith("tinyworld-rules at http://127.0.0.1:")
    right = {(entry.item.video, entry.item.answer) for entry in found if entry.verdict.is_right}
    assert right == {("v1", "red"), ("v1", "star"), ("v1", "small")}
    assert max(kind.seen.values()) <= 4  # equal requests may be under way at once, and none is tried again
    assert client.counts["retried"] == 0


def test_garbage_is_asked_for_once_more_and_counted_as_unparsed(tmp_path):
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        counts, client, kind, _ = run(servers.garbage, cache)
        assert counts == {Status.judged: 0, Status.unparsed: 12, Status.failed: 0}
        again, later, untouched, _ = run(servers.garbage, cache)
    assert again == counts
    assert not untouched.seen
    assert later.counts["cached"] == 36
    assert client.counts["answered"] == sum(kind.seen.values())


def test_a_judge_that_does_not_stop_does_not_fill_the_disk(tmp_path):
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        counts, client, _, found = run(servers.endless, cache)
    assert counts == {Status.judged: 0, Status.unparsed: 12, Status.failed: 0}
    assert {len(reply) for entry in found for reply in entry.replies} == {MAX_REPLY_CHARS}
    assert cache.path.stat().st_size < 2 * MAX_REPLY_CHARS * client.counts["answered"]


def test_half_the_tries_fail_and_nothing_is_lost():
    counts, client, kind, _ = run(servers.sometimes_500, concurrency=1)
    assert counts[Status.judged] == 12
    assert client.counts["retried"] == client.counts["answered"] == 24
    assert sum(kind.seen.values()) == 48


@pytest.mark.parametrize("behave", [servers.drops, servers.not_json], ids=["hangs up", "not JSON"])
def test_a_broken_answer_is_tried_again(behave):
    counts, client, _, _ = run(behave)
    assert counts[Status.judged] == 12
    assert client.counts["retried"] > 5


def test_a_judge_that_never_recovers_is_asked_so_often_and_no_more():
    counts, client, kind, found = run(servers.always_500, concurrency=1, give_up_after=5)
    assert counts == {Status.judged: 0, Status.unparsed: 0, Status.failed: 12}
    assert (client.counts["sent"], client.counts["retried"], client.counts["skipped"]) == (5, 10, 7)
    assert sum(kind.seen.values()) == 15
    assert "HTTP 500" in found[0].reason
    assert "5 requests in a row failed" in found[-1].reason


@pytest.mark.parametrize("behave", [servers.hangs, servers.trickles], ids=["silent", "trickles"])
def test_a_judge_that_hangs_ends_at_the_deadline(behave):
    started = time.monotonic()
    counts, _, _, found = run(behave, timeout_s=0.3, retries=0, concurrency=12)
    assert counts[Status.failed] == 12
    assert time.monotonic() - started < 2.5
    assert "no answer within 0.3 s" in found[0].reason


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_request_can_pass_ends_the_run(status):
    with pytest.raises(ValueError, match=rf"HTTP {status} .*want"):
        run(servers.refuses(status))


def test_a_request_that_is_too_long_fails_alone():
    counts, client, _, _ = run(lambda handler, number, tries: number == 1 and servers.refuses(400)(handler, 1, 1))
    assert (counts[Status.judged], counts[Status.failed]) == (11, 1)
    assert client.counts["retried"] == 0


def test_no_server_is_one_clear_line():
    with serve() as url:
        pass
    config = JudgeConfig(url=url, retries=1, backoff_s=0.01)
    with pytest.raises(ValueError, match=r"judge\.url=http://127.* connection refused; want an OpenAI-compatible"):
        ChatClient(config)
    with pytest.raises(JudgeFailed, match="connection refused"):
        ChatClient(JudgeConfig(url=url, model="m", retries=0)).reply(Request.to_answer("c", "q", Wording()))


def test_the_key_is_read_from_its_file_and_sent(tmp_path):
    (tmp_path / "key").write_text("sk-123\n")
    _, _, kind, _ = run(None, api_key_file=str(tmp_path / "key"))
    assert kind.authorizations == {"Bearer sk-123"}
    (tmp_path / "key").write_text("two words")
    with pytest.raises(ValueError, match="one key on one line") as refused:
        ChatClient(JudgeConfig(api_key_file=str(tmp_path / "key"), model="m"))
    assert "two words" not in str(refused.value)


def test_a_distant_server_is_reached_through_the_systems_proxy(monkeypatch):
    kind = servers.handler()
    seen = []

    def path_only(handler):
        seen.append(handler.path)
        handler.path = handler.path.removeprefix("http://judge.example")

    kind.do_GET = lambda self: (path_only(self), servers.RuleHandler.do_GET(self))
    with serve(kind) as url:
        monkeypatch.setattr("urllib.request.getproxies", lambda: {"http": url.removesuffix("/v1")})
        monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: False)
        client = ChatClient(JudgeConfig(url="http://judge.example/v1"))
        assert ChatClient(JudgeConfig(url=url)).model == client.model == "tinyworld-rules"
    assert seen == ["http://judge.example/v1/models", "/v1/models"]


def test_equal_requests_are_sent_once(tmp_path):
    """Three captions share the answer `not stated` to a question, and so a verdict."""
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        for again in (False, True):
            _, client, kind, _ = run(lambda handler, number, tries: time.sleep(0.02), cache, concurrency=12)
            assert client.counts["sent"] + client.counts["cached"] == 24
            assert set(kind.seen.values()) == (set() if again else {1})
        assert len(cache) < 24


def test_another_model_is_asked_anew(tmp_path):
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        run(None, cache, model="one")
        _, client, kind, _ = run(None, cache, model="two")
        assert sum(kind.seen.values()) == client.counts["answered"] > 0


def test_a_file_that_holds_no_replies_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes, which are no database" * 9)
    with pytest.raises(ValueError, match=r"judge\.cache=.*notes\.txt"):
        ReplyCache(path)
    assert path.read_text().startswith("my notes")
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        for number in range(400):
            cache.put(f"{number:064}", "reply" * 20)
    whole = cache.path.read_bytes()
    cache.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"judge\.cache="):
        read_all(cache.path, 400)


def read_all(path, count):
    with ReplyCache(path) as cache:
        for number in range(count):
            cache.get(f"{number:064}")


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ({"url": "file:///etc/passwd"}, "judge.url="),
        ({"url": "127.0.0.1:30000"}, "judge.url="),
        ({"concurrency": 0}, "judge.concurrency=0"),
        ({"timeout_s": 0.0}, "judge.timeout_s=0"),
        ({"timeout_s": float("nan")}, "judge.timeout_s=nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, wanted):
    with pytest.raises(ValueError, match=wanted):
        JudgeConfig(**setting)


def test_templates_are_filled_and_read_back():
    values = {"question": "what {answer}?", "answer": "a\nb", "prediction": "{}"}
    text = fill(Wording().verdict_user, values)
    assert unfill(Wording().verdict_user, text) == values
    assert unfill(Wording().answer_user, text) is None
