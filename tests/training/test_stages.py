"""Every stage trains what it should, and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aurora.model.merge import MergeConfig, Schedule, SizeBias
from aurora.training.config import Objective, TrainConfig
from aurora.training.distributed import World
from aurora.training.language_tasks import ClipsTask
from aurora.training.loop import Task, WholeBatch, freeze, run_stage, start_learning, train_step
from aurora.training.run import run_part
from aurora.training.tiny import build_task, trained_model

Recipe = Callable[[str], TrainConfig]
CLIP_STAGES = ("pretrain", "vision", "language")


def gradients(task: Task, config: TrainConfig, name: str) -> dict[str, float]:
    """One step without an update: largest gradient entry of each parameter that learns, by name."""
    freeze(task.module, config.stages[name].trainable)
    for loss, _ in task.losses(0, World()):
        loss.backward()
    found = {}
    for parameter_name, parameter in task.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{parameter_name} got no gradient"
            found[parameter_name] = float(parameter.grad.abs().max())
        else:
            assert parameter.grad is None, f"{parameter_name} is frozen"
    return found


@pytest.fixture(scope="module")
def trained(prepared: TrainConfig) -> TrainConfig:
    """The first two stages, run."""
    for name in ("tower", "decoder"):
        run_part(World(), prepared, name)
    return prepared


@pytest.mark.parametrize("name", ["tower", "decoder"])
def test_first_stages_train_every_parameter(prepared: TrainConfig, name: str) -> None:
    found = gradients(build_task(prepared, name), prepared, name)
    assert [key for key, size in found.items() if size == 0.0 and "k_proj.bias" not in key] == []


@pytest.mark.parametrize("size_bias", list(SizeBias))
@pytest.mark.parametrize("name", CLIP_STAGES)
def test_clip_stages_train_every_unfrozen_parameter(trained: TrainConfig, name: str, size_bias: SizeBias) -> None:
    stage = replace(trained.stages[name], init_from=["tower", "decoder"], token_kept_ratios=[0.4])
    config = replace(
        trained,
        stages={**trained.stages, name: stage},
        model=replace(trained.model, merge=MergeConfig(size_bias=size_bias)),
    )
    task = build_task(config, name)
    assert isinstance(task, ClipsTask)
    assert task.merge_at(0).size_bias is size_bias
    found = gradients(task, config, name)
    # The softmax cancels a bias on all keys of a query: its true gradient is zero.
    assert [key for key, size in found.items() if size == 0.0 and "k_proj.bias" not in key] == []
    parts = {key.partition(".")[0] for key in found}
    assert (
        parts
        == {
            "pretrain": {"projector"},
            "vision": {"projector", "vision_tower"},
            "language": {"projector", "vision_tower", "language_model"},
        }[name]
    )
    assert not any("blocks.2." in key or "norm_post" in key for key in found)  # behind layer -2


def test_a_stage_starts_from_the_earlier_ones(trained: TrainConfig) -> None:
    task = build_task(trained, "pretrain")
    weights = dict(task.module.named_parameters())
    for name, prefix, target in (("tower", "vision_tower.", "vision_tower."), ("decoder", "", "language_model.")):
        source = build_task(trained, name)
        run_stage(
            source, trained.stages[name], name=name, folder=_folder(trained, name), num_steps=4, world=World()
        )  # finished: loads
        for key, parameter in source.module.named_parameters():
            if key.startswith(prefix):
                torch.testing.assert_close(weights[target + key.removeprefix(prefix)], parameter, rtol=0, atol=0)


def test_starting_from_a_stage_without_checkpoint_is_refused(recipe: Recipe) -> None:
    config = recipe("bare")
    with pytest.raises(ValueError, match="no checkpoint of stage 'tower'"):
        build_task(config, "pretrain")
    with pytest.raises(ValueError, match="want a trained captioner"):
        trained_model(config)


def test_merging_follows_the_step(prepared: TrainConfig, trained: TrainConfig) -> None:
    task = build_task(trained, "pretrain")
    assert isinstance(task, ClipsTask)
    steps = [task.merge_at(step) for step in range(40)]
    assert [merge.schedule for merge in steps[:3]] == [Schedule.constant, Schedule.exact, Schedule.constant]
    assert {merge.token_kept_ratio for merge in steps} == {1.0, 0.4}
    assert steps == [task.merge_at(step) for step in range(40)]


@pytest.mark.parametrize("objective", [Objective.frames, Objective.storyboard, Objective.clips])
def test_ranks_share_a_step(trained: TrainConfig, objective: Objective) -> None:
    name = {Objective.frames: "tower", Objective.storyboard: "decoder", Objective.clips: "pretrain"}[objective]
    task = build_task(trained, name)
    assert isinstance(task, WholeBatch)
    task.module.eval()
    whole, _ = task.loss(1, World())
    shares = [task.loss(1, World(rank, 2))[0] for rank in range(2)]
    if objective is Objective.frames:  # a patch loss is a mean over the patches that show the object
        assert abs((shares[0] + shares[1]).item() / 2 - whole.item()) < 0.2
    else:
        torch.testing.assert_close(torch.stack(shares).mean(), whole, rtol=1e-5, atol=1e-6)


def test_overfits_eight_clips(prepared: TrainConfig) -> None:
    base = prepared.stages["language"]
    optim = replace(base.optim, lr=5e-3, weight_decay=0.0)
    stage = replace(base, init_from=[], batch_size=8, num_captions=0, token_kept_ratios=[0.3], optim=optim)
    task = build_task(replace(prepared, stages={**prepared.stages, "language": stage}), "language")
    learning = start_learning(task, stage)
    losses: list[float] = []
    while len(losses) < 200 and (not losses or losses[-1] >= 0.05):
        step = len(losses)  # questions are worded anew in each step; the eight clips and their answers stay
        for group in learning.optimizer.param_groups:
            group["lr"] = optim.lr * min(1.0, (step + 1) / 20)
        losses.append(train_step(learning, stage, step=step, world=World())["loss"])
    assert losses[-1] < 0.05, losses[::20]


def _folder(config: TrainConfig, name: str) -> Path:
    return Path(config.run_dir) / name
