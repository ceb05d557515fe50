"""The model's thread: what goes together, and that an answer does not depend on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Queue

import pytest
import torch

from aurora.captioning import BUNDLED_MODEL
from aurora.data.bundled import MEDIA, read_clips
from aurora.generation.sampling import SamplingConfig
from aurora.model.merge import MergeConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.chat import tokenize_prompt
from aurora.processing.processor import AuroraProcessor
from aurora.processing.video import load_visual
from aurora.serving.jobs import Clip, Done, Job, QueueFull, Scheduler

MODEL = AuroraForConditionalGeneration.from_pretrained(BUNDLED_MODEL)
PROCESSOR = AuroraProcessor.from_pretrained(BUNDLED_MODEL)
MERGE = MergeConfig(token_kept_ratio=0.2)
QUESTIONS = ("Describe the video in detail.", "Describe the camera movement.", "Describe the background.")
WAIT_S = 60


def clip_of(number: int, *, num_frames: int = 3, merge: MergeConfig = MERGE) -> Clip:
    frames = load_visual(MEDIA / read_clips(MEDIA)[number].file, num_frames).frames
    pixels = PROCESSOR.image_processor.preprocess_frames(frames)
    return Clip(pixels, merge, f"{number} {num_frames} {merge}")


@dataclass
class Client:
    """Who asked, and what came back."""

    job: Job
    pieces: list[tuple[int, str]] = field(default_factory=list)
    outcomes: Queue = field(default_factory=Queue)

    def wait(self) -> Done:
        outcome = self.outcomes.get(timeout=WAIT_S)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def texts(self) -> list[str]:
        return [answer.text for answer in self.wait().answers]


def client(
    clip: Clip | None = None,
    question: str = QUESTIONS[0],
    *,
    seeds: tuple[int, ...] = (0,),
    logprobs: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    **sampling: object,
) -> Client:
    prompt = PROCESSOR.build_prompt(question, 0 if clip is None else len(clip.pixels))
    pieces: list[tuple[int, str]] = []
    outcomes: Queue = Queue()

    def take(answer: int, text: str) -> None:
        pieces.append((answer, text))
        if on_text is not None:
            on_text(answer, text)

    job = Job(
        ids=tokenize_prompt(prompt, PROCESSOR.tokenizer, PROCESSOR.image_token_index),
        clip=clip,
        sampling=SamplingConfig(**({"max_new_tokens": 24} | sampling)),
        seeds=list(seeds),
        logprobs=logprobs,
        on_text=take,
        on_end=outcomes.put,
    )
    return Client(job, pieces, outcomes)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    one = Scheduler(MODEL, PROCESSOR, max_batch=8, max_waiting=6, max_seconds=60, cached_clips=2)
    yield one
    one.close()


@pytest.fixture
def batches(scheduler, monkeypatch) -> list[list[Job]]:
    """Which jobs went together."""
    seen: list[list[Job]] = []
    answer = scheduler._answer

    def note(batch: list[Job]) -> None:
        seen.append(batch)
        answer(batch)

    monkeypatch.setattr(scheduler, "_answer", note)
    return seen


class Held:
    """Keeps the model busy with a request until it is let go, so that others wait."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.busy, self.go = threading.Event(), threading.Event()
        self.client = client(on_text=self._stop, question="Hello?", top_k=1)
        scheduler.submit(self.client.job)
        assert self.busy.wait(WAIT_S)

    def _stop(self, answer: int, text: str) -> None:
        self.busy.set()
        assert self.go.wait(WAIT_S)


def alone(asked: Client) -> Done:
    """What a request gets from a scheduler of its own."""
    own = Scheduler(MODEL, PROCESSOR, max_batch=1, max_waiting=1, max_seconds=60, cached_clips=0)
    same = client()
    same.job = Job(
        ids=asked.job.ids, clip=asked.job.clip, sampling=asked.job.sampling, seeds=asked.job.seeds,
        logprobs=asked.job.logprobs, on_text=lambda *_: None, on_end=same.outcomes.put,
    )  # fmt: skip
    own.submit(same.job)
    done = same.wait()
    own.close()
    return done


def test_an_answer_with_what_it_took(scheduler):
    asked = client(clip_of(0), max_new_tokens=64)
    scheduler.submit(asked.job)
    done = asked.wait()
    inputs = PROCESSOR(text=PROCESSOR.build_prompt(QUESTIONS[0], 3))
    made = MODEL.generate(
        inputs["input_ids"], pixel_values_videos=asked.job.clip.pixels[None], token_kept_ratio=0.2, max_new_tokens=64,
        return_dict=True,
    )  # fmt: skip
    (answer,) = done.answers
    assert answer.text == PROCESSOR.decode(made.sequences[0]).strip()
    assert answer.num_tokens == made.num_generated[0]
    assert answer.finish_reason == "stop"
    assert done.costs.visual_tokens_per_frame == made.visual_token_counts[0]
    assert done.costs.prompt_tokens == inputs["input_ids"].shape[1] - 3 + sum(made.visual_token_counts[0])
    assert done.costs.num_patches == 3 * 144
    assert done.costs.seconds.keys() == {"encode", "prefill", "decode"}
    assert not done.costs.cached
    assert "".join(text for _, text in asked.pieces) == answer.text


def test_those_that_wait_go_together_and_get_what_they_get_alone(scheduler, batches):
    held = Held(scheduler)
    asked = [client(clip_of(0)), client(clip_of(1, num_frames=2), QUESTIONS[1]), client(question="What is a square?")]
    for one in asked:
        scheduler.submit(one.job)
    assert scheduler.counts == {"waiting": 3, "running": 1}
    held.go.set()
    got = [one.wait() for one in asked]
    assert [len(batch) for batch in batches] == [1, 3]
    for one, done in zip(asked, got, strict=True):
        assert done.answers == alone(one).answers
        assert "".join(text for _, text in one.pieces) == done.answers[0].text
    assert got[2].costs.visual_tokens_per_frame == []
    assert got[2].costs.num_patches == 0


def test_questions_about_one_clip_go_first_and_encode_it_once(scheduler, batches, monkeypatch):
    encoded: list[int] = []
    encode = MODEL.encode

    def count(*args: object, **options: object):
        encoded.append(len(options["pixel_values_videos"]))
        return encode(*args, **options)

    monkeypatch.setattr(MODEL, "encode", count)
    held = Held(scheduler)
    asked = [client(clip_of(0)), client(clip_of(1)), client(clip_of(0), QUESTIONS[1]), client(clip_of(0), QUESTIONS[2])]
    for one in asked:
        scheduler.submit(one.job)
    held.go.set()
    got = [one.wait() for one in asked]
    assert [len(batch) for batch in batches] == [1, 3, 1]
    assert encoded == [1, 1]
    for one, done in zip(asked, got, strict=True):
        assert done.answers == alone(one).answers


def test_an_encoding_is_kept_until_others_push_it_out(scheduler):
    cached = []
    for number, ratio in ((0, 0.2), (0, 0.2), (1, 0.2), (0, 0.2), (0, 0.1), (1, 0.2)):
        asked = client(clip_of(number, merge=MergeConfig(token_kept_ratio=ratio)), max_new_tokens=2)
        scheduler.submit(asked.job)
        cached.append(asked.wait().costs.cached)
    assert cached == [False, True, False, True, False, False]


def test_other_rules_run_apart(scheduler, batches):
    held = Held(scheduler)
    asked = [client(clip_of(0), max_new_tokens=tokens, logprobs=wanted) for tokens, wanted in
             ((8, False), (9, False), (8, True), (8, False))]  # fmt: skip
    for one in asked:
        scheduler.submit(one.job)
    held.go.set()
    got = [one.wait() for one in asked]
    assert [len(batch) for batch in batches] == [1, 2, 1, 1]
    assert [done.answers[0].num_tokens for done in got] == [8, 9, 8, 8]
    assert [done.answers[0].finish_reason for done in got] == ["length"] * 4
    assert got[0].answers[0].logprobs is None
    assert len(got[2].answers[0].logprobs) == 8
    assert all(value <= 0 for _, value in got[2].answers[0].logprobs)


def test_several_answers_draw_by_their_seeds_whatever_is_beside_them(scheduler, batches):
    held = Held(scheduler)
    asked = [
        client(clip_of(0), temperature=3.0, seeds=(5, 6)),
        client(clip_of(1), temperature=3.0, seeds=(6,)),
        client(clip_of(0), temperature=3.0, seeds=(6,)),
    ]
    for one in asked:
        scheduler.submit(one.job)
    held.go.set()
    first, other, again = (one.texts() for one in asked)
    assert [len(batch) for batch in batches] == [1, 2, 1]
    assert first[0] != first[1] == again[0]
    for one, texts in zip(asked, (first, other, again), strict=True):
        assert texts == [answer.text for answer in alone(one).answers]


def test_a_batch_is_not_larger_than_allowed(scheduler, batches):
    held = Held(scheduler)
    asked = [client(clip_of(0), temperature=1.0, seeds=tuple(range(3))) for _ in range(4)]
    for one in asked:
        scheduler.submit(one.job)
    held.go.set()
    for one in asked:
        assert len(one.wait().answers) == 3
    assert [len(batch) for batch in batches] == [1, 2, 2]


def test_stop_strings_end_texts_before_them(scheduler):
    whole = client(clip_of(0), max_new_tokens=64)
    scheduler.submit(whole.job)
    (text,) = whole.texts()
    word = text.split()[4]
    asked = client(clip_of(0), max_new_tokens=64, stop=[word])
    scheduler.submit(asked.job)
    (answer,) = asked.wait().answers
    assert answer.text == text[: text.index(word)].strip()
    assert answer.finish_reason == "stop"
    assert "".join(piece for _, piece in asked.pieces) == answer.text


def test_a_full_queue_refuses(scheduler):
    held = Held(scheduler)
    waiting = [client() for _ in range(6)]
    for one in waiting:
        scheduler.submit(one.job)
    with pytest.raises(QueueFull, match="6 requests wait already"):
        scheduler.check_room()
    with pytest.raises(QueueFull):
        scheduler.submit(client().job)
    held.go.set()
    for one in waiting:
        one.wait()


def test_who_has_gone_is_not_answered(scheduler, batches):
    held = Held(scheduler)
    gone, stays = client(clip_of(0)), client(clip_of(1))
    scheduler.submit(gone.job)
    scheduler.submit(stays.job)
    gone.job.cancelled.set()
    held.client.job.cancelled.set()
    held.go.set()
    assert stays.wait().answers[0].text
    assert batches[1] == [stays.job]
    assert not gone.pieces


def test_a_run_that_takes_too_long_ends_as_it_is():
    hurried = Scheduler(MODEL, PROCESSOR, max_batch=1, max_waiting=1, max_seconds=2, cached_clips=0)
    slowly = lambda *_: time.sleep(0.02)  # noqa: E731 - else a fast machine is done in time
    asked = client(clip_of(0), max_new_tokens=1500, min_new_tokens=1500, on_text=slowly)
    hurried.submit(asked.job)
    (answer,) = asked.wait().answers
    hurried.close()
    assert answer.finish_reason == "length"
    assert 0 < answer.num_tokens < 1500
    assert answer.text == "".join(text for _, text in asked.pieces)


def test_one_bad_row_does_not_spoil_the_others(scheduler, batches):
    held = Held(scheduler)
    impossible = clip_of(1, merge=MergeConfig(visual_token_budget=2))  # not a token for each frame
    bad, good = client(impossible), client(clip_of(0))
    scheduler.submit(bad.job)
    scheduler.submit(good.job)
    held.go.set()
    assert good.wait().answers == alone(good).answers
    with pytest.raises(ValueError, match="visual_token_budget=2"):
        bad.wait()
    assert [len(batch) for batch in batches] == [1, 2]


def test_a_fault_of_the_model_is_told_and_the_thread_lives(scheduler, monkeypatch, capsys):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(MODEL, "generate", broken)
        asked = client()
        scheduler.submit(asked.job)
        with pytest.raises(RuntimeError, match="a bug"):
            asked.wait()
    assert "a bug" in capsys.readouterr().err
    again = client(clip_of(0))
    scheduler.submit(again.job)
    assert again.texts()


def test_a_row_too_long_for_the_context_is_refused(scheduler):
    asked = client(question="word " * 3000)
    scheduler.submit(asked.job)
    with pytest.raises(ValueError, match="2048"):
        asked.wait()


def test_closing_ends_the_thread(scheduler):
    scheduler.close()
    assert not scheduler._thread.is_alive()


def test_frames_keep_their_dtype_and_device(scheduler):
    clip = clip_of(0)
    assert clip.pixels.dtype == torch.float32
    asked = client(clip._replace(pixels=clip.pixels.double()), max_new_tokens=4)
    scheduler.submit(asked.job)
    assert asked.texts()
