"""Training on conversations: what learns, what the loss is, and that micro-batches and packing change nothing."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aurora.checkpoint.pretrained import load_model
from aurora.data.collate import Batch
from aurora.kernels.cross_entropy import linear_cross_entropy
from aurora.model.captioner import next_token_loss
from aurora.model.merge import MergeConfig, Schedule, SizeBias, TextPositions, TextSizeBias
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.processor import AuroraProcessor
from aurora.training.build import build_conversation_task
from aurora.training.config import Precision, TrainConfig, ValidationConfig
from aurora.training.conversations import AnswerLoss, ConversationTask
from aurora.training.distributed import World
from aurora.training.loop import start_learning, train_step
from aurora.training.lora import LoraConfig
from aurora.training.run import train
from aurora.training.state import latest_checkpoint, load_weights, read_state
from tests.golden import assert_close_to_golden, full_case, load_tensors
from tests.golden_models import captioner
from tests.training.captioners import STAGES, recipe_of, run_alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conversations")


def task_of(config: TrainConfig) -> ConversationTask:
    return build_conversation_task(config, next(iter(config.stages)), World())


def one_step(config: TrainConfig, step: int = 0) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step and the gradient of every parameter that learns."""
    task = task_of(config)
    total = 0.0
    for loss, _ in task.losses(step, World()):
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in task.module.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size_bias", list(SizeBias))
@pytest.mark.parametrize("name", STAGES)
def test_every_unfrozen_parameter_learns(folder: Path, name: str, size_bias: SizeBias, checkpointing: bool) -> None:
    merge = MergeConfig(token_kept_ratio=0.4, size_bias=size_bias)
    config = recipe_of(folder, name, batch_size=12, merge=merge, activation_checkpointing=checkpointing)
    task = task_of(config)
    _, gradients = one_step(config)
    learning = {key for key, parameter in task.module.named_parameters() if parameter.requires_grad}
    assert set(gradients) == learning
    # The softmax cancels a bias on all keys of a query: its true gradient is zero.
    silent = [key for key, grad in gradients.items() if not grad.any() and "k_proj.bias" not in key]
    assert silent == []
    everything = {"projector", "vision_tower", "language_model"}
    parts = {"pretrain": {"projector"}, "vision": {"projector", "vision_tower"}}
    assert {key.partition(".")[0] for key in learning} == parts.get(name, everything)
    assert not any("blocks.2." in key or "norm_post" in key for key in learning)  # behind layer -2


@pytest.mark.parametrize("name", STAGES)
def test_checkpointing_changes_no_bit(folder: Path, name: str) -> None:
    kept, again = (one_step(recipe_of(folder, name, activation_checkpointing=on)) for on in (False, True))
    assert kept[0] == again[0]
    assert all(torch.equal(grad, again[1][key]) for key, grad in kept[1].items())


@pytest.mark.parametrize("changes", [{"accumulation_steps": 1}, {"accumulation_steps": 5}, {"packing": False}])
def test_micro_batches_and_packing_change_nothing(folder: Path, changes: dict[str, object]) -> None:
    loss, gradients = one_step(recipe_of(folder, "language", batch_size=8))
    other_loss, others = one_step(recipe_of(folder, "language", batch_size=8, **changes))
    assert other_loss == pytest.approx(loss, abs=2e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=2e-4, atol=2e-6, msg=name)


def test_ranks_share_the_tokens_of_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe_of(folder, "language", batch_size=8)
    whole, _ = one_step(config, step=1)
    targets: list[float] = []

    def counted(self: World, values: list[float]) -> list[float]:
        targets.extend(values)
        return [all_targets] if self.size > 1 else list(values)

    monkeypatch.setattr(World, "sum", counted)
    all_targets = 1.0
    shares = [sum(loss.item() for loss, _ in task_of(config).losses(1, World(rank, 2))) for rank in range(2)]
    assert sum(shares) / 2 / sum(targets) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("case", ["img_r0.4", "vid4_r0.4", "batch2_vid2_r0.4", "edge_batch2_one_textonly"])
@pytest.mark.parametrize("name", ["kv4", "kv2"])
@pytest.mark.parametrize("row_length", [None, 200])
def test_the_loss_is_the_golden_loss(name: str, case: str, row_length: int | None) -> None:
    inputs = full_case(case)
    clips: list[Tensor | None] = list(inputs["pixel_values"])
    ratio = 1.0 if "r1.0" in case else 0.4
    learner = AnswerLoss(captioner(name), merge=MergeConfig(token_kept_ratio=ratio), row_length=row_length)
    batch = Batch(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], clips)
    found = learner(batch)
    golden = load_tensors(f"full_{name}_cases")
    count = int((golden[f"{case}.expanded_labels"][:, 1:] != -100).sum())
    assert_close_to_golden(found.loss[None] / count, golden[f"{case}.loss"].reshape(1), rtol=2e-5)


def test_the_loss_without_all_logits_is_the_loss(folder: Path) -> None:
    model = captioner("kv2")
    inputs = full_case("batch2_img_r0.4")
    visual = model.encode(inputs["pixel_values"])
    spliced = model.splice(
        inputs["input_ids"], visual, attention_mask=inputs["attention_mask"], labels=inputs["labels"]
    )
    assert spliced.labels is not None
    want = next_token_loss(model.run_language_model(spliced), spliced.labels)
    llama = model.language_model
    hidden = llama.hidden(
        spliced.inputs_embeds, position_ids=spliced.position_ids, attention_mask=spliced.attention_mask
    )
    found = linear_cross_entropy(
        hidden[:, :-1].flatten(0, 1), llama.head_weight, spliced.labels[:, 1:].flatten(), chunk=7
    )
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def test_conversations_are_cut_to_the_context(folder: Path) -> None:
    config = recipe_of(folder, "language")
    task = task_of(replace(config, data=replace(config.data, max_length=100_000)))
    assert task._data.config.max_length == task._learner.row_length == 512


def test_merging_settings_reach_the_step(folder: Path) -> None:
    losses = {
        one_step(recipe_of(folder, "language", batch_size=12, merge=merge))[0]
        for merge in (
            MergeConfig(token_kept_ratio=0.4),
            MergeConfig(token_kept_ratio=0.4, slowfast=True),
            MergeConfig(token_kept_ratio=0.4, text_size_bias=TextSizeBias.visual),
            MergeConfig(token_kept_ratio=0.4, text_positions=TextPositions.original),
        )
    }
    assert len(losses) == 4


def test_fp16_skips_an_overflow_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe_of(folder, "language", run="fp16", precision=Precision.fp16)
    task, stage = task_of(config), config.stages["language"]
    learning = start_learning(task, stage)
    learning.scaler.scale = 2.0**14
    real = task.losses

    def overflowing(step: int, world: World) -> Iterator[tuple[Tensor, dict[str, float]]]:
        for loss, numbers in real(step, world):
            yield (loss * 1e38 if step == 1 else loss), numbers

    monkeypatch.setattr(task, "losses", overflowing)
    numbers = [train_step(learning, stage, step=0, world=World())]
    before = {name: tensor.clone() for name, tensor in task.module.state_dict().items()}
    numbers += [train_step(learning, stage, step=1, world=World())]
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.module.state_dict().items())
    assert numbers[1] == {"loss_scale": 2.0**13, "skipped_steps": 1.0}
    numbers += [train_step(learning, stage, step=2, world=World())]
    assert numbers[2]["loss"] < numbers[0]["loss"] + 1
    assert learning.scaler.state_dict() == {"scale": 2.0**13, "good_steps": 1, "skipped_steps": 1}


def test_the_scale_of_fp16_changes_no_gradient(folder: Path) -> None:
    config = recipe_of(folder, "language", precision=Precision.fp16)
    stage, norms = config.stages["language"], []
    for scale in (2.0**10, 2.0**12):
        learning = start_learning(task_of(config), stage)
        learning.scaler.scale = scale
        norms.append(train_step(learning, stage, step=0, world=World())["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    plain = recipe_of(folder, "language").stages["language"]
    exact = train_step(start_learning(task_of(recipe_of(folder, "language")), plain), plain, step=0, world=World())
    assert norms[0] == pytest.approx(exact["grad_norm"], rel=2e-2)


@pytest.fixture(scope="module")
def trained(folder: Path) -> TrainConfig:
    """A short run with adapters, averaged weights and validation, exported."""
    config = recipe_of(
        folder,
        "language",
        run="trained",
        num_epochs=2.0,
        batch_size=6,
        validate_every=2,
        ema_decay=0.5,
        lora=LoraConfig(rank=2),
        precision=Precision.bf16,
    )
    held_out = ValidationConfig(path=config.data.path, num_samples=5, num_captions=2, max_new_tokens=6)
    config = replace(config, validation=held_out, export_dir=str(folder / "export"))
    train(config)
    return config


def test_epochs_become_steps(trained: TrainConfig) -> None:
    path = latest_checkpoint(Path(trained.run_dir) / "language")
    assert read_state(path)["step"] == 4  # two epochs of 12 samples, 6 a step
    before = path.stat().st_mtime_ns
    train(trained)  # finished: nothing is done again
    assert path.stat().st_mtime_ns == before


def test_validation_writes_losses_and_answers(trained: TrainConfig) -> None:
    lines = [json.loads(line) for line in (Path(trained.run_dir) / "language" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if "val/loss" in row] == [2, 4]
    answers = [row["captions"] for row in lines if "captions" in row]
    places = [f"{trained.data.path}:{line}: " for line in (1, 2)]
    assert all(text.startswith(place) for texts in answers for text, place in zip(texts, places, strict=True))
    assert len(answers) == 2
    for row in (row for row in lines if "loss" in row):
        assert row["tokens_per_s"] > row["visual_tokens_per_s"] >= 0
        assert row["tflops_per_s"] > 0
        assert row["memory_gib"] > 0


def test_the_export_captions_with_averaged_weights_and_folded_adapters(trained: TrainConfig) -> None:
    folder = Path(str(trained.export_dir))
    model = AuroraForConditionalGeneration.from_pretrained(folder)
    processor = AuroraProcessor.from_pretrained(folder)
    inputs = processor(images=torch.zeros(28, 28, 3).numpy(), text="USER: <image>\nWhat? ASSISTANT:")
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1
    averaged = load_weights(latest_checkpoint(Path(trained.run_dir) / "language"), averaged=True)
    key = "projector.linear_1.weight"
    torch.testing.assert_close(model.model.state_dict()[key], averaged[key].half().float(), rtol=0, atol=0)
    name = "language_model.layers.0.self_attn.q_proj"
    a, b = averaged[f"{name}.lora_A.weight"], averaged[f"{name}.lora_B.weight"]
    merged = averaged[f"{name}.weight"] + 32.0 / 2 * b @ a
    torch.testing.assert_close(model.model.state_dict()[f"{name}.weight"], merged, rtol=2e-3, atol=1e-4)
    assert b.any()


def test_a_stage_starts_from_an_earlier_one(folder: Path) -> None:
    config = recipe_of(folder, "pretrain", run="chain")
    run_alone(config, "pretrain")
    later = recipe_of(folder, "vision", run="chain", init_from=["pretrain"])
    both = replace(config, stages={**config.stages, **later.stages})
    task = build_conversation_task(both, "vision", World())
    learned = load_weights(latest_checkpoint(Path(config.run_dir) / "pretrain"))
    found = task.module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in learned.items())
    start = load_model(str(config.model_path)).state_dict()
    changed = {name for name in start if not torch.equal(start[name], found[name])}
    assert changed == {name for name in start if name.startswith("projector.")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_path": "nowhere/at/all"}, "no such folder"),
        ({"export_layout": "nope"}, "nope"),
    ],
)
def test_bad_recipes_are_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    config = replace(recipe_of(folder, "language", run="refused"), **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        train(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ["projektor."]}, "matches no parameter"),
        ({"lora": LoraConfig(targets=["z_proj"])}, "names no linear"),
        ({"merge": MergeConfig(token_kept_ratio=0.001, schedule=Schedule.exact)}, "token_kept_ratio"),
    ],
)
def test_bad_stages_are_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(recipe_of(folder, "language", **changes))
