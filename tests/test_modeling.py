"""The public class on the goldens: loading, forward, generation, its options, and what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora.modeling import AuroraForConditionalGeneration, GenerateOutput
from tests.checkpoint.xtuner_files import write_xtuner
from tests.golden import RTOL_LM, assert_close_to_golden, full_case, load_index, load_tensors
from tests.golden_models import captioner

CASES = [
    "img_r1.0", "img_r0.4", "img_nonsq_r0.4", "vid4_r0.4", "vid4_slowfast_r0.4", "batch2_img_r0.4", "batch2_vid2_r0.4",
    "edge_batch2_one_textonly",
]  # fmt: skip
RATIO = {"img_r1.0": 1.0}
COUNTS = {
    "img_r1.0": [[25]],
    "img_r0.4": [[16]],
    "img_nonsq_r0.4": [[22]],
    "vid4_r0.4": [[16] * 4],
    "vid4_slowfast_r0.4": [[25, 16, 16, 16]],
    "batch2_img_r0.4": [[16], [16]],
    "batch2_vid2_r0.4": [[16, 16], [16, 16]],
    "edge_batch2_one_textonly": [[16], []],
}
Model = AuroraForConditionalGeneration


@pytest.fixture(scope="module", params=["kv2", "kv4"])
def golden_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Model]:
    """The golden model, loaded from the xtuner directory the original exporter writes; kv2's is sharded."""
    name: str = request.param
    root = write_xtuner(tmp_path_factory.mktemp(name), name, num_shards=2 if name == "kv2" else 1)
    return name, Model.from_pretrained(root)


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model(captioner("kv4")).eval()
    model.config.eos_token_id = -1
    return model


def options(case: str) -> dict[str, Any]:
    return {"token_kept_ratio": RATIO.get(case, 0.4), "slowfast": "slowfast" in case}


def inputs_of(case: str, *, labels: bool = False) -> dict[str, Tensor]:
    inputs = full_case(case)
    kept = ("input_ids", "pixel_values", "attention_mask", *(["labels"] if labels else []))
    return {key: inputs[key] for key in kept}


def flip_padding(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows, padded on the left."""
    flipped = dict(inputs)
    for row, mask in enumerate(inputs["attention_mask"]):
        shift = int((~mask).sum())
        for key in ("input_ids", "attention_mask"):
            flipped[key] = flipped[key].clone()
            flipped[key][row] = inputs[key][row].roll(shift)
    return flipped


def run(model: Model, case_inputs: dict[str, Tensor], **settings: Any) -> GenerateOutput:
    out = model.generate(**case_inputs, return_dict=True, **settings)  # type: ignore[arg-type]
    assert isinstance(out, GenerateOutput)
    return out


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_lengths_equal_the_goldens(golden_model: tuple[str, Model], case: str) -> None:
    name, model = golden_model
    golden = load_tensors(f"full_{name}_cases")
    with torch.no_grad():
        out = model(**inputs_of(case, labels=True), **options(case))
    lengths = load_index("full_index")[name]["cases"][case]["expanded_lengths"]
    assert out.attention_mask.sum(1).tolist() == lengths
    assert out.visual_token_counts == COUNTS[case]
    valid = out.attention_mask
    assert_close_to_golden(out.logits[valid], golden[f"{case}.logits"][valid], RTOL_LM)
    assert_close_to_golden(out.loss[None], golden[f"{case}.loss"], RTOL_LM)
    assert torch.equal(out.labels[valid], golden[f"{case}.expanded_labels"][valid])


@pytest.mark.parametrize("case", CASES)
def test_generated_ids_and_their_logits_equal_the_goldens_in_any_batch(
    golden_model: tuple[str, Model], case: str
) -> None:
    """Goldens come from single rows. Right-padded batches, wrong in the original, are the same here (NOTES 27)."""
    name, model = golden_model
    golden = load_tensors(f"full_{name}_cases")
    right_padded = inputs_of(case)
    for inputs in (right_padded, flip_padding(right_padded)):
        out = run(model, inputs, max_new_tokens=12, output_logits=True, **options(case))
        assert torch.equal(out.sequences, golden[f"{case}.generated"])
        assert out.logits is not None
        assert_close_to_golden(out.logits[:, 0], golden[f"{case}.generate_logits_step0"], RTOL_LM)
        assert_close_to_golden(out.logits[:, 11], golden[f"{case}.generate_logits_step11"], RTOL_LM)
        assert out.visual_token_counts == COUNTS[case]
    for row in range(len(right_padded["input_ids"])):
        length = int(right_padded["attention_mask"][row].sum())
        single = model.generate(
            right_padded["input_ids"][row : row + 1, :length],
            right_padded["pixel_values"][row : row + 1],
            max_new_tokens=12,
            **options(case),
        )
        assert torch.equal(single, golden[f"{case}.generated"][row : row + 1])


def test_end_of_text_is_included_and_minus_one_never_stops(model: Model) -> None:
    stop = load_index("full_index")["eos_stop_img_r0.4"]
    inputs = inputs_of("img_r0.4")
    out = run(model, inputs, max_new_tokens=12, eos_token_id=stop["eos_token_id"], token_kept_ratio=0.4)
    assert out.sequences.tolist() == [stop["generated"]]
    assert (out.stopped_by, out.num_generated) == (["eos"], [6])
    model.config.eos_token_id = stop["eos_token_id"]
    try:
        assert run(model, inputs, max_new_tokens=12, token_kept_ratio=0.4).sequences.tolist() == [stop["generated"]]
        assert run(model, inputs, max_new_tokens=12, token_kept_ratio=0.4, eos_token_id=-1).num_generated == [12]
    finally:
        model.config.eos_token_id = -1


def test_nothing_of_one_call_is_left_for_the_next(model: Model) -> None:
    """In the original, slowfast leaves the ratio at 1.0, and the second call has 116 positions instead of 89."""
    inputs = inputs_of("vid4_r0.4")
    before = dataclasses.replace(model.config.merge)
    with torch.no_grad():
        lengths = [
            model(**inputs, **wish).logits.shape[1]
            for wish in (
                {"token_kept_ratio": 0.4, "slowfast": True},
                {"token_kept_ratio": 0.4, "slowfast": True},
                {"token_kept_ratio": 0.4},
                {},
                {"token_kept_ratio": 0.4},
            )
        ]
    assert lengths == [89, 89, 80, 116, 80]
    assert model.config.merge == before


def test_defaults_of_the_model_hold_where_a_call_says_nothing(model: Model) -> None:
    inputs = inputs_of("img_r0.4")
    default = model.config.merge
    model.config.merge = dataclasses.replace(default, token_kept_ratio=0.4)
    try:
        assert run(model, inputs, max_new_tokens=1).visual_token_counts == [[16]]
        assert run(model, inputs, max_new_tokens=1, token_kept_ratio=1.0).visual_token_counts == [[25]]
    finally:
        model.config.merge = default


def test_budget_and_schedule_reach_the_plan(model: Model) -> None:
    inputs = inputs_of("vid4_r0.4")
    out = run(model, inputs, max_new_tokens=1, visual_token_budget=50)
    assert out.visual_token_counts == [[12] * 4]
    assert [plan.num_visual_tokens for plan in out.plans[0]] == [12] * 4
    out = run(model, inputs, max_new_tokens=1, token_kept_ratio=0.4, schedule="exact")
    assert out.visual_token_counts == [[10] * 4]
    assert set(out.seconds) == {"encode", "prefill", "decode", "warmup"}
    assert out.seconds["encode"] > 0


def test_one_encoding_answers_several_prompts(model: Model) -> None:
    inputs = inputs_of("vid4_r0.4")
    prefix = model.encode(pixel_values_videos=inputs["pixel_values"], token_kept_ratio=0.4)
    first = inputs["input_ids"]
    other = first.clone()
    other[0, -3:] = torch.tensor([7, 8, 9])
    want = [
        model.generate(ids, inputs["pixel_values"], max_new_tokens=8, token_kept_ratio=0.4) for ids in (first, other)
    ]
    both = model.generate(torch.cat([first, other]), prefix=prefix, max_new_tokens=8)
    assert torch.equal(both, torch.cat(want))  # type: ignore[arg-type]
    out = run(model, {"input_ids": first}, prefix=prefix, max_new_tokens=8)
    assert torch.equal(out.sequences, want[0])  # type: ignore[arg-type]
    assert out.visual_token_counts == [[16] * 4]
    with pytest.raises(ValueError, match="prefix: got pixels or merging options as well"):
        model.generate(first, prefix=prefix, token_kept_ratio=0.4)
    with pytest.raises(ValueError, match="encode: got no pixels"):
        model.encode()


def test_one_placeholder_stands_for_the_whole_clip(model: Model) -> None:
    inputs = inputs_of("vid4_r0.4")
    ids = torch.tensor([[1, 50, 44, -200, 13, 173, 101]])
    out = run(model, {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, max_new_tokens=2)
    assert out.visual_token_counts == [[25] * 4]


def test_an_image_is_a_clip_of_one_frame(model: Model) -> None:
    inputs = inputs_of("img_r0.4")
    frames = inputs["pixel_values"]
    ids = inputs["input_ids"]
    results = [
        model.generate(ids, pixel_values=frames[:, 0], max_new_tokens=6),
        model.generate(ids, pixel_values=frames, max_new_tokens=6),
        model.generate(ids, pixel_values_videos=frames, max_new_tokens=6),
    ]
    assert all(torch.equal(result, results[0]) for result in results)  # type: ignore[arg-type]


def test_text_alone_needs_no_pixels(model: Model) -> None:
    out = run(model, {"input_ids": torch.tensor([[1, 13, 213]])}, max_new_tokens=3)
    assert (out.visual_token_counts, out.plans, out.seconds["encode"]) == ([[]], [()], 0.0)


def test_past_key_values_continue_where_the_call_ended(model: Model) -> None:
    inputs = inputs_of("batch2_img_r0.4")
    more = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        out = model(**inputs, token_kept_ratio=0.4, use_cache=True)
        mask = torch.cat([out.attention_mask, torch.ones_like(more, dtype=torch.bool)], dim=1)
        continued = model(more, past_key_values=out.past_key_values, attention_mask=mask)
        for row in range(2):
            length = int(inputs["attention_mask"][row].sum())
            ids = torch.cat([inputs["input_ids"][row, :length], more[row]])[None]
            whole = model(ids, inputs["pixel_values"][row : row + 1], token_kept_ratio=0.4)
            assert_close_to_golden(continued.logits[row], whole.logits[0, -3:], RTOL_LM)
        with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 3\), want \(2, 36\), past included"):
            model(more, past_key_values=out.past_key_values, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"use_cache=True: .*want torch\.no_grad"):
        model(more, use_cache=True)


def test_every_parameter_that_takes_part_gets_a_gradient() -> None:
    model = Model(captioner("kv4"))
    out = model(**inputs_of("img_r0.4", labels=True), token_kept_ratio=0.4)
    out.loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all("blocks.3." in name or "norm_post" in name for name in without)  # behind the feature layer


def refuse_encoding(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the encoder ran")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_ids": torch.tensor([[1, -200, 30, -200, 5]]), "attention_mask": None},
            "row 0: 2 placeholders in the text for 4 frames; want one placeholder per frame",
        ),
        ({"pixel_values": None}, "row 0: 4 placeholders in the text for 0 frames"),
        ({"input_ids": torch.tensor([1, -200])}, r"input_ids: got shape \(2,\), want \(rows, tokens\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask: got shape \(1, 3\), want \(1, 20\)"),
        ({"pixel_values_videos": torch.zeros(1, 4, 3, 70, 70)}, "pixel_values and pixel_values_videos, want one"),
        ({"pixel_values": torch.zeros(3, 70, 70)}, r"pixel_values: got shape \(3, 70, 70\), want \(rows, frames"),
        ({"token_kept_ratio": 1.5}, r"token_kept_ratio=1\.5: want a number in \(0, 1\]"),
        ({"token_kept_ratio": 0}, "token_kept_ratio=0"),
        ({"visual_token_budget": 3}, "visual_token_budget=3: 4 merged frames need at least"),
        ({"temperature": -1}, "temperature=-1"),
        ({"num_beams": 0}, "num_beams=0: want an integer >= 1"),
        ({"max_tokens": 3}, "max_tokens: no such option, want one of"),
    ],
)
def test_wrong_calls_are_refused_before_the_encoder_runs(
    model: Model, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(model.model.vision_tower, "forward", refuse_encoding)
    with pytest.raises(ValueError, match=message):
        model.generate(**{**inputs_of("vid4_r0.4"), **changes})


def test_prompts_beyond_the_context_are_refused_with_the_numbers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.model.vision_tower, "forward", refuse_encoding)
    monkeypatch.setattr(model.config.text, "max_seq_len", 80)
    inputs = inputs_of("vid4_r0.4")
    wanted = r"row 0: 16 text \+ 64 visual = 80 prompt tokens leave no room for an answer; want at most 79"
    with pytest.raises(ValueError, match=wanted):
        model.generate(**inputs, token_kept_ratio=0.4)
    monkeypatch.undo()
    monkeypatch.setattr(model.config.text, "max_seq_len", 83)
    out = run(model, inputs, token_kept_ratio=0.4, max_new_tokens=500)
    assert (out.num_generated, out.stopped_by) == ([3], ["context"])


def test_class_token_kept_by_full_is_counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config, "feature_select_strategy", "full")
    out = run(model, inputs_of("vid4_r0.4"), token_kept_ratio=0.4, max_new_tokens=1)
    assert out.visual_token_counts == [[17] * 4]
    monkeypatch.setattr(model.config.text, "max_seq_len", 84)
    with pytest.raises(ValueError, match=r"16 text \+ 68 visual = 84"):
        model.generate(**inputs_of("vid4_r0.4"), token_kept_ratio=0.4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_implementation": "fast"}, "attn_implementation='fast'"),
        ({"use_flash_attention_2": True}, "attn_implementation=flash_attention_2: "),
        ({"quantization_config": object()}, "quantization_config=object: want a BitsAndBytesConfig"),
        ({"torch_dtype": "int4"}, "torch_dtype='int4': want auto or one of"),
        ({"device_map": "the moon"}, "device_map='the moon': want auto or a device"),
        ({"device_map": {"vision": 0, "text": 1}}, "want one device for the whole model"),
    ],
)
def test_loading_options_that_cannot_be_had_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    Model(captioner("kv4")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(tmp_path, **settings)


def test_the_published_snippet_runs(tmp_path: Path) -> None:
    source = Model(captioner("kv4"))
    source.image_aspect_ratio = "pad"
    source.save_pretrained(tmp_path)
    model = Model.from_pretrained(
        tmp_path,
        torch_dtype=torch.float16,
        low_cpu_mem_usage=True,
        device_map={"": "cpu"},
        attn_implementation="eager",
        quantization_config=None,
    ).to("cpu")
    assert (model.dtype, model.device.type, model.training) == (torch.float16, "cpu", False)
    assert model.config.attn_implementation == model.model.language_model.backend == "eager"
    assert model.image_aspect_ratio == "pad"
    inputs = inputs_of("img_r0.4")
    output = model.generate(
        inputs["input_ids"], inputs["pixel_values"].half(), max_new_tokens=5, token_kept_ratio=0.2, eos_token_id=-1
    )
    assert output.shape == (1, 5)  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", ["aurora", "xtuner"])
def test_saved_models_come_back_bit_identical(tmp_path: Path, layout: str) -> None:
    model = Model(captioner("kv2"))
    model.save_pretrained(tmp_path, layout=layout, max_shard_size="50KB")
    again = Model.from_pretrained(tmp_path)
    assert again.config == model.config
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
