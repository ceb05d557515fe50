"""The one thread that runs the model for a server: requests that wait are answered in batches.

A batch holds what waits and asks alike: the same sampling rules, each row with its own seed. Requests about one clip go
first together, since they share what the language model reads of it; otherwise clips differ from row to row. Rows do
not depend on what they are batched with, so an answer is the one that a request gets alone. A batch runs to its end
before the next begins. Encoded clips are kept for later requests.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aurora.generation.memory import available_bytes, row_bytes
from aurora.generation.outputs import GenerateOutput, VisualPrefix
from aurora.generation.sampling import SamplingConfig
from aurora.generation.streaming import GenerationCancelled, TextCallback, cut_at_stop
from aurora.model.captioner import VisualFeatures
from aurora.model.merge import MergeConfig
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor
from aurora.serving.chat_request import Answer, Costs


class Clip(NamedTuple):
    """The frames of a request."""

    pixels: Tensor
    """All of its images and videos, in their order, (F, 3, S, S)."""
    merge: MergeConfig
    """How they merge."""
    key: str
    """Equal for equal frames that merge alike."""


class Done(NamedTuple):
    """How a request ended."""

    answers: list[Answer]
    costs: Costs


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """One request, and whom to tell."""

    ids: list[int]
    """Its prompt with placeholders."""
    clip: Clip | None
    """Its frames; None for text alone."""
    sampling: SamplingConfig
    """Rules for all answers, without a seed."""
    seeds: list[int]
    """One for each answer."""
    logprobs: bool
    """Whether log-probabilities are wanted."""
    on_text: Callable[[int, str], None]
    """Gets the number of an answer and its next piece of text, in the model's thread."""
    on_end: Callable[[Done | Exception], None]
    """Gets the outcome, once, in the model's thread."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by whoever does not want the answers any more."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What was done before it came here."""


class QueueFull(Exception):  # noqa: N818 - the server answers it with "try again later"
    """Too many requests wait."""


class Scheduler:
    """Answers jobs with one model."""

    def __init__(
        self,
        model: AuroraForConditionalGeneration,
        processor: AuroraProcessor,
        *,
        max_batch: int,
        max_waiting: int,
        max_seconds: float,
        cached_clips: int,
    ) -> None:
        """Start the thread.

        Args:
            model: The model.
            processor: Its processor.
            max_batch: Most answers that are generated together.
            max_waiting: Most requests that wait.
            max_seconds: Longest run of a batch; answers end there as they are.
            cached_clips: Encoded clips that are kept.
        """
        self.model, self.processor = model, processor
        self.max_batch, self.max_waiting, self.max_seconds = max_batch, max_waiting, max_seconds
        self._cache = _Encodings(model, cached_clips)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._running: list[Job] = []
        self._thread = threading.Thread(target=self._work, name="aurora-serve", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> dict[str, int]:
        """Requests that wait and that run."""
        with self._changed:
            return {"waiting": len(self._waiting), "running": len(self._running)}

    def check_room(self) -> None:
        """Refuse early, before a request is worth any work.

        Raises:
            QueueFull: if as many requests wait as may.
        """
        with self._changed:
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")

    def submit(self, job: Job) -> None:
        """Line a job up.

        Raises:
            QueueFull: if as many requests wait as may.
        """
        with self._changed:
            self.check_room()
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Give up what waits and runs, and end the thread."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *self._running]:
                job.cancelled.set()
            self._changed.notify()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = []
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._running = self._take()
            self._answer(self._running)

    def _take(self) -> list[Job]:
        """Take the first job and those that may go with it off the queue."""
        for job in [job for job in self._waiting if job.cancelled.is_set()]:
            self._waiting.remove(job)
        if not self._waiting:
            return []
        first = self._waiting[0]
        alike = [job for job in self._waiting if (job.sampling, job.logprobs) == (first.sampling, first.logprobs)]
        same_clip = [job for job in alike if _key(job) == _key(first)]
        batch: list[Job] = []
        rows, used = 0, 0
        room = available_bytes(self.model.device)
        for job in same_clip if len(same_clip) > 1 else alike:
            used += self._bytes_of(job)
            rows += len(job.seeds)
            if batch and (rows > self.max_batch or (room is not None and used > room)):
                break
            batch.append(job)
        for job in batch:
            self._waiting.remove(job)
        return batch

    def _bytes_of(self, job: Job) -> int:
        pixels = 0 if job.clip is None else job.clip.pixels.numel()
        one = row_bytes(
            self.model.model,
            prompt_tokens=len(job.ids) + self._visual_tokens(job),
            new_tokens=job.sampling.max_new_tokens,
            num_pixels=pixels,
            num_beams=job.sampling.num_beams,
        )
        return one * len(job.seeds)

    def _visual_tokens(self, job: Job) -> int:
        if job.clip is None:
            return 0
        num_frames, _, height, width = job.clip.pixels.shape
        try:
            plans = self.model.model.plan(num_frames, height, width, job.clip.merge)
        except ValueError:
            return 0  # it will be refused
        return sum(plan.num_visual_tokens for plan in plans)

    def _answer(self, batch: list[Job]) -> None:
        """Run a batch; if one spoils it, each runs alone."""
        if len(batch) > 1:
            run = _Run(self, batch)
            try:
                run.go()
                return
            except Exception as error:
                # What was streamed cannot be taken back.
                if run.has_written or not isinstance(error, ValueError | torch.OutOfMemoryError):
                    run.fail(error)
                    return
        for job in batch:
            run = _Run(self, [job])
            try:
                run.go()
            except Exception as error:
                run.fail(error)


class _Run:
    """One batch on its way; it is the streamer of its own generation."""

    def __init__(self, scheduler: Scheduler, batch: Sequence[Job]) -> None:
        self.scheduler, self.batch = scheduler, batch
        self.rows = [(job, answer) for job in batch for answer in range(len(job.seeds))]
        self.has_written = False
        self._num_ended = 0
        self._deadline = time.monotonic() + scheduler.max_seconds
        self._ids: list[list[int]] = [[] for _ in self.rows]
        self._texts = TextCallback(scheduler.processor, self._give, stop=batch[0].sampling.stop_strings)
        self._written = [""] * len(self.rows)
        self._blanks = [""] * len(self.rows)
        self._costs: list[Costs] = []

    def fail(self, error: Exception) -> None:
        """Tell the jobs that did not end otherwise."""
        if not isinstance(error, ValueError | torch.OutOfMemoryError):
            traceback.print_exception(error)
        for job in self.batch[self._num_ended :]:
            job.on_end(error)

    def go(self) -> None:
        """Encode and generate.

        Raises:
            ValueError: if a row cannot be answered.
        """
        prefix, cached, encode_s = self._encode()
        model, processor = self.scheduler.model, self.scheduler.processor
        width = max(len(job.ids) for job in self.batch)
        ids = torch.full((len(self.rows), width), processor.tokenizer.pad_id)
        mask = torch.zeros((len(self.rows), width), dtype=torch.bool)
        for row, (job, _) in enumerate(self.rows):
            ids[row, width - len(job.ids) :] = torch.tensor(job.ids)
            mask[row, width - len(job.ids) :] = True
        row = 0
        for job, was_cached, seconds in zip(self.batch, cached, encode_s, strict=True):
            counts, patches = ([], 0) if prefix is None or job.clip is None else self._frames(prefix, row)
            row += len(job.seeds)
            self._costs.append(
                Costs(
                    prompt_tokens=sum(counts) + len(job.ids) - len(counts),
                    visual_tokens_per_frame=counts,
                    num_patches=patches,
                    seconds={**job.seconds, "encode": seconds},
                    cached=was_cached,
                )
            )
        sampling = dataclasses.asdict(self.batch[0].sampling)
        sampling["seed"] = [job.seeds[answer] for job, answer in self.rows]
        try:
            made = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                prefix=prefix,
                streamer=self,
                tokenizer=processor,
                return_dict=True,
                output_logprobs=self.batch[0].logprobs,
                **sampling,
            )
        except GenerationCancelled:
            self._finish(None)
            return
        assert isinstance(made, GenerateOutput)
        self._finish(made)

    def put(self, ids: Tensor) -> None:
        """Take the next token of each row; see `Streamer`."""
        late = time.monotonic() > self._deadline
        if late or all(job.cancelled.is_set() for job in self.batch):
            raise GenerationCancelled("nobody waits" if not late else "too late")
        for own, token in zip(self._ids, ids.tolist(), strict=True):
            own.append(token)
        self._texts.put(ids)

    def end(self) -> None:
        """Give out what was held back."""
        self._texts.end()

    def _give(self, row: int, text: str) -> None:
        job, answer = self.rows[row]
        # No blanks around it, as in a reply that comes whole.
        text = self._blanks[row] + text if self._written[row] else text.lstrip()
        known = text.rstrip()
        self._blanks[row] = text[len(known) :]
        if known:
            self.has_written = True
            self._written[row] += known
            if not job.cancelled.is_set():
                job.on_text(answer, known)

    def _encode(self) -> tuple[VisualPrefix | None, list[bool], list[float]]:
        """Frames of all rows: one clip if they share it, else a clip for each row."""
        clips = [job.clip for job in self.batch]
        known = [clip for clip in clips if clip is not None]
        if not known:
            return None, [False] * len(clips), [0.0] * len(clips)
        prefixes, new = self.scheduler._cache.get(known)
        cached = [clip is not None and clip.key not in new for clip in clips]
        sharing = Counter(clip.key for clip in known)
        seconds = [0.0 if clip is None else new.get(clip.key, 0.0) / sharing[clip.key] for clip in clips]
        if len(prefixes) == 1 and None not in clips:
            return next(iter(prefixes.values())), cached, seconds
        # A row of text alone needs a clip beside it as well; it does not look at it.
        features = [prefixes[(job.clip or known[0]).key].features for job, _ in self.rows]
        return VisualPrefix(features=VisualFeatures.join(features), seconds=0.0), cached, seconds

    def _frames(self, prefix: VisualPrefix, row: int) -> tuple[list[int], int]:
        """Visual tokens of each frame of a row, and the patches of all of them."""
        features = prefix.features
        clip = row * len(features.plans) // len(self.rows)  # one for all, or one for each
        return features.counts[clip], sum(plan.num_patches for plan in features.plans[clip])

    def _finish(self, made: GenerateOutput | None) -> None:
        """Tell every job its answers; without a result they end where they were stopped."""
        row = 0
        for job, costs in zip(self.batch, self._costs, strict=True):
            answers = [self._row_answer(row + answer, made) for answer in range(len(job.seeds))]
            row += len(job.seeds)
            if made is not None:
                share = len(job.seeds) / len(self.rows)
                phases = {phase: share * made.seconds[phase] for phase in ("prefill", "decode")}
                costs = dataclasses.replace(costs, seconds=costs.seconds | phases)
            self._num_ended += 1
            job.on_end(Done(answers, costs))

    def _row_answer(self, row: int, made: GenerateOutput | None) -> Answer:
        tokenizer = self.scheduler.processor.tokenizer
        if made is None:
            return Answer(text=self._written[row], finish_reason="length", num_tokens=len(self._ids[row]))
        ids: list[int] = made.sequences[row, : made.num_generated[row]].tolist()
        text = cut_at_stop(tokenizer.decode(ids), self.batch[0].sampling.stop_strings).strip()
        logprobs = None
        if made.logprobs is not None:
            values: list[float] = made.logprobs[row, : len(ids)].tolist()
            logprobs = [(tokenizer.decode([token]), value) for token, value in zip(ids, values, strict=True)]
        reason = "stop" if made.stopped_by[row] in ("eos", "stop") else "length"
        return Answer(text=text, finish_reason=reason, num_tokens=len(ids), logprobs=logprobs)


class _Encodings:
    """Encoded clips, those used last."""

    def __init__(self, model: AuroraForConditionalGeneration, most: int) -> None:
        self.model, self.most = model, most
        self._kept: OrderedDict[str, VisualPrefix] = OrderedDict()

    def get(self, clips: Sequence[Clip]) -> tuple[dict[str, VisualPrefix], dict[str, float]]:
        """Encode clips, those that are not kept.

        Args:
            clips: Perhaps some of them several times.

        Returns:
            The encoding of each key; of those that were not kept the seconds, in equal shares.

        Raises:
            ValueError: if one cannot be encoded as it wants to be.
        """
        wanted = {clip.key: clip for clip in clips}
        missing = [clip for key, clip in wanted.items() if key not in self._kept]
        found = {key: self._kept[key] for key in wanted if key in self._kept}
        # What the language model has read of a clip takes far more memory than its encoding: only the last one's stays.
        for key, prefix in self._kept.items():
            if key not in wanted or len(wanted) > 1:
                prefix.drop_state()
        seconds = {}
        if missing:
            options: dict[str, Any] = {
                setting.name: [getattr(clip.merge, setting.name) for clip in missing]
                for setting in dataclasses.fields(MergeConfig)
            }
            pixels = [clip.pixels.to(self.model.device, self.model.dtype) for clip in missing]
            encoded = self.model.encode(pixel_values_videos=pixels, **options)
            for number, clip in enumerate(missing):
                found[clip.key] = VisualPrefix(features=encoded.features.select([number]), seconds=0.0)
                seconds[clip.key] = encoded.seconds / len(missing)
        for key in wanted:
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        return found, seconds


def _key(job: Job) -> str | None:
    return None if job.clip is None else job.clip.key
