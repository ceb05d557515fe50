import pytest
import torch

from aurora.data.collate import collate, pack_rows, plan_packs
from aurora.model.captioner import AuroraConfig, AuroraModel, next_token_loss
from aurora.model.llama import LlamaConfig
from aurora.model.merge import MergeConfig, TextSizeBias
from aurora.model.vision import VisionConfig
from tests.data.datasets import opened, write_dataset


@pytest.fixture
def batch(tmp_path):
    data = opened(write_dataset(tmp_path))
    return collate([data[index] for index in (0, 6, 9, 3, 11)], pad_id=0)


def model():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=220, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=256
    )
    vision = VisionConfig(hidden_size=8, intermediate_size=8, num_layers=3, num_heads=2, image_size=28)
    return AuroraModel(AuroraConfig(vision=vision, text=text, attn_implementation="eager"))


def test_padding(batch):
    counts = batch.attention_mask.sum(dim=1).tolist()
    assert batch.input_ids.shape == (5, max(counts))
    assert (batch.input_ids[2, counts[2] :] == 0).all()
    assert (batch.labels[~batch.attention_mask] == -100).all()
    assert [None if clip is None else len(clip) for clip in batch.pixel_values] == [1, 2, None, 1, None]
    assert batch._replace(pixel_values=[None] * 5).clips is None
    with pytest.raises(ValueError, match="got none"):
        collate([], 0)


def test_packs_fit_and_hold_everything():
    packs = plan_packs([5, 9, 3, 4, 1, 20], 10)
    assert sorted(index for pack in packs for index in pack) == list(range(6))
    assert packs == [[5], [1, 4], [0, 3], [2]]


@pytest.mark.parametrize("size_bias", list(TextSizeBias))
def test_packed_rows_learn_what_separate_rows_learn(batch, size_bias):
    aurora = model()
    merge = MergeConfig(token_kept_ratio=0.5, text_size_bias=size_bias)

    def spliced():
        visual = aurora.encode(batch.clips, merge=merge)
        return aurora.splice(batch.input_ids, visual, attention_mask=batch.attention_mask, labels=batch.labels)

    def gradients(loss):
        aurora.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in aurora.parameters() if p.grad is not None]

    rows = spliced()
    apart = next_token_loss(aurora.run_language_model(rows), rows.labels)
    apart_gradients = gradients(apart)
    packed = pack_rows(spliced(), 100)
    assert len(packed.labels) < len(batch.input_ids)
    bias = {} if packed.key_bias is None else {"key_bias": packed.key_bias}
    logits = aurora.language_model(
        packed.inputs_embeds, position_ids=packed.position_ids, attention_mask=packed.attention_mask, **bias
    )
    together = next_token_loss(logits, packed.labels)
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(together), apart_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_pack_hides_its_conversations_from_each_other(batch):
    aurora = model()
    rows = aurora.splice(batch.input_ids[[2, 4]], None, attention_mask=batch.attention_mask[[2, 4]])
    packed = pack_rows(rows, 1000)
    first = int(batch.attention_mask[2].sum())
    assert packed.attention_mask.shape[0] == 1
    assert not packed.attention_mask[0, first:, :first].any()
    assert packed.attention_mask[0].diagonal().all()
    assert packed.position_ids[0, first] == 0
