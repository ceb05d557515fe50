"""Two gloo ranks do what one process does, replicated or sharded, and continue each other's checkpoints."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aurora.data.records import DataConfig
from aurora.training.build import check_ranks
from aurora.training.config import StageConfig, TrainConfig, ValidationConfig
from aurora.training.distributed import Launch, World
from aurora.training.lora import LoraConfig
from aurora.training.run import run_part
from aurora.training.state import checkpoint_path, checkpoint_steps, latest_checkpoint, load_weights
from tests.data.datasets import write_dataset
from tests.training.captioners import Parallel, Precision, recipe_of, run_alone, save_start, small_model

STEPS = 10
HALF = 5


def config_of(folder: Path, run: str, parallel: Parallel, **changes: object) -> TrainConfig:
    settings = {"num_steps": STEPS, "checkpoint_every": HALF, "batch_size": 6, "parallel": parallel, **changes}
    return recipe_of(folder, "language", run, **settings)


def run_jobs(world: World, jobs: list[TrainConfig]) -> None:
    for config in jobs:
        run_part(world, config, "language")


def stage_folder(config: TrainConfig) -> Path:
    return Path(config.run_dir) / "language"


def copy_half(source: TrainConfig, target: TrainConfig) -> TrainConfig:
    """Let `target` go on from the checkpoint that `source` had half-way."""
    name = checkpoint_path(Path(), HALF).name
    shutil.copytree(stage_folder(source) / name, stage_folder(target) / name)
    return target


def curve(config: TrainConfig, key: str) -> list[float]:
    lines = (stage_folder(config) / "curve.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    folder = tmp_path_factory.mktemp("parallel")
    save_start(folder / "start", small_model().half())  # as released: weights are widened behind the sharding
    write_dataset(folder)
    single = config_of(folder, "single", Parallel.none)
    run_alone(single, "language")
    found = {
        "single": single,
        "ddp": config_of(folder, "ddp", Parallel.ddp),
        "fsdp": config_of(folder, "fsdp", Parallel.fsdp),
        "from_one": copy_half(single, config_of(folder, "from_one", Parallel.fsdp)),
        "ddp_from_one": copy_half(single, config_of(folder, "ddp_from_one", Parallel.ddp)),
        "fp16": config_of(folder, "fp16", Parallel.fsdp, num_steps=2, precision=Precision.fp16),
        "everything": replace(
            config_of(
                folder,
                "everything",
                Parallel.fsdp,
                num_steps=2,
                precision=Precision.bf16,
                activation_checkpointing=True,
                ema_decay=0.5,
                lora=LoraConfig(rank=2, dropout=0.1),
            ),
            validation=ValidationConfig(path=single.data.path, num_samples=3, num_captions=1, max_new_tokens=4),
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])  # the processes import this file
        Launch(2, run_jobs, [found[name] for name in found if name != "single"]).join()
    for name, parallel in (("fsdp", Parallel.fsdp), ("ddp", Parallel.none)):
        found[f"{name}_to_one"] = copy_half(found[name], config_of(folder, f"{name}_to_one", parallel))
        run_alone(found[f"{name}_to_one"], "language")
    return found


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_ranks_equal_one(runs: dict[str, TrainConfig], name: str) -> None:
    assert len(curve(runs["single"], "loss")) == STEPS
    np.testing.assert_allclose(curve(runs[name], "loss"), curve(runs["single"], "loss"), rtol=0, atol=1e-5)
    np.testing.assert_allclose(curve(runs[name], "grad_norm"), curve(runs["single"], "grad_norm"), rtol=1e-4)
    np.testing.assert_allclose(curve(runs[name], "lr"), curve(runs["single"], "lr"), rtol=0)


@pytest.mark.parametrize("name", ["fsdp_to_one", "ddp_to_one", "from_one", "ddp_from_one"])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(runs: dict[str, TrainConfig], name: str) -> None:
    assert curve(runs[name], "loss") == pytest.approx(curve(runs["single"], "loss")[HALF:], abs=1e-5)
    assert curve(runs[name], "grad_norm") == pytest.approx(curve(runs["single"], "grad_norm")[HALF:], rel=1e-4)
    assert checkpoint_steps(stage_folder(runs[name]))[-1] == STEPS


def test_shards_hold_the_weights_of_one_process(runs: dict[str, TrainConfig]) -> None:
    path = checkpoint_path(stage_folder(runs["fsdp"]), STEPS)
    assert (path / "shards").is_dir()
    assert not list(path.glob("*.safetensors"))
    sharded, single = load_weights(path), load_weights(latest_checkpoint(stage_folder(runs["single"])))
    assert sharded.keys() == single.keys()
    for name, tensor in sharded.items():
        if "k_proj.bias" not in name:  # its true gradient is zero, and AdamW makes steps of the rounding
            torch.testing.assert_close(tensor, single[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_sharded_run_with_everything_on(runs: dict[str, TrainConfig]) -> None:
    config = runs["everything"]
    assert np.isfinite(curve(config, "loss")).all()
    assert len(curve(config, "val/loss")) == 1
    assert len(curve(config, "captions")) == 1
    path = latest_checkpoint(stage_folder(config))
    weights, averaged = load_weights(path), load_weights(path, averaged=True)
    learned = [name for name in weights if not torch.equal(weights[name], averaged[name])]
    assert any("lora_B" in name for name in learned)
    assert not any("q_proj.weight" in name for name in learned if name.startswith("language_model"))


def test_a_sharded_run_scales_its_loss(runs: dict[str, TrainConfig]) -> None:
    assert curve(runs["fp16"], "grad_norm")[0] == pytest.approx(curve(runs["single"], "grad_norm")[0], rel=5e-3)
    assert curve(runs["fp16"], "loss_scale") == [65536.0] * 2


def test_ranks_that_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="parallel=none: got 2 ranks"):
        check_ranks(StageConfig(parallel=Parallel.none), 2)
    with pytest.raises(ValueError, match="batch_size=4: want a multiple of the 3 ranks"):
        check_ranks(StageConfig(), 3)


def test_other_data_is_not_continued(runs: dict[str, TrainConfig], tmp_path: Path) -> None:
    config = replace(runs["single"], run_dir=str(tmp_path))
    copy_half(runs["single"], config)
    lines = Path(str(config.data.path)).read_text().splitlines()
    other = Path(str(config.data.path)).with_name("other.jsonl")
    other.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="trained on other data"):
        run_alone(replace(config, data=DataConfig(path=str(other), max_length=256)), "language")
