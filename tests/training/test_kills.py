"""A training killed with SIGKILL, anywhere, goes on to the same weights, bit for bit, in each published stage."""

import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aurora.training import loop, state
from aurora.training.config import TrainConfig
from aurora.training.lora import LoraConfig
from aurora.training.state import checkpoint_steps, latest_checkpoint, load_weights, read_state
from tests.training.captioners import STAGES, Precision, recipe_of, run_alone

STEPS, EVERY = 6, 2
CHANGES: dict[str, dict[str, object]] = {
    # What each stage also keeps across the kill: a loss scale, averaged weights, the generator behind dropout.
    "pretrain": {"precision": Precision.fp16, "batch_size": 8},
    "vision": {"ema_decay": 0.8},
    "language": {"lora": LoraConfig(rank=2, dropout=0.3)},
}
Kill = tuple[str, int]
"""A function of a run and a number: the kill before its n-th call cuts a run between steps, or in the middle of a save.
"""


def die_before(point: str, count: int) -> None:
    """Let this process be killed when `point` is called for the `count`-th time (from 1)."""
    owner = {"train_step": loop, "replace": Path}.get(point, state)
    real = getattr(owner, point)
    calls = 0

    def counted(*args: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)

    setattr(owner, point, counted)


def run_and_die(config: TrainConfig, point: str, count: int) -> None:
    torch.set_num_threads(1)
    die_before(point, count)
    run_alone(config, next(iter(config.stages)))


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Processes that have imported everything: a kill costs a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_kills"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """The undisturbed run of each stage: its folder and everything its last checkpoint holds."""
    folder = tmp_path_factory.mktemp("kills")
    found: dict[str, dict[str, Tensor]] = {}

    def run(name: str) -> tuple[Path, dict[str, Tensor]]:
        if name not in found:
            config = config_of(folder, name, f"whole_{name}")
            run_alone(config, name)
            found[name] = everything(config, name)
        return folder, found[name]

    return run


def config_of(folder: Path, name: str, run: str) -> TrainConfig:
    return recipe_of(folder, name, run, num_steps=STEPS, checkpoint_every=EVERY, **CHANGES[name])


def everything(config: TrainConfig, name: str) -> dict[str, Tensor]:
    path = latest_checkpoint(Path(config.run_dir) / name)
    assert read_state(path)["step"] == STEPS
    files = [file for file in path.iterdir() if file.suffix == ".safetensors"]
    assert len(files) == files_of(name)
    tensors = {f"{file.stem}/{key}": value for file in files for key, value in state.load_file(file).items()}
    scaler = read_state(path)["scaler"]
    return {**tensors, "scaler": torch.tensor([scaler["scale"], scaler["good_steps"], scaler["skipped_steps"]])}


def files_of(name: str) -> int:
    """Files of tensors in a checkpoint: weights, moments and, where they are kept, averaged weights."""
    return 2 + ("ema_decay" in CHANGES[name])


def random_kill(draw: random.Random, name: str, steps_done: int) -> Kill:
    """Draw a kill that a run which goes on from `steps_done` reaches, each kind as likely as any other."""
    saves, files = (STEPS - steps_done) // EVERY, files_of(name)
    # A save syncs its files, state.json, its folder and, after the rename, the folder of the stage.
    most = {
        "train_step": STEPS - steps_done,
        "save_file": files * saves,
        "sync": (files + 3) * saves,
        "replace": saves,
    }
    point = draw.choice(list(most))
    return point, draw.randint(1, most[point])


def killed_and_resumed(
    server: ForkServerContext, folder: Path, name: str, kills: Iterable[Callable[[int], Kill]], run: str
) -> dict[str, Tensor]:
    """Kill a run, each time where a function of its finished steps says, and let it finish; return what it holds."""
    config = config_of(folder, name, run)
    for choose in kills:
        steps = checkpoint_steps(Path(config.run_dir) / name)
        if steps[-1:] == [STEPS]:
            break  # the kill before came behind the last rename
        point, count = choose(steps[-1] if steps else 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(Path(__file__).parents[2])
            process = server.Process(target=run_and_die, args=(config, point, count))
            process.start()
        process.join(240)  # it takes seconds on an idle machine
        assert process.exitcode == -signal.SIGKILL, f"{point} was called less than {count} times"
        for step in checkpoint_steps(Path(config.run_dir) / name):
            load_weights(state.checkpoint_path(Path(config.run_dir) / name, step))  # a whole one
        assert checkpoint_steps(Path(config.run_dir) / name)[-1:] >= steps[-1:]
    run_alone(config, name)
    return everything(config, name)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


# One checkpoint each second step: model, optimizer (and average), then state.json are written and synced, then renamed.
@pytest.mark.parametrize("kills", [[("train_step", 4)], [("save_file", 4), ("sync", 3), ("replace", 1)]], ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_killed_stages_end_in_the_same_bits(
    server: ForkServerContext,
    whole: Callable[[str], tuple[Path, dict[str, Tensor]]],
    name: str,
    kills: list[Kill],
) -> None:
    folder, wanted = whole(name)
    found = killed_and_resumed(server, folder, name, [lambda _, k=k: k for k in kills], f"{name}_{len(kills)}")  # type: ignore[misc]
    assert_same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", STAGES)
def test_random_kills(
    server: ForkServerContext, whole: Callable[[str], tuple[Path, dict[str, Tensor]]], name: str, seed: int
) -> None:
    folder, wanted = whole(name)
    draw = random.Random(f"{name} {seed}")
    kills = [lambda steps_done: random_kill(draw, name, steps_done)] * 2
    assert_same(killed_and_resumed(server, folder, name, kills, f"{name}_random{seed}"), wanted)


def test_dropout_and_order_depend_on_the_seed(whole: Callable[[str], tuple[Path, dict[str, Tensor]]]) -> None:
    folder, wanted = whole("language")
    other = replace(config_of(folder, "language", "other_seed"), seed=1)
    run_alone(other, "language")
    assert any(not torch.equal(value, wanted[key]) for key, value in everything(other, "language").items())
