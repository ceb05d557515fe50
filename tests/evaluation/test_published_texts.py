"""Prompts and wording of others are read from their files, and nothing in those files runs."""

import json

import pytest

from aurora.evaluation.judge import Request, Wording
from aurora.evaluation.published_texts import choose_prompts, read_prompts, read_wording
from aurora.evaluation.tinyvdc import CATEGORIES

# In the form of post_eval/process_vdc_result.py and of lmms-eval's tasks/vdc/utils.py, in other words.
SCRIPT = """
import not_installed_here
open("/nowhere/at/all")
camera_caption_prompts = ["Camera one?", "Camera " "two?"]
SHORT_CAPTION_PROMPTS = ["Short?"]
mixed = [1, 2]

@function
def gener_pred_response(s, pred_cap, q):
    s += system("Answer from the text. " "Be brief.")
    s += user("Please.\\n" f"text: {pred_cap}, question: {q}" "End.")
    s += assistant(gen("answer_1", max_tokens=256))

@function
def gener_pred_score(s, qa):
    s += system("Compare.")
    s += user(f"Question: {qa['question']} Correct: {qa['answer']} Predicted: {qa['response']} Like {{'pred': 'yes'}}.")
"""
MESSAGES = """
def generate_response(question, caption, max_tokens: int):
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": f"{caption}? {question}"}]
    payload = {"model": NAME, **rest}

def gpt_match(question, answer, pred_answer, max_tokens: int):
    messages = [
        {"role": "system", "content": "Compare."},
        {"role": "user", "content": f"{question} {answer} {pred_answer}" " {'pred': 'yes'}"},
    ]
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "published.py"
    path.write_text(SCRIPT)
    return str(path)


def test_prompts_are_read_from_a_published_script(script):
    assert read_prompts(script, ["camera", "short"]) == {"camera": ["Camera one?", "Camera two?"], "short": ["Short?"]}
    with pytest.raises(ValueError, match="found no list of prompts for detailed"):
        read_prompts(script, CATEGORIES)


def test_wording_is_read_from_a_published_script(script):
    wording = read_wording(script)
    answer = Request.to_answer("CAPTION", "QUESTION", wording)
    assert [message["content"] for message in answer.messages] == [
        "Answer from the text. Be brief.", "Please.\ntext: CAPTION, question: QUESTIONEnd."]  # fmt: skip
    verdict = Request.to_compare("Q", "A", "P", wording)
    assert verdict.messages[1]["content"] == "Question: Q Correct: A Predicted: P Like {'pred': 'yes'}."
    assert wording.digest() != Wording().digest()


def test_wording_is_read_from_lists_of_messages(tmp_path):
    (tmp_path / "utils.py").write_text(MESSAGES)
    wording = read_wording(str(tmp_path / "utils.py"))
    assert (wording.answer_user, wording.verdict_system) == ("{caption}? {question}", "Compare.")
    assert wording.verdict_user == "{question} {answer} {prediction} {'pred': 'yes'}"


def test_json_changes_what_it_names(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps({"repair": "JSON, please."}))
    assert read_wording(str(tmp_path / "w.json")) == Wording(repair="JSON, please.")


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("w.json", "{", "want a JSON object"),
        ("w.json", "[]", "want a JSON object"),
        ("w.json", "{}", "got nothing, want texts for"),
        ("w.json", '{"verdict": "x"}', "got verdict, want texts for answer_system"),
        ("w.json", '{"answer_user": "{question}"}', r"answer_user has no \{caption\}"),
        ("w.py", "def f(:", "want Python as published"),
        ("w.py", "x = 1", "got nothing"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, name, text, wanted):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=wanted):
        read_wording(str(tmp_path / name))


def test_the_choice_depends_on_seed_video_and_category_alone():
    lists = {name: [str(number) for number in range(50)] for name in ("short", "camera")}
    chosen = choose_prompts(lists, "clip", 0)
    assert choose_prompts({"camera": lists["camera"]}, "clip", 0)["camera"] == chosen["camera"]
    assert choose_prompts(lists, "clip", 1) != chosen != choose_prompts(lists, "other", 0)
    counts = [choose_prompts({"short": ["a", "b"]}, str(video), 3)["short"] for video in range(400)]
    assert 150 < counts.count("a") < 250


def test_ours_is_one_prompt_for_each_category():
    assert {name: len(texts) for name, texts in read_prompts(None, CATEGORIES).items()} == dict.fromkeys(CATEGORIES, 1)
