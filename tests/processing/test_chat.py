import pytest

from aurora.processing.chat import apply_chat_template, build_prompt, frame_text, tokenize_prompt
from tests.golden import load_index

QUESTION = {"image": "Describe the image in detail.", "video8": "Describe the video in detail."}


class RecordingTokenizer:
    """Writes down what it is asked to encode; characters are ids."""

    bos_id = 1
    eos_id = 2

    def __init__(self):
        self.calls = []

    def encode(self, text, add_bos=False):
        self.calls.append({"text": text, "add_special_tokens": add_bos})
        return [1] * add_bos + [ord(c) for c in text]


@pytest.mark.parametrize(("case", "num_frames"), [("image", 1), ("video8", 8)])
def test_prompt_equals_golden(case, num_frames):
    golden = load_index("prompt")[case]
    prompt = build_prompt(QUESTION[case], num_frames)
    assert prompt == golden["full_prompt"]
    tokenizer = RecordingTokenizer()
    ids = tokenize_prompt(prompt, tokenizer, -7)
    assert tokenizer.calls == golden["encode_calls"]
    assert ids.count(-7) == golden["n_placeholders"] == num_frames
    assert ids[0] == 1
    assert ids.count(1) == 1


def test_chat_template_gives_the_same_prompt():
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION["image"]}]}]
    prompt = apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt == load_index("prompt")["image"]["full_prompt"]
    video = [
        {"role": "user", "content": [{"type": "video", "num_frames": 8}, {"type": "text", "text": QUESTION["video8"]}]}
    ]
    assert apply_chat_template(video, add_generation_prompt=True) == load_index("prompt")["video8"]["full_prompt"]


def test_prompt_without_frames_or_question():
    assert build_prompt("Hi?", 0) == "USER: Hi? ASSISTANT:"
    assert build_prompt("{x} {}", 1) == "USER: <image>\n{x} {} ASSISTANT:"
    assert apply_chat_template([{"role": "user", "content": "Hi?"}], add_generation_prompt=True) == build_prompt(
        "Hi?", 0
    )
    assert apply_chat_template([{"role": "user", "content": "Hi?"}]) == "USER: Hi?"


def test_frame_template():
    template = "{index} <image>"
    assert build_prompt("Q", 3, template) == "USER: 1 <image> 2 <image> 3 <image>\nQ ASSISTANT:"
    conversation = [
        {"role": "user", "content": [{"type": "video", "num_frames": 2}, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": "A."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "R"}]},
    ]
    prompt = apply_chat_template(conversation, add_generation_prompt=True, frame_template=template)
    assert prompt == "USER: 1 <image> 2 <image>\nQ ASSISTANT: A.\nUSER: 3 <image>\nR ASSISTANT:"
    assert frame_text(2) == "<image> <image>"
    for bad in ("frame", "<image><image>", ""):
        with pytest.raises(ValueError, match="want exactly one <image>"):
            build_prompt("Q", 1, bad)


def test_later_turns_are_what_training_saw(tokenizer):
    # Training writes each turn on its own: <s> question, answer </s>, newline (goldens: prompt.json, two_turns).
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Colour?"},
    ]
    prompt = apply_chat_template(conversation, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    expected = [
        *tokenize_prompt("USER: <image>\nWhat? ASSISTANT:", tokenizer),
        *tokenizer.encode("A cat."),
        tokenizer.eos_id,
        *tokenizer.encode("\n"),
        *tokenize_prompt("USER: Colour? ASSISTANT:", tokenizer),
    ]
    assert tokenize_prompt(prompt, tokenizer) == expected


def test_system_text_stands_in_front():
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    assert apply_chat_template(conversation, add_generation_prompt=True) == "Be brief. USER: Hi? ASSISTANT:"


def test_own_template():
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    prompt = apply_chat_template(conversation, template, add_generation_prompt=True, bos_token="<s>")
    assert prompt == "<s>[user]<image>Hi[assistant]"


def test_beginning_of_sequence_is_not_doubled(tokenizer):
    assert tokenize_prompt("<s>USER: Hi", tokenizer) == tokenize_prompt("USER: Hi", tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].clear() }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{% if",
        "{{ undefined_function() }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('not like this') }}",
    ],
)
def test_templates_run_in_a_sandbox(template):
    with pytest.raises(ValueError, match="chat template: "):
        apply_chat_template([{"role": "user", "content": "Hi"}], template)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "want a list of messages"),
        ("Hi", "want a list of messages"),
        ([{"role": "user"}], "want a mapping with role and content"),
        (["Hi"], "want a mapping with role and content"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "want an item of type text, image or video"),
        ([{"role": "user", "content": ["Hi"]}], "want an item of type text, image or video"),
        ([{"role": "user", "content": 5}], "want text or a list"),
        ([{"role": "user", "content": [{"type": "video", "num_frames": 0}]}], "num_frames=0: want at least 1"),
        ([{"role": "tool", "content": "Hi"}], "role=tool: want system, user or assistant"),
    ],
)
def test_malformed_conversations(conversation, message):
    with pytest.raises(ValueError, match=message):
        apply_chat_template(conversation)
