"""The verb on a user's own data: it trains, stops, goes on, and names what is wrong."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from safetensors import SafetensorError

from aurora import cli
from aurora.config import load_config
from aurora.model.merge import MergeConfig
from aurora.processing.image import AspectRatio
from aurora.training import state
from aurora.training.config import Debug, Objective, Parallel, Precision, StageConfig, TrainConfig
from aurora.training.distributed import Launch, World, launched_by_torchrun
from aurora.training.optim import LRSchedule, OptimConfig, lr_factor
from aurora.training.run import train
from aurora.training.state import checkpoint_steps
from tests.data.datasets import turns, write_jsonl
from tests.training.captioners import STAGES, recipe_of, run_alone

ROOT = Path(__file__).parents[2]
# lr, batch of a device and pass, passes, epochs, kept ratio: the released configurations.
PUBLISHED = {"pretrain": (2e-4, 16, 1, 1, 1.0), "vision": (1e-4, 1, 24, 2, 1.0), "language": (2e-5, 1, 24, 2, 0.1)}


def composed(*overrides: str) -> TrainConfig:
    with initialize_config_module("aurora.configs", version_base="1.3"):
        return load_config(compose("train", overrides=list(overrides)), TrainConfig)


@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_published_settings(name: str) -> None:
    config = composed(f"experiment=auroracap_7b_{name}")
    [(found, stage)] = config.stages.items()
    lr, batch, passes, epochs, ratio = PUBLISHED[name]
    assert (found, stage.objective, stage.optim.lr) == (name, Objective.conversations, lr)
    assert stage.batch_size == batch * passes * stage.max_ranks
    assert (stage.accumulation_steps, stage.num_epochs) == (passes, epochs)
    assert stage.merge.token_kept_ratio == ratio
    assert stage.optim.schedule is LRSchedule.cosine
    assert (stage.optim.warmup_share, stage.optim.final_lr_share, stage.optim.clip_norm) == (0.03, 0.0, 1.0)
    assert (stage.optim.betas, stage.optim.weight_decay) == ([0.9, 0.999], 0.0)
    assert config.data.max_length == 4096
    assert config.model.text.hidden_size == 4096


def test_each_stage_starts_from_the_export_of_the_one_before() -> None:
    configs = [composed(f"experiment=auroracap_7b_{name}") for name in STAGES]
    assert [c.model_path for c in configs[1:]] == [c.export_dir for c in configs[:-1]]
    assert len({c.run_dir for c in configs}) == 3


def test_debug_meta_plans_the_real_model_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    train(composed("experiment=auroracap_7b_language", "debug=meta"))
    out = capsys.readouterr().out
    assert "6,738" in out  # million parameters of the language model
    assert "peak" in out
    with pytest.raises(ValueError, match="matches no parameter"):
        train(composed("experiment=auroracap_7b_language", "debug=meta", "stages.language.trainable=[nothing.]"))
    with pytest.raises(ValueError, match="want a multiple of the 8 ranks"):
        train(composed("experiment=auroracap_7b_language", "plan=true", "stages.language.batch_size=12"))


def test_options_compose_from_the_command_line() -> None:
    config = composed(
        "experiment=finetune",
        "stages.finetune={lora: {rank: 4}}",
        "stages.finetune.precision=fp16",
        "stages.finetune.merge.slowfast=true",
        "logger.tensorboard=true",
    )
    stage = config.stages["finetune"]
    assert stage.lora is not None
    assert (stage.lora.rank, stage.precision, stage.merge.slowfast) == (4, Precision.fp16, True)
    adapted = composed("experiment=finetune_lora", "stages.finetune.lora.rank=3").stages["finetune"]
    assert adapted.lora is not None
    assert (adapted.lora.rank, adapted.num_steps) == (3, stage.num_steps)


def test_the_cosine_warms_up_and_ends_at_nothing() -> None:
    config = OptimConfig(schedule=LRSchedule.cosine, warmup_share=0.1, final_lr_share=0.0)
    factors = [lr_factor(step, 100, config) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_epochs": 0.0}, "num_epochs=0"),
        ({"ema_decay": 1.0}, "ema_decay=1"),
        ({"accumulation_steps": 0}, "accumulation_steps=0"),
        ({"parallel": Parallel.none, "max_ranks": 2}, "max_ranks=2"),
        (
            {"objective": Objective.clips, "parallel": Parallel.fsdp},
            "parallel=fsdp: works with objective=conversations",
        ),
        ({"objective": Objective.clips, "compile": True}, "compile=True"),
    ],
)
def test_bad_stage_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageConfig(**settings)  # type: ignore[arg-type]


def test_recipes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="want experiment="):
        train(TrainConfig())
    mixed = {"a": StageConfig(), "b": StageConfig(objective=Objective.conversations)}
    with pytest.raises(ValueError, match="conversations and clips in one recipe"):
        train(TrainConfig(stages=mixed))
    with pytest.raises(ValueError, match="want conversations"):
        train(TrainConfig(stages={"a": StageConfig()}, debug=Debug.meta))


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe_of(tmp_path, "pretrain")
    folder = Path(config.run_dir) / "pretrain"
    real, calls = state.save_file, []

    def full(tensors: dict[str, object], path: Path) -> None:
        calls.append(path)
        if len(calls) == 4:  # the optimizer of the second checkpoint
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path)  # type: ignore[arg-type]

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError, match=r"step_0000004: cannot save .*No space left.*earlier checkpoints stay"):
        run_alone(config, "pretrain")
    assert checkpoint_steps(folder) == [2]
    assert sorted(path.name for path in folder.iterdir()) == ["curve.jsonl", "step_0000002"]


def test_a_finished_run_says_so_and_is_not_taken_for_one_on_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe_of(tmp_path, "pretrain", num_steps=2)
    train(config)
    path = Path(config.run_dir) / "pretrain" / "step_0000002"
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("pretrain: 2 steps of 4, 0.00 of 0.0")
    assert first.endswith(" M parameters learn, fp32 on cpu")
    assert last.startswith("pretrain: 2 steps in 0:00:")
    assert last.endswith(f", {path}")
    train(config)
    assert capsys.readouterr().out == f"pretrain: finished before, {path}; another run_dir trains anew\n"
    other = tmp_path / "other.jsonl"
    other.write_text(Path(str(config.data.path)).read_text() + "\n")
    with pytest.raises(ValueError, match=r"stage pretrain is finished there, on other data; want another run_dir"):
        train(replace(config, data=replace(config.data, path=str(other))))
    other.write_bytes(Path(str(config.data.path)).read_bytes())  # the same under another name
    train(replace(config, data=replace(config.data, path=str(other))))


def test_a_run_is_continued_as_itself_alone(tmp_path: Path) -> None:
    config = recipe_of(tmp_path, "pretrain", num_steps=2)
    train(config)
    longer = recipe_of(tmp_path, "pretrain", num_steps=3)
    with pytest.raises(ValueError, match=r"cannot resume with seed=1, the checkpoint has 0"):
        train(replace(longer, seed=1))
    with pytest.raises(ValueError, match=r"image_aspect_ratio='crop', the checkpoint has 'pad'"):
        train(replace(longer, image_aspect_ratio=AspectRatio.crop))
    merged = recipe_of(tmp_path, "pretrain", num_steps=3, merge=MergeConfig(token_kept_ratio=0.4))
    with pytest.raises(ValueError, match=r"cannot resume with merge="):
        train(merged)
    train(longer)
    assert checkpoint_steps(Path(config.run_dir) / "pretrain") == [2, 3]


def test_a_run_that_never_began_does_not_count_as_one(tmp_path: Path) -> None:
    config = replace(recipe_of(tmp_path, "pretrain", num_steps=2), resume=False)
    with pytest.raises(ValueError, match="no such file"):
        train(replace(config, data=replace(config.data, path=str(tmp_path / "nowhere.jsonl"))))
    train(config)
    with pytest.raises(ValueError, match=r"holds a run; want resume=true or an empty folder"):
        train(config)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    config = recipe_of(tmp_path, "pretrain", num_steps=2)
    Path(config.run_dir).mkdir()
    with (
        state.lock_folder(Path(config.run_dir)),
        pytest.raises(ValueError, match=r"run_dir=.*: another run writes there now; want its end, or another run_dir"),
    ):
        train(config)
    train(config)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    config = recipe_of(tmp_path, "pretrain", num_steps=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir=.*file: cannot write there \(Not a directory\); want a folder"):
        train(replace(config, run_dir=str(tmp_path / "file")))


def settings_of(config: TrainConfig) -> list[str]:
    paths = [f"run_dir={config.run_dir}", f"model_path={config.model_path}", f"export_dir={config.run_dir}/model"]
    return ["experiment=finetune", "device=cpu", "data.max_length=256", *paths]


def run_verb(config: TrainConfig, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "scripts/train.py", *settings_of(config), f"data.path={config.data.path}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_mistakes_in_the_data_are_named_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe_of(tmp_path, "language")
    answered = turns("<image>\nWhat?", "This.")
    bad = write_jsonl(
        tmp_path / "bad.jsonl",
        [
            {"image": "im/0.png", "conversations": answered},
            {"image": "im/none.png", "conversations": answered},
            {"image": "im/0.png"},
            {"image": ["im/0.png", "im/1.png", "im/2.png"], "conversations": turns("<image><image>\nWhat?", "This.")},
            {"image": "im/0.png", "conversations": turns("<image>\nWhat?", " ")},
        ],
    )
    with pytest.raises(SystemExit) as left:
        cli.main(["train", *settings_of(config), f"data.path={bad}"])
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines[:4]] == [f"{bad}:{number}" for number in (2, 3, 4, 5)]
    assert lines[4:] == ["error: data: 4 mistakes; want none"]
    for wanted, line in zip(("no such file", "no key", "too few placeholders", "empty answer"), lines, strict=False):
        assert wanted in line


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="hydra-submitit-launcher is not installed")
def test_slurm_composes_and_gives_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_module("aurora.configs", version_base="1.3"):
        overrides = ["experiment=auroracap_7b_language", "+cluster=slurm", "hydra.launcher.nodes=4"]
        launcher = compose("train", overrides=overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node) == (4, 8)
    slurm = {"JOB_ID": "7", "NTASKS": "32", "PROCID": "9", "LOCALID": "1", "NNODES": "4", "NODEID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-4]")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # so that what is set below goes again
    assert not launched_by_torchrun()
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr("subprocess.check_output", lambda *_, **__: b"node1\nnode2\nnode3\nnode4")
    assert launched_by_torchrun()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["9", "32", "1"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_and_the_same_command_again(tmp_path: Path) -> None:
    config = recipe_of(tmp_path, "language")
    settings = ("stages.finetune.checkpoint_every=5", "stages.finetune.log_every=1", "stages.finetune.num_steps=400")
    process = run_verb(config, *settings)
    folder = Path(config.run_dir) / "finetune"
    deadline = time.monotonic() + 240
    while not checkpoint_steps(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    kept = checkpoint_steps(folder)[-1]
    assert err.splitlines() == [
        f"stopped; {config.run_dir} keeps finetune at step {kept}, and the same command goes on from there",
        "interrupted",
    ]
    process = run_verb(config, *settings)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    said, first = out.splitlines()[:2]
    assert said.startswith("finetune: 400 steps of 4, ")
    assert said.endswith(f", from step {kept} on")
    assert first.startswith(f"finetune {kept + 1}/400")
    assert (Path(config.run_dir) / "model" / "config.json").is_file()


@pytest.mark.slow
def test_torchrun_with_two_processes(tmp_path: Path) -> None:
    config = recipe_of(tmp_path, "language")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "scripts/train.py",
    ]
    command += ["experiment=finetune", f"run_dir={config.run_dir}", f"model_path={config.model_path}", "device=cpu"]
    command += [f"data.path={config.data.path}", "stages.finetune.num_steps=6", "stages.finetune.parallel=fsdp"]
    command += [f"export_dir={tmp_path}/model", "stages.finetune.log_every=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("finetune ")]) == 6
    assert (Path(config.run_dir) / "finetune" / "step_0000006" / "shards").is_dir()
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # compiling takes minutes on a machine with other work
def test_compiled_layers_learn_the_same(tmp_path: Path) -> None:
    curves = []
    for compiled in (False, True):
        config = recipe_of(tmp_path, "language", f"compiled_{compiled}", compile=compiled)
        run_alone(config, "language")
        lines = (Path(config.run_dir) / "language" / "curve.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_processes_started_here_report_a_users_mistake(tmp_path: Path) -> None:
    config = recipe_of(tmp_path, "language", max_ranks=2, trainable=["nothing."])
    with pytest.raises(ValueError, match=r"stage\.trainable: 'nothing\.' matches no parameter"):
        train(replace(config, workers=2))


def die(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


@pytest.mark.slow
def test_a_killed_process_takes_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(OSError, match="training: process 1 terminated with signal SIGKILL; the same command goes on"):
        Launch(2, die).join()


def test_numbers_that_explode_stop_the_run(tmp_path: Path) -> None:
    config = recipe_of(tmp_path, "language", optim=OptimConfig(lr=1e30))
    with pytest.raises(FloatingPointError, match=r"step [1-3]: loss nan, gradient norm nan: want finite numbers"):
        train(config)
