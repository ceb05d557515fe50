import pytest

from aurora.data.conversation import IGNORE_INDEX, encode_conversation, split_turns
from tests.golden import load_index


class StubTokenizer:
    """The goldens' tokenizer: character c is ord(c) % 200 + 10."""

    bos_id = 1
    eos_id = 2

    def __init__(self):
        self.pieces = []

    def encode(self, text, add_bos=False):
        self.pieces.append(text)
        return [1] * add_bos + [ord(c) % 200 + 10 for c in text]


def conversation(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.mark.parametrize("case", ["one_image", "two_turns"])
def test_equals_golden(case):
    golden = load_index("prompt")["train"][case]
    tokenizer = StubTokenizer()
    encoded = encode_conversation(golden["source"], tokenizer)
    assert tokenizer.pieces == golden["result"]["encoded_pieces"]
    assert encoded.input_ids == golden["result"]["input_ids"]
    assert encoded.labels == golden["result"]["labels"]


@pytest.mark.parametrize("case", ["one_image", "two_turns", "video_3_frames"])
def test_turns_equal_golden(case):
    golden = load_index("prompt")["train"][case]
    expected = [(turn["input"], turn["output"]) for turn in golden["result"]["conversation"]]
    assert [tuple(turn) for turn in split_turns(golden["source"])] == expected


def test_several_placeholders_where_the_reference_fails():
    golden = load_index("prompt")["train"]["video_3_frames"]
    assert "AssertionError" in golden["result"]["error"]
    tokenizer = StubTokenizer()
    encoded = encode_conversation(golden["source"], tokenizer)
    assert tokenizer.pieces == ["USER: ", " ", " ", "\nDescribe. ASSISTANT:", "A cat.", "\n"]
    assert encoded.input_ids.count(-200) == 3
    assert [label for label in encoded.labels if label != IGNORE_INDEX] == [*StubTokenizer().encode("A cat."), 2]
    assert len(encoded.input_ids) == len(encoded.labels)


def test_frame_template():
    turns = split_turns(conversation("<image><image>\nQ", "A", "R <image>", "B"), frame_template="{index} <image>")
    assert [turn.question for turn in turns] == [
        "USER: 1 <image> 2 <image>\nQ ASSISTANT:",
        "USER: 3 <image>\nR ASSISTANT:",
    ]


def test_questions_in_a_row_join_and_leading_answers_drop():
    source = [
        {"from": "gpt", "value": "Welcome."},
        {"from": "human", "value": "One. "},
        {"from": "human", "value": "Two."},
        {"from": "gpt", "value": "A"},
    ]
    assert [tuple(turn) for turn in split_turns(source)] == [("USER: One. Two. ASSISTANT:", "A")]


def test_other_placeholder_index():
    assert (
        encode_conversation(conversation("<image>\nQ", "A"), StubTokenizer(), image_token_index=-7).input_ids[7] == -7
    )


def test_cut_counts_expanded_placeholders():
    source = conversation("<image>\nQ", "A cat.")
    whole = encode_conversation(source, StubTokenizer())
    length = len(whole.input_ids) - 1 + 100
    kept = encode_conversation(source, StubTokenizer(), max_length=length, tokens_per_placeholder=100)
    assert kept == whole
    cut = encode_conversation(source, StubTokenizer(), max_length=length - 4, tokens_per_placeholder=100)
    assert cut == (whole.input_ids[:-4], whole.labels[:-4])
    with pytest.raises(ValueError, match="the first answer starts behind it"):
        encode_conversation(source, StubTokenizer(), max_length=100, tokens_per_placeholder=100)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "0 messages with 0 answers"),
        (conversation("Q"), "want every question answered"),
        (conversation("Q", "A", "R"), "want every question answered"),
        ([{"from": "robot", "value": "x"}], "want from: human or gpt"),
        ([{"from": "human", "value": 5}], "want from: human or gpt"),
        ([{"role": "user", "content": "x"}], "want from: human or gpt"),
    ],
)
def test_malformed(source, message):
    with pytest.raises(ValueError, match=message):
        encode_conversation(source, StubTokenizer())
