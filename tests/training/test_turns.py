"""Packing: each turn is learned exactly as if it were alone behind the prefix, and only answers are learned."""

import pytest
import torch

from aurora.data.tinyworld.language import SLOT_WORDS, captions, qa_pairs
from aurora.data.tinyworld.scene import sample_scene
from aurora.model.llama import Llama, LlamaConfig
from aurora.processing.chat import build_prompt, tokenize_prompt
from aurora.training.config import TrainConfig
from aurora.training.init import init_llama
from aurora.training.language_tasks import turn_logits
from aurora.training.tiny import load_tokenizer
from aurora.training.turn_book import TurnBook
from aurora.training.turns import IGNORED, Turn, answer_tokens, exact_turns, pack_turns, turn_loss, turn_mask

TURNS = [
    [Turn("a", (5, 6, 7), (8, 2), (3.0, 1.0)), Turn("b", (9, 10), (11, 12, 2), (1.0, 1.0, 1.0))],
    [Turn("c", (13,), (14, 2), (1.0, 1.0))],
]


@pytest.fixture(scope="module")
def decoder() -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=2)
    model = Llama(config, backend="eager")
    init_llama(model)
    return model.eval()


def test_only_answers_are_labelled() -> None:
    packed = pack_turns(TURNS, [4, 2], pad_id=0)
    assert packed.input_ids[0].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert packed.labels[0].tolist() == [IGNORED, IGNORED, 8, 2, IGNORED, 11, 12, 2]
    assert packed.weights[0].tolist() == [0, 0, 3, 1, 0, 1, 1, 1]
    assert packed.position_ids[0].tolist() == [4, 5, 6, 7, 4, 5, 6, 7]
    assert packed.labels[1].tolist() == [14, 2, *[IGNORED] * 6]
    assert packed.turn_index[1].tolist() == [0, 0, *[-1] * 6]


def test_packed_turns_equal_lone_sequences(decoder: Llama) -> None:
    lengths = [4, 2]
    torch.manual_seed(1)
    prefix = torch.randn(2, 4, 32)
    packed = pack_turns(TURNS, lengths, pad_id=0)
    logits = turn_logits(decoder, prefix, lengths, packed)
    for b, row in enumerate(TURNS):
        for index, turn in enumerate(row):
            text = torch.tensor([[*turn.prompt_ids, *turn.answer_ids[:-1]]])
            alone = torch.cat([prefix[b : b + 1, : lengths[b]], decoder.embed(text)], dim=1)
            positions = torch.arange(alone.shape[1])[None]
            want = decoder(alone, position_ids=positions)[0, lengths[b] :]
            torch.testing.assert_close(logits[b][packed.turn_index[b] == index], want, rtol=1e-4, atol=1e-5)


def test_turns_are_hidden_from_each_other() -> None:
    packed = pack_turns(TURNS, [4, 2], pad_id=0)
    mask = turn_mask([4, 2], 4, packed.turn_index)
    assert mask.shape == (2, 12, 12)
    assert mask[0, 8, :4].all()  # the second turn sees the prefix
    assert not mask[0, 8, 4:8].any()  # and not the first turn
    assert not mask[1, 4, 2:4].any()  # padding of the prefix is hidden
    assert mask.diagonal(dim1=1, dim2=2).all()  # no softmax row is empty


def test_loss_weighs_words_and_clips(decoder: Llama) -> None:
    packed = pack_turns(TURNS, [4, 2], pad_id=0)
    logits = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    first = -(3 * log_p[0, 2, 8] + log_p[0, 3, 2] + log_p[0, 5, 11] + log_p[0, 6, 12] + log_p[0, 7, 2]) / 7
    second = -(log_p[1, 0, 14] + log_p[1, 1, 2]) / 2
    torch.testing.assert_close(turn_loss(logits, packed), (first + second) / 2)


def test_exact_turns_need_every_id() -> None:
    packed = pack_turns(TURNS, [4, 2], pad_id=0)
    logits = torch.zeros(2, 8, 32)
    logits.scatter_(2, packed.labels.clamp_min(0)[..., None], 1.0)
    assert exact_turns(logits, packed) == [[True, True], [True]]
    logits[0, 7] = 0
    assert exact_turns(logits, packed) == [[True, False], [True]]


def test_rows_without_turns_are_refused() -> None:
    with pytest.raises(ValueError, match="want one or more each"):
        pack_turns([[], TURNS[1]], [4, 2], pad_id=0)


def test_turns_tokenise_as_inference_does(prepared: TrainConfig) -> None:
    tokenizer = load_tokenizer(prepared)
    book = TurnBook(tokenizer, num_frames=4, frame_template="{index} <image>")
    for seed in range(20):
        scene = sample_scene(seed)
        pairs, turns = qa_pairs(scene, seed), book.questions(scene, seed)
        for pair, turn in zip(pairs, turns, strict=True):
            whole = tokenize_prompt(build_prompt(pair.question, 4, "{index} <image>"), tokenizer, -200)
            assert (*book.prefix(-200), *turn.prompt_ids) == tuple(whole)
            assert turn.answer_ids == (*tokenizer.encode(pair.answer), tokenizer.eos_id)
        for text, turn in zip(captions(scene, seed).values(), book.captions(scene, seed), strict=True):
            assert turn.answer_ids == (*tokenizer.encode(text), tokenizer.eos_id)
            assert tokenizer.decode(turn.answer_ids) == text


def test_fact_words_weigh_more(prepared: TrainConfig) -> None:
    tokenizer = load_tokenizer(prepared)
    ids, weights = answer_tokens("The red circle.", tokenizer, slot_words=SLOT_WORDS, slot_weight=3.0)
    pieces = [tokenizer.decode([i]) for i in ids[:-1]]
    for piece, weight in zip(pieces, weights[:-1], strict=True):
        assert weight == (1.0 if piece in ("The", "T", "h", "e") else 3.0), (pieces, weights)
    assert weights[-1] == 1.0
