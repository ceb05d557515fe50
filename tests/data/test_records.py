import json

import pytest

from aurora.data.records import DataConfig, DataError, SourceConfig, read_record, scan
from tests.data.datasets import opened, turns, write_image, write_jsonl

GOOD = {"image": "a.png", "conversations": turns("<image>\nQ", "A")}
MISTAKES = {
    "no such file: gone.png": {**GOOD, "image": "gone.png"},
    "no key conversations": {"image": "a.png"},
    "bad JSON": '{"image": "a.png", ',
    "got a JSON list, want an object": "[1]",
    "too few placeholders: 0 placeholders <image> for 1 frame": {**GOOD, "conversations": turns("Q", "A")},
    "too few placeholders: 2 placeholders <image> for 3 frames": {
        "image": ["a.png"] * 3,
        "conversations": turns("<image><image>Q", "A"),
    },
    "too many placeholders: 2 placeholders <image> for 1 frame": {
        **GOOD,
        "conversations": turns("<image><image>Q", "A"),
    },
    "too many placeholders: 1 placeholder <image> without": {"conversations": turns("<image>Q", "A")},
    "too few placeholders: 3 placeholders <image> for 8 frames": {
        "video": "a.png",
        "conversations": turns("<image><image><image>Q", "A"),
    },
    "conversations[1]: empty answer": {**GOOD, "conversations": turns("<image>Q", " \n")},
    "conversations[2]: a question without an answer": {**GOOD, "conversations": turns("<image>Q", "A", "R")},
    'from: got "user", want human or gpt': {**GOOD, "conversations": [{"from": "user", "value": "x"}]},
    "no key value": {**GOOD, "conversations": [{"from": "human"}]},
    "value: got 3, want text": {**GOOD, "conversations": [{"from": "human", "value": 3}]},
    "image: got 7, want a file name": {**GOOD, "image": 7},
    "image: got [], want a file name": {**GOOD, "image": []},
    "image and video are both given": {**GOOD, "video": "b.mp4"},
    'conversations: got "hi", want a list': {**GOOD, "conversations": "hi"},
    "1 placeholder <image> without an image or a video (keys: images, conversations)": {
        "images": ["a.png"],
        "conversations": turns("<image>Q", "A"),
    },
    "conversations[2]: an answer behind an answer, want a question": {
        **GOOD,
        "conversations": [*turns("<image>Q", "A"), {"from": "gpt", "value": "B"}],
    },
    "<image> in an answer": {**GOOD, "conversations": turns("<image>Q", "A <image>")},
}


def test_every_mistake_has_its_line(tmp_path):
    write_image(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD, "", *MISTAKES.values(), GOOD])
    with pytest.raises(DataError) as caught:
        opened(path)
    found = caught.value.mistakes
    assert [m.where for m in found] == [f"{path}:{line}" for line in range(3, 3 + len(MISTAKES))]
    for mistake, wanted in zip(found, MISTAKES, strict=True):
        assert wanted in mistake.what
        assert str(mistake) in str(caught.value)


def test_the_list_of_mistakes_is_bounded(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{}] * 9)
    with pytest.raises(ValueError, match=r"data: 4 mistakes or more") as caught:
        opened(path, max_mistakes=4)
    assert str(caught.value).count("no key conversations") == 4


def test_json_array_keeps_lines_and_places(tmp_path):
    path = tmp_path / "d.json"
    rows = [
        {"conversations": turns("Qué?", "Sí")},
        {"conversations": turns("Q", "")},
        {"conversations": turns("b", "c")},
    ]
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = path.read_text(encoding="utf-8").split("\n")
    starts = [number for number, line in enumerate(lines, start=1) if line == " {"]
    places = [place for place, _, _ in scan(path)]
    assert [place.line for place in places] == starts
    assert read_record(path, places[2], num_frames=8).conversations == rows[2]["conversations"]
    with pytest.raises(ValueError, match=rf"d\.json:{starts[1]}: conversations\[1\]: empty answer"):
        opened(path)
    path.write_text('[\n{},\n{"a": tru}\n]')
    assert [(place.line, problem[:8]) for place, _, problem in scan(path)] == [(2, ""), (3, "bad JSON")]
    path.write_text("[\n{}\n{}]")
    assert [(place.line, problem[:8]) for place, _, problem in scan(path)] == [(2, ""), (3, "bad JSON")]
    path.write_text("[]")
    with pytest.raises(ValueError, match="no record in the file"):
        opened(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_one_object_over_several_lines_is_one_mistake(tmp_path, encoding):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"data": [GOOD], "version": 1}, indent=1), encoding=encoding)
    with pytest.raises(DataError) as caught:
        opened(path)
    wanted = "got one object over several lines (keys: data, version), want one a line, or an array"
    assert [tuple(mistake) for mistake in caught.value.mistakes] == [(f"{path}:1", wanted)]


def test_an_answer_in_front_of_the_first_question_is_left_out(tmp_path):
    write_image(tmp_path / "a.png")
    said = [{"from": "gpt", "value": "Hello"}, *turns("<image>Q", "A")]
    first = opened(write_jsonl(tmp_path / "d.jsonl", [{**GOOD, "conversations": said}]))[0]
    again = opened(write_jsonl(tmp_path / "e.jsonl", [{**GOOD, "conversations": said[1:]}]))[0]
    assert first.input_ids == again.input_ids


def test_an_answer_behind_the_limit_is_a_mistake(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"conversations": turns("Q" * 50, "A")}])
    with pytest.raises(ValueError, match=r"d\.jsonl:1: data\.max_length=40"):
        opened(path, max_length=40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig().all_sources(), "data.path=null"),
        (lambda: DataConfig(sources={"a": SourceConfig()}).all_sources(), "data.sources.a.path"),
        (lambda: SourceConfig(path="x", weight=0), "weight=0"),
        (lambda: DataConfig(num_frames=0), "data.num_frames=0"),
        (lambda: DataConfig(max_unreadable_share=2), "max_unreadable_share=2"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_file_of_records(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.jsonl: no such file"):
        opened(tmp_path / "gone.jsonl")
