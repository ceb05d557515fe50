"""What a request may hold, and the form of replies."""

from __future__ import annotations

import json

import pytest

from aurora.generation.sampling import SamplingConfig
from aurora.serving.chat_request import Answer, Costs, Replies, RequestError, error_body, read_request

ASK = [{"role": "user", "content": "Why?"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:,x"}}


def asked(**fields: object):
    return read_request({"messages": ASK} | fields)


def test_the_least_that_can_be_asked():
    request = asked()
    assert request.messages == [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    assert (request.model, request.visuals, request.sampling, request.merging) == ("", [], {}, {})
    assert (request.num_answers, request.stream, request.include_usage, request.logprobs) == (1, False, False, False)


def test_parts_keep_their_order_and_urls_stand_apart():
    video = {"type": "video_url", "video_url": "data:,y"}
    content = [IMAGE, {"type": "text", "text": "and"}, video]
    request = asked(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": content}])
    assert [message["role"] for message in request.messages] == ["system", "user"]
    assert [item["type"] for item in request.messages[1]["content"]] == ["visual", "text", "visual"]
    assert request.visuals == ["data:,x", "data:,y"]


def test_fields_become_settings():
    request = asked(
        temperature=1, top_p=0.5, top_k=-1, min_p=0.1, repetition_penalty=1.2, min_tokens=2, max_tokens=9, seed=-1,
        stop="END", token_kept_ratio=0.3, visual_token_budget=64, slowfast=True, schedule="linear", num_frames=4, n=3,
        stream=True, stream_options={"include_usage": True}, logprobs=True, user="me", metadata={"a": "b"},
        presence_penalty=0, tools=[], response_format={"type": "text"}, frequency_penalty=None,
    )  # fmt: skip
    assert request.sampling == {
        "temperature": 1.0, "top_p": 0.5, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.2, "min_new_tokens": 2,
        "max_new_tokens": 9, "seed": 2**63 - 1, "stop": ["END"],
    }  # fmt: skip
    SamplingConfig(**request.sampling)
    assert request.merging == {
        "token_kept_ratio": 0.3, "visual_token_budget": 64, "slowfast": True, "schedule": "linear",
    }  # fmt: skip
    assert (request.num_frames, request.num_answers, request.include_usage) == (4, 3, True)


def test_the_new_name_of_the_token_limit_counts():
    assert asked(max_tokens=5, max_completion_tokens=7).sampling == {"max_new_tokens": 7}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "want a list of at least one message"),
        ({"messages": "hi"}, "messages", "want a list"),
        ({"messages": [1]}, "messages", r"messages\[0\]: got a int"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", 'role="tool": want one of system'),
        ({"messages": [{"role": [], "content": "x"}]}, "messages", "role="),
        ({"messages": [{"role": "user"}]}, "messages", "content: want a text"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "content: want a text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", 'got type "input_audio"'),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages", "got type null"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages", r"got type \[\]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", 'want "text"'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", '"url"'),
        ({"messages": [{"role": "user", "content": "see <image>"}]}, "messages", "holds <image>"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}, *ASK]}, "messages", "in a message of assistant"),
        ({"messages": [*ASK, {"role": "assistant", "content": "So."}]}, "messages", "the last one is not of user"),
        ({"temperature": "hot"}, "temperature", 'temperature="hot": want a number'),
        ({"temperature": True}, "temperature", "want a number"),
        ({"temperature": 10**400}, "temperature", "want a number"),
        ({"max_tokens": 1.5}, "max_tokens", "want a whole number"),
        ({"seed": "1"}, "seed", "want a whole number"),
        ({"n": 0}, "n", "n=0: want 1 to 16"),
        ({"n": 17}, "n", "n=17: want 1 to 16"),
        ({"num_frames": 0}, "num_frames", "want at least 1"),
        ({"stop": ["a", ""]}, "stop", "want a text that is not empty"),
        ({"stop": 3}, "stop", "want a text"),
        ({"stream": 1}, "stream", "want true or false"),
        ({"stream_options": []}, "stream_options", "want an object"),
        ({"token_kept_ratio": [0.1]}, "token_kept_ratio", "want a number"),
        ({"slowfast": 1}, "slowfast", "want true or false"),
        ({"r": 3}, "r", "want a list"),
        ({"r": [1, 0.5]}, "r", "want whole numbers"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported, want 0"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"top_logprobs": 5}, "top_logprobs", "not supported"),
        ({"token_keep_ratio": 0.1}, "token_keep_ratio", "no such field, want one of .*token_kept_ratio"),
    ],
)
def test_mistakes_are_named(fields, param, message):
    with pytest.raises(RequestError, match=message) as caught:
        asked(**fields)
    assert caught.value.param == param
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [[], "x", None, 3])
def test_a_body_is_an_object(body):
    with pytest.raises(RequestError, match="want an object"):
        read_request(body)


def test_replies():
    answers = [
        Answer(text="One.", finish_reason="stop", num_tokens=3, logprobs=[("é", -0.5)]),
        Answer(text="Two", finish_reason="length", num_tokens=4),
    ]
    costs = Costs(
        prompt_tokens=20, visual_tokens_per_frame=[5, 6], num_patches=64, seconds={"encode": 0.12345}, cached=True
    )
    replies = Replies("chatcmpl-1", "tiny", 7)
    whole = replies.whole(answers, costs)
    assert whole["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["One.", "Two"]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "length"]
    assert whole["choices"][0]["logprobs"]["content"][0]["bytes"] == [0xC3, 0xA9]
    assert whole["choices"][1]["logprobs"] is None
    assert whole["usage"] == {"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27}
    assert whole["aurora"]["visual_tokens"] == 11
    assert whole["aurora"]["seconds"] == {"encode": 0.1235}
    chunks = [replies.begin(1), replies.piece(1, "Tw"), replies.end(1, answers[1]), replies.usage(answers, costs)]
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"] == "chatcmpl-1" for chunk in chunks)
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:3]] == [
        {"role": "assistant", "content": ""}, {"content": "Tw"}, {},
    ]  # fmt: skip
    assert chunks[2]["choices"][0]["finish_reason"] == "length"
    assert chunks[3]["choices"] == []
    json.dumps([whole, *chunks])


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (429, "rate_limit_error"), (500, "server_error")],
)
def test_errors_have_a_kind(status, kind):
    assert error_body("no", status=status)["error"]["type"] == kind
