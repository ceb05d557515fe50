"""The public class on rows that differ in everything, on prompts that share a clip, and on contexts that are full."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora.generation.prompts import merge_for_clips, read_prompts, split_heads
from aurora.model.merge import MergeConfig, Schedule, TextPositions
from aurora.modeling import AuroraForConditionalGeneration, GenerateOutput
from tests.golden_models import captioner

IMAGE = -200
SIZES = [(4, 70, 70), (1, 70, 70), (3, 56, 98), (2, 98, 42), (6, 28, 28), (1, 112, 70)]
RATIOS = [0.4, 1.0, 0.7, 0.2]
Model = AuroraForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model(captioner("kv4")).eval()
    model.config.eos_token_id = -1
    return model


def clip(row: int) -> Tensor:
    frames, height, width = SIZES[row % len(SIZES)]
    return torch.randn(frames, 3, height, width, generator=torch.Generator().manual_seed(row))


def text(length: int, seed: int) -> list[int]:
    return torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompt(row: int, num_frames: int) -> list[int]:
    """A placeholder for each frame, or one for the clip, or none; text of any length around them."""
    return [1, *text(row % 5, row), *([IMAGE] * (num_frames if row % 3 else 1)), *text(2 + 3 * row % 11, 50 + row)]


def pad(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ids = [blank + row if side == "left" else row + blank for row, blank in zip(rows, fill)]
    ones = [[1] * len(row) for row in rows]
    mask = [blank + row if side == "left" else row + blank for row, blank in zip(ones, fill)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def run(model: Model, **inputs: Any) -> GenerateOutput:
    out = model.generate(**{"max_new_tokens": 8, **inputs}, return_dict=True, output_logprobs=True)
    assert isinstance(out, GenerateOutput)
    return out


@pytest.mark.parametrize("side", ["left", "right"])
def test_sixteen_clips_that_are_alike_in_nothing_get_the_ids_of_single_runs(model: Model, side: str) -> None:
    clips: list[Tensor | None] = [clip(row) for row in range(16)]
    clips[5] = clips[11] = None
    rows = [prompt(row, len(pixels)) if pixels is not None else text(4 + row, row) for row, pixels in enumerate(clips)]
    rows[7] = text(9, 7)  # a clip that its prompt does not show
    ratios = [RATIOS[row % 4] for row in range(16)]
    slowfast = [row % 5 == 0 for row in range(16)]
    out = run(model, **pad(rows, side), pixel_values_videos=clips, token_kept_ratio=ratios, slowfast=slowfast)
    seen = set()
    for row, pixels in enumerate(clips):
        alone = run(
            model,
            input_ids=torch.tensor([rows[row]]),
            pixel_values_videos=None if pixels is None else pixels[None],
            token_kept_ratio=ratios[row],
            slowfast=slowfast[row],
        )
        assert out.sequences[row].tolist() == alone.sequences[0].tolist()
        assert float((out.logprobs[row] - alone.logprobs[0]).abs().max()) < 1e-4
        assert out.visual_token_counts[row] == alone.visual_token_counts[0]
        assert out.plans[row] == alone.plans[0]
        seen.add(tuple(out.sequences[row].tolist()))
    assert len(seen) > 10  # or equality would say little
    assert out.visual_token_counts[5] == out.visual_token_counts[7] == []


def test_frames_alike_go_through_the_tower_together_and_hidden_clips_not_at_all(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[int, ...]] = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda _, args: runs.append(tuple(args[0].shape)))
    clips = [clip(0), clip(2), clip(0)[:2], clip(1)]
    rows = [prompt(1, 4), prompt(1, 3), prompt(1, 2), text(5, 1)]
    run(model, **pad(rows), pixel_values_videos=clips, token_kept_ratio=0.4)
    assert sorted(runs) == [(3, 3, 56, 98), (6, 3, 70, 70)]
    runs.clear()
    run(model, input_ids=torch.tensor([text(5, 1)]), pixel_values=clips[0][None])
    assert runs == []
    handle.remove()


def test_images_may_differ_in_size_and_forward_takes_lists(model: Model) -> None:
    images = [clip(1)[0], clip(5)[0], None]
    rows = [[1, IMAGE, 5, 6], [1, 9, IMAGE, 7, 8], [1, 4]]
    out = run(model, **pad(rows), pixel_values=images)
    assert out.visual_token_counts == [[25], [40], []]
    with torch.no_grad():
        whole = model(**pad(rows, "right"), pixel_values=images, token_kept_ratio=[1.0, 0.4, None], use_cache=True)
        for row, image in enumerate(images):
            alone = model(
                torch.tensor([rows[row]]),
                pixel_values=None if image is None else image[None],
                token_kept_ratio=[1.0, 0.4, 1.0][row],
            )
            own = whole.logits[row, whole.attention_mask[row]]
            assert torch.allclose(own, alone.logits[0], atol=1e-4)
            assert whole.visual_token_counts[row] == alone.visual_token_counts[0]
    assert whole.past_key_values.length == whole.logits.shape[1]


def questions(count: int, num_frames: int) -> list[list[int]]:
    return [[1, 50, *[IMAGE] * num_frames, *text(3 + 4 * number, 90 + number)] for number in range(count)]


def record_reads(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, positions) of each run of the language model over more than one position."""
    reads: list[tuple[int, int]] = []
    real = model.model.language_model.forward

    def forward(embeds: Tensor, **options: Any) -> Tensor:
        if embeds.shape[1] > 1:
            reads.append((embeds.shape[0], embeds.shape[1]))
        return real(embeds, **options)

    monkeypatch.setattr(model.model.language_model, "forward", forward)
    return reads


def test_prompts_over_one_clip_read_it_once_even_from_call_to_call(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = questions(5, 4)
    want = [
        run(model, input_ids=torch.tensor([row]), pixel_values_videos=clip(0)[None], token_kept_ratio=0.4)
        for row in rows
    ]
    reads = record_reads(model, monkeypatch)
    head, longest = 2 + 4 * 16, max(map(len, rows)) - 6
    joint = run(model, **pad(rows), pixel_values_videos=[clip(0)], token_kept_ratio=0.4)
    assert reads == [(1, head), (5, longest)]
    prefix = model.encode(pixel_values_videos=clip(0)[None], token_kept_ratio=0.4)
    reads.clear()
    batch = run(model, **pad(rows), prefix=prefix)
    assert reads == [(1, head), (5, longest)]
    reads.clear()
    later = [run(model, input_ids=torch.tensor([row]), prefix=prefix) for row in rows]
    assert reads == [(1, len(row) - 6) for row in rows]
    reads.clear()
    prefix.drop_state()
    again = run(model, input_ids=torch.tensor([rows[1]]), prefix=prefix)
    assert reads == [(1, head), (1, len(rows[1]) - 6)]
    other = [1, 51, *rows[2][2:]]  # begins differently
    reads.clear()
    run(model, input_ids=torch.tensor([other]), prefix=prefix)
    assert reads[0] == (1, head)
    for row, single in enumerate(want):
        ids = single.sequences[0].tolist()
        assert joint.sequences[row].tolist() == batch.sequences[row].tolist() == ids
        assert later[row].sequences[0].tolist() == ids
        assert float((batch.logprobs[row] - single.logprobs[0]).abs().max()) < 1e-4
        assert batch.visual_token_counts[row] == [16] * 4
    assert again.sequences.tolist() == want[1].sequences.tolist()


def test_several_clips_serve_several_prompts_each(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [clip(0), clip(2), clip(4)]
    rows = [row for pixels in clips for row in questions(3, len(pixels))]
    rows[4] = [1, *text(6, 3)]  # one of them asks nothing of its clip
    ratios = [0.4, 1.0, 0.7]
    want = [
        run(
            model,
            input_ids=torch.tensor([row]),
            pixel_values_videos=clips[number // 3][None],
            token_kept_ratio=ratios[number // 3],
        ).sequences[0]
        for number, row in enumerate(rows)
    ]
    prefix = model.encode(pixel_values_videos=clips, token_kept_ratio=ratios)
    reads = record_reads(model, monkeypatch)
    for inputs in ({"prefix": prefix}, {"prefix": prefix}, {"pixel_values_videos": clips, "token_kept_ratio": ratios}):
        out = run(model, **pad(rows), **inputs)
        assert [row.tolist() for row in out.sequences] == [row.tolist() for row in want]
        assert [len(counts) for counts in out.visual_token_counts] == [4, 4, 4, 3, 0, 3, 6, 6, 6]
    assert sum(rows for rows, _ in reads if rows < 9) == 2 * 4  # three clips and a text, in two of the three calls


def test_beams_and_seeds_work_over_a_shared_clip(model: Model) -> None:
    rows, prefix = questions(3, 4), model.encode(pixel_values_videos=clip(0)[None], token_kept_ratio=0.4)
    for settings in ({"num_beams": 3}, {"temperature": 1.0, "seed": 5}):
        joint = run(model, **pad(rows), prefix=prefix, **settings)
        for row, ids in enumerate(rows):
            alone = run(
                model, input_ids=torch.tensor([ids]), pixel_values_videos=[clip(0)], token_kept_ratio=0.4, **settings
            )
            assert joint.sequences[row].tolist() == alone.sequences[0].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_kept_ratio": [0.4]}, "token_kept_ratio: got 1 values for 2 clips, want one for each"),
        ({"token_kept_ratio": [0.4, 1.4]}, r"token_kept_ratio=1\.4"),
        ({"pixel_values_videos": [clip(0), clip(0)[0]]}, r"pixel_values_videos\[1\]: got shape \(3, 70, 70\)"),
        ({"pixel_values_videos": [clip(0)] * 4}, "input_ids has 2 rows for 4 clips; want as many, or a multiple"),
        ({"pixel_values_videos": [clip(0), None]}, "row 1: 4 placeholders in the text for 0 frames"),
        ({"pixel_values_videos": [clip(0), clip(2)]}, "row 1: 4 placeholders in the text for 3 frames"),
        ({"pixel_values_videos": [clip(0), clip(0)[:, :, :5]]}, "frame of 5x70 px"),
        ({"stop": ["x"]}, "want tokenizer= as well"),
        ({"input_ids": [[5, 6]]}, "input_ids: got list, want a tensor of integers"),
        ({"input_ids": torch.ones(2, 3)}, r"input_ids: got torch\.float32, want a tensor of integers"),
        (
            {"input_ids": torch.zeros(0, 3).long()},
            r"input_ids: got shape \(0, 3\), want \(rows, tokens\) with at least",
        ),
        ({"min_new_tokens": 5000, "max_new_tokens": 9000}, "min_new_tokens=5000: want less than text.max_seq_len="),
        ({"num_beams": 2, "output_logits": True}, "want num_beams=1 with output_logits"),
    ],
)
def test_wrong_lists_are_refused(model: Model, changes: dict[str, Any], message: str) -> None:
    inputs = {**pad(questions(2, 4)), "pixel_values_videos": [clip(0), clip(0)], **changes}
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs)


def test_options_in_lists_give_each_clip_its_own() -> None:
    base = MergeConfig(schedule=Schedule.list, r=[1, 2])
    both = merge_for_clips(base, {"token_kept_ratio": [0.3, None], "slowfast": True}, 2)
    assert [wish.token_kept_ratio for wish in both] == [0.3, 1.0]
    assert [wish.schedule for wish in both] == [Schedule.constant, Schedule.list]
    assert [wish.slowfast for wish in both] == [True, True]
    assert [wish.r for wish in merge_for_clips(base, {"r": [3, 4]}, 2)] == [[3, 4], [3, 4]]
    assert [wish.r for wish in merge_for_clips(base, {"r": [[3, 4], None]}, 2)] == [[3, 4], [1, 2]]
    spread = merge_for_clips(MergeConfig(), {"text_positions": ["original", "merged"]}, 2)
    assert [wish.text_positions for wish in spread] == [TextPositions.original, TextPositions.merged]


def test_prompts_split_behind_their_last_frame() -> None:
    ids = torch.tensor([[1, IMAGE, 5, IMAGE, 6, 7], [1, IMAGE, 5, IMAGE, 8, 0], [1, 2, 3, 0, 0, 0]])
    prompts = read_prompts(ids, ids != 0, num_clips=1, image_token_index=IMAGE)
    split = split_heads(prompts, IMAGE)
    assert [head.ids for head in split.heads] == [(1, IMAGE, 5, IMAGE), (1, 2, 3)]
    assert (split.row_of, split.suffixes) == ([0, 0, 1], [(6, 7), (8,), ()])


@pytest.mark.parametrize("select", ["default", "full"])
@pytest.mark.parametrize("merging", [{}, {"schedule": "linear"}, {"slowfast": True}, {"visual_token_budget": 90}])
def test_a_full_context_is_refused_with_a_budget_and_a_ratio_that_fit(
    model: Model, monkeypatch: pytest.MonkeyPatch, merging: dict[str, Any], select: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(model.config, "feature_select_strategy", select)
    monkeypatch.setattr(model.config.text, "max_seq_len", 90)
    inputs = {"input_ids": torch.tensor([questions(1, 4)[0]]), "pixel_values": clip(0)[None], "max_new_tokens": 20}
    with monkeypatch.context() as watched:
        watched.setattr(model.model.vision_tower, "forward", refuse)
        with pytest.raises(ValueError, match=r"5 text \+ \d+ visual = \d+ prompt tokens leave no room") as refused:
            model.generate(**inputs, **merging)
    said = str(refused.value)
    assert said.endswith("leaves room for 20 new tokens")
    budget, ratio = re.search(r"visual_token_budget=(\d+)", said), re.search(r"token_kept_ratio=([\d.]+)", said)
    found = [{"visual_token_budget": int(budget[1])}] if budget else []
    found += [{"token_kept_ratio": float(ratio[1])}] if ratio else []
    assert found
    for change in found:
        out = run(model, **inputs, **{**merging, **change})
        assert out.stopped_by == ["length"]
    if budget is not None:
        assert int(budget[1]) == 90 - 5 - 20 - 4 * (select == "full")
    if ratio is not None and float(ratio[1]) <= 0.98:  # the next larger one does not fit
        more = {**merging, "token_kept_ratio": float(ratio[1]) + 0.01, "visual_token_budget": None}
        plans = model.model.plan(4, 70, 70, model.merge_config(**more))
        assert sum(plan.num_visual_tokens + (select == "full") for plan in plans) > 90 - 5 - 20


def test_advice_where_nothing_or_only_a_short_answer_fits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config.text, "max_seq_len", 90)
    inputs: dict[str, Any] = {"input_ids": torch.tensor([questions(1, 4)[0]]), "pixel_values": clip(0)[None]}
    with pytest.raises(ValueError, match=r"leaves room for 1 new token$"):
        model.generate(**inputs, max_new_tokens=500)
    with pytest.raises(ValueError, match=r"leave no room for min_new_tokens=30; .*leaves room for 30 new tokens"):
        model.generate(**inputs, token_kept_ratio=0.4, min_new_tokens=30, max_new_tokens=400)
    with pytest.raises(ValueError, match=r"text_positions=original counts every patch"):
        model.generate(**inputs, token_kept_ratio=0.2, text_positions="original")
    with pytest.raises(ValueError, match=r"0 visual = 95 prompt tokens .*: shorten the prompt"):
        model.generate(torch.tensor([text(95, 0)]))
    inputs["input_ids"] = torch.tensor([[*questions(1, 4)[0], *text(88, 1)]])
    with pytest.raises(ValueError, match=r": lower num_frm or shorten the prompt"):
        model.generate(**inputs)


def test_stop_strings_end_rows_where_they_end_alone(tmp_path: Path, model: Model) -> None:
    class Letters:
        """Ids as letters."""

        special_ids = frozenset({0})

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(int(token)) for token in ids)

        def is_partial(self, token_id: int) -> bool:
            return False

    rows = questions(3, 4)
    free = run(model, **pad(rows), pixel_values=[clip(0)]).sequences
    stop = [chr(int(free[0, 2])) + chr(int(free[0, 3])), chr(int(free[2, 4]))]
    out = run(model, **pad(rows), pixel_values=[clip(0)], stop=stop, tokenizer=Letters())
    for row, ids in enumerate(free.tolist()):
        ends = [n for n in range(1, 9) if any(s in "".join(map(chr, ids[:n])) for s in stop)]
        assert out.num_generated[row] == (ends[0] if ends else 8)
        assert out.stopped_by[row] == ("stop" if ends else "length")
    assert "stop" in out.stopped_by
