"""Sizes and positions of visual tokens in the language model: what they are, and that generation keeps them."""

import pytest
import torch
from torch import Tensor

from aurora.generation import SamplingConfig, generate
from aurora.generation.engine import extend, prefill
from aurora.model.captioner import AuroraModel, Spliced
from aurora.model.llama import Llama, LlamaConfig
from aurora.model.merge import MergeConfig, TextPositions, TextSizeBias
from aurora.model.splice import check_placeholders
from tests.golden import full_case
from tests.golden_models import captioner

IMAGE = -200
WISH = {"token_kept_ratio": 0.2}
BIASED = MergeConfig(**WISH, text_size_bias=TextSizeBias.visual)
SPREAD = MergeConfig(**WISH, text_positions=TextPositions.original)
BOTH = MergeConfig(**WISH, text_size_bias=TextSizeBias.visual, text_positions=TextPositions.original, slowfast=True)
IDS = torch.tensor([[1, 50, IMAGE, 7, IMAGE, IMAGE, IMAGE, 8, 9]])


@pytest.fixture(scope="module")
def model() -> AuroraModel:
    model = captioner("kv4")
    model.config.eos_token_id = -1
    return model


def spliced(model: AuroraModel, merge: MergeConfig, ids: Tensor = IDS, **options: object) -> Spliced:
    pixels = full_case("vid4_r0.4")["pixel_values"]
    with torch.no_grad():
        visual = model.encode(pixels.expand(len(ids), -1, -1, -1, -1), merge=merge)
        return model.splice(ids, visual, **options)  # type: ignore[arg-type]


def test_by_default_nothing_is_biased_and_positions_count_what_was_delivered(model: AuroraModel) -> None:
    plain = spliced(model, MergeConfig(**WISH))
    assert plain.key_bias is None
    length = plain.position_ids.shape[1]
    assert plain.position_ids.tolist() == [list(range(length))]
    assert plain.next_position.tolist() == [[length]]


def test_the_bias_is_the_log_of_the_sizes_which_count_every_patch(model: AuroraModel) -> None:
    biased = spliced(model, BIASED)
    plain = spliced(model, MergeConfig(**WISH))
    assert torch.equal(biased.inputs_embeds, plain.inputs_embeds)
    assert torch.equal(biased.position_ids, plain.position_ids)
    per_frame = (plain.position_ids.shape[1] - 5) // 4
    bias, start = biased.key_bias[0], 2
    for frame in range(4):
        sizes = bias[start : start + per_frame].exp()
        assert float(sizes.sum()) == pytest.approx(25, rel=1e-5)
        assert torch.allclose(sizes, sizes.round(), atol=1e-4)
        assert float(sizes.max()) >= 2
        start += per_frame + (1 if frame == 0 else 0)  # a text token stands between the first two frames
    text = [0, 1, 2 + per_frame, -2, -1]
    assert bias[text].tolist() == [0.0] * 5


def test_original_positions_are_the_means_of_the_patches(model: AuroraModel) -> None:
    """Against the tower's own record of what merged with what."""
    spread, plain = spliced(model, SPREAD), spliced(model, MergeConfig(**WISH))
    with torch.no_grad():
        trace = model.encode(full_case("vid4_r0.4")["pixel_values"], merge=SPREAD, trace=True).traces[0][1]
    per_frame = (plain.position_ids.shape[1] - 5) // 4
    starts, base = [2, 3 + per_frame, 3 + 2 * per_frame, 3 + 3 * per_frame], [2, 28, 53, 78]
    for frame in range(4):
        source = trace.sources[-1][frame, 1:] - 1
        means = torch.stack([(source == token).nonzero().float().mean() for token in range(per_frame)])
        here = slice(starts[frame], starts[frame] + per_frame)
        assert spread.position_ids[0, here].tolist() == [base[frame] + round(float(mean)) for mean in means.sort()[0]]
        assert torch.equal(spread.inputs_embeds[0, here], plain.inputs_embeds[0, here][means.argsort(stable=True)])
    assert spread.position_ids[0, [0, 1, 2 + per_frame, -2, -1]].tolist() == [0, 1, 27, 103, 104]
    assert spread.next_position.tolist() == [[105]]


def test_original_positions_of_unmerged_frames_are_the_usual_ones(model: AuroraModel) -> None:
    whole = MergeConfig(text_positions=TextPositions.original, text_size_bias=TextSizeBias.visual)
    spread, plain = spliced(model, whole), spliced(model, MergeConfig())
    assert torch.equal(spread.position_ids, plain.position_ids)
    assert torch.equal(spread.inputs_embeds, plain.inputs_embeds)
    assert not spread.key_bias.any()


@pytest.mark.parametrize("merge", [BIASED, SPREAD, BOTH], ids=["bias", "positions", "both"])
@pytest.mark.parametrize(("strategy", "slack"), [("default", 64), ("full", 64), ("default", 0)])
def test_generation_keeps_bias_and_positions(
    model: AuroraModel, merge: MergeConfig, strategy: str, slack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached decoding, batches, forks and beams against running the whole sequence anew for each token."""
    monkeypatch.setattr(model.config, "feature_select_strategy", strategy)
    monkeypatch.setattr("aurora.generation.state.PREFILL_SLACK", slack)
    ids = torch.cat([IDS, torch.tensor([[1, 5, 6, 8, 2, IMAGE, 4, 4, 9]])])
    alone = [spliced(model, merge, ids[row : row + 1], padding_side="left") for row in range(2)]
    want = [recompute(model, row, 8) for row in alone]
    plain = recompute(model, spliced(model, MergeConfig(**WISH), IDS), 8)
    assert not torch.allclose(want[0][1], plain[1], atol=1e-3)
    text = torch.tensor([[0, 1, 20, 21, 22, 23, 24, 25, 26]])
    mixed = spliced(model, merge, torch.cat([ids, text]), attention_mask=None, padding_side="left")
    together = generate(model, mixed, SamplingConfig(max_new_tokens=8), keep_logits=True)
    heads = spliced(model, merge, IDS[:, :-2], padding_side="left")
    state = extend(model, prefill(model, heads), [[8, 9], [8]], [0, 0], room=8)
    forked = generate(model, state, SamplingConfig(max_new_tokens=8), keep_logits=True)
    for row in range(2):
        assert together.sequences[row].tolist() == want[row][0][0].tolist()
        assert torch.allclose(together.logits[row], want[row][1][0], atol=1e-4)
    assert forked.sequences[0].tolist() == want[0][0][0].tolist()
    assert torch.allclose(forked.logits[0], want[0][1][0], atol=1e-4)
    one, two = (
        generate(model, prompt, SamplingConfig(max_new_tokens=5, num_beams=2)).sequences for prompt in (alone[1], mixed)
    )
    assert one[0].tolist() == two[1].tolist()


def recompute(model: AuroraModel, prompt: Spliced, num_steps: int) -> tuple[Tensor, Tensor]:
    embeds, bias, positions = prompt.inputs_embeds, prompt.key_bias, prompt.position_ids
    ids, kept = [], []
    with torch.no_grad():
        for step in range(num_steps):
            logits = model.language_model(embeds, position_ids=positions, key_bias=bias)[:, -1]
            kept.append(logits)
            ids.append(logits.argmax(-1))
            embeds = torch.cat([embeds, model.language_model.embed(ids[-1][:, None])], dim=1)
            positions = torch.cat([positions, prompt.next_position + step], dim=1)
            bias = None if bias is None else torch.nn.functional.pad(bias, (0, 1))
    return torch.stack(ids, dim=1), torch.stack(kept, dim=1)


def test_a_biased_token_weighs_as_much_as_so_many_equal_ones() -> None:
    """In one layer: behind it, copies of a token see each other and the merged one sees itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=4, num_kv_heads=2, max_seq_len=64
    )
    llama = Llama(config).eval()
    embeds = torch.randn(1, 6, 32)
    sizes = torch.tensor([1, 3, 1, 2, 1, 1])
    with torch.no_grad():
        merged = llama(embeds, position_ids=torch.arange(6)[None], key_bias=sizes.float().log()[None])
        copies = llama(
            embeds.repeat_interleave(sizes, dim=1), position_ids=torch.arange(6).repeat_interleave(sizes)[None]
        )
        plain = llama(embeds, position_ids=torch.arange(6)[None])
    assert torch.allclose(merged[0, -2:], copies[0, -2:], atol=1e-5)
    assert not torch.allclose(merged[0, -2:], plain[0, -2:], atol=1e-4)


@torch.no_grad()
def test_the_loss_sees_bias_and_positions(model: AuroraModel) -> None:
    case = full_case("vid4_r0.4")
    losses = [float(model(**case, merge=merge).loss) for merge in (MergeConfig(**WISH), BIASED, SPREAD)]
    assert len({round(loss, 5) for loss in losses}) == 3


@pytest.mark.parametrize(("found", "frames"), [(0, 0), (0, 4), (1, 4), (4, 4), (1, 1)])
def test_right_numbers_of_placeholders_pass(found: int, frames: int) -> None:
    check_placeholders("row 3", found, frames)


@pytest.mark.parametrize(("found", "frames", "text_alone"), [(1, 0, True), (2, 4, True), (5, 4, True), (0, 4, False)])
def test_wrong_numbers_of_placeholders_are_refused(found: int, frames: int, text_alone: bool) -> None:
    with pytest.raises(ValueError, match=f"row 3: {found} placeholders? in the text for {frames} frames; want one"):
        check_placeholders("row 3", found, frames, text_alone=text_alone)
