"""A run that is killed goes on to the same next step, bit for bit, from its last complete checkpoint."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aurora.training import state
from aurora.training.config import StageConfig, TrainConfig
from aurora.training.distributed import World
from aurora.training.loop import WholeBatch, is_finished, run_stage, start_learning, train_step
from aurora.training.optim import OptimConfig, build_optimizer, lr_factor, set_learning_rate
from aurora.training.state import checkpoint_path, checkpoint_steps, load_checkpoint, save_checkpoint
from aurora.training.tiny import build_task

Recipe = Callable[[str], TrainConfig]


class Regression(WholeBatch):
    """A stage of two linear layers; batch and noise are functions of the step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def loss(self, step: int, world: World) -> tuple[Tensor, dict[str, float]]:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        dropped = x * (torch.rand(8, 3) > 0.1)  # the global generator, as dropout uses it
        return (self.module(dropped) - x.sum(dim=1, keepdim=True)).square().mean(), {}

    def validate(self) -> dict[str, float]:
        return {}


STAGE = StageConfig(num_steps=4, checkpoint_every=2, log_every=1, optim=OptimConfig(lr=0.1, warmup_steps=1))


def finish(folder: Path, stop_after: int | None = None, stage: StageConfig = STAGE) -> dict[str, Tensor]:
    task = Regression()
    run_stage(task, stage, name="r", folder=folder, num_steps=4, world=World(), stop_after=stop_after)
    return dict(task.module.state_dict())


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resume_equals_uninterrupted(tmp_path: Path, stop_after: int) -> None:
    whole = finish(tmp_path / "whole")
    finish(tmp_path / "parts", stop_after)
    torch.rand(5)  # whatever happened to the generator in between
    assert_same(finish(tmp_path / "parts"), whole)
    curves = [(tmp_path / name / "curve.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    values = [[(row["step"], row["loss"]) for row in map(json.loads, curve) if "loss" in row] for curve in curves]
    assert values[0] == values[1]
    assert [step for step, _ in values[0]] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["tower", "decoder", "language"])
def test_stages_resume_bit_for_bit(recipe: Recipe, name: str) -> None:
    weights = []
    for label, stops in (("whole", [None]), ("parts", [2, None])):
        config = recipe(label)
        stage = replace(config.stages[name], init_from=[])
        config.stages[name] = stage
        folder = Path(config.run_dir) / name
        for stop_after in stops:
            task = build_task(config, name)
            run_stage(task, stage, name=name, folder=folder, num_steps=4, world=World(), stop_after=stop_after)
        assert is_finished(folder, 4)
        weights.append(task.module.state_dict())
    assert_same(weights[0], weights[1])


@pytest.mark.parametrize("broken", ["save_file", "sync", "rename"])
def test_a_failed_save_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    whole = finish(tmp_path / "whole")
    finish(tmp_path / "run", 2)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "replace") if broken == "rename" else (state, broken)), fail)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint_of_step_4(tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [2]
    assert_same(finish(tmp_path / "run"), whole)


def save_checkpoint_of_step_4(folder: Path) -> None:
    module = Regression().module
    save_checkpoint(folder, 4, module, build_optimizer(module, STAGE.optim), info={"stage": "r"})


def test_kill_in_mid_save(tmp_path: Path) -> None:
    whole = finish(tmp_path / "whole")
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_resume as t\n"
        "real, count = t.state.save_file, 0\n"
        "def save(*args):\n"
        "    global count\n    count += 1\n    real(*args)\n"
        "    if count == 3: os.kill(os.getpid(), signal.SIGKILL)\n"  # the second checkpoint: model written, no more
        "t.state.save_file = save\n"
        f"t.finish(Path({str(tmp_path / 'run')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(entry.name.startswith(".writing-") for entry in (tmp_path / "run").iterdir())
    assert checkpoint_steps(tmp_path / "run") == [2]
    assert_same(finish(tmp_path / "run"), whole)


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    stage = replace(STAGE, checkpoint_every=1)
    task = Regression()
    run_stage(task, stage, name="r", folder=tmp_path, num_steps=4, world=World(), keep=2)
    assert checkpoint_steps(tmp_path) == [3, 4]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    finish(tmp_path, 2)
    with pytest.raises(ValueError, match="cannot resume with batch_size=16, the checkpoint has 4"):
        finish(tmp_path, stage=replace(STAGE, batch_size=16))
    with pytest.raises(ValueError, match="holds stage 'r', want 'other'"):
        run_stage(Regression(), STAGE, name="other", folder=tmp_path, num_steps=4, world=World())


def test_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    finish(tmp_path, 2)
    module = Regression().module
    module[0].requires_grad_(False)  # type: ignore[index]
    with pytest.raises(ValueError, match="optimizer state and trainable parameters differ"):
        load_checkpoint(checkpoint_path(tmp_path, 2), module, build_optimizer(module, STAGE.optim))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Broken(Regression):
        def loss(self, step: int, world: World) -> tuple[Tensor, dict[str, float]]:
            loss, numbers = super().loss(step, world)
            return loss * float("nan"), numbers

    with pytest.raises(FloatingPointError, match="step 0: loss nan"):
        run_stage(Broken(), STAGE, name="r", folder=tmp_path, num_steps=4, world=World())
    assert checkpoint_steps(tmp_path) == []


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
def test_the_gradient_is_clipped_as_a_whole(clip_norm: float) -> None:
    stage = replace(STAGE, optim=OptimConfig(clip_norm=clip_norm))
    learning = start_learning(Regression(), stage)
    norm = train_step(learning, stage, step=0, world=World())["grad_norm"]
    left = torch.cat([p.grad.flatten() for p in learning.parameters if p.grad is not None]).norm().item()
    assert norm > 0.1, "the norm is reported as it was"
    assert left == pytest.approx(min(norm, clip_norm), rel=1e-3)


def test_the_learning_rate_warms_up_holds_and_decays() -> None:
    config = OptimConfig(warmup_steps=10, decay_share=0.25, final_lr_share=0.1)
    factors = [lr_factor(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:75] == [1.0] * 65
    assert factors[-1] == pytest.approx(0.1 + 0.9 / 25)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("clip_norm", float("nan")),
        ("weight_decay", -1.0),
        ("betas", [0.9, 1.0]),
        ("warmup_steps", -1),
    ],
)
def test_numbers_that_cannot_train_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"optim\.{name}="):
        OptimConfig(**{name: value})  # type: ignore[arg-type]


def test_optimizer_options_are_checked() -> None:
    module = Regression().module
    with pytest.raises(ValueError, match="want prefixes of trainable parameters"):
        build_optimizer(module, OptimConfig(lr_scales={"tower.": 0.5}))
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build_optimizer(module.requires_grad_(False), OptimConfig())
    scaled = build_optimizer(Regression().module, OptimConfig(lr_scales={"2.": 0.5}))
    assert {(group["lr_scale"], group["weight_decay"] > 0) for group in scaled.param_groups} == {
        (1.0, True),
        (1.0, False),
        (0.5, True),
        (0.5, False),
    }


def test_each_group_gets_its_share_of_the_rate() -> None:
    config = OptimConfig(lr=0.5, lr_scales={"2.": 0.5, "2.bias": 0.25}, warmup_steps=10)
    module = Regression().module
    optimizer = build_optimizer(module, config)
    assert set_learning_rate(optimizer, 4, 100, config) == pytest.approx(0.25)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in module.named_parameters()}
    wanted = {"0.weight": 0.25, "0.bias": 0.25, "2.weight": 0.125, "2.bias": 0.0625}  # the longest prefix counts
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    finish(tmp_path, 2)
    file = checkpoint_path(tmp_path, 2) / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"step_0000002: damaged \(.*\); want its files as they were, or remove it"):
        finish(tmp_path)


def test_a_folder_that_was_copied_resumes(tmp_path: Path) -> None:
    whole = finish(tmp_path / "whole")
    finish(tmp_path / "run", 2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert_same(finish(tmp_path / "copy"), whole)
