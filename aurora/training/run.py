"""The verb `train`: runs the stages of a recipe that are not finished, each where it stood, then exports."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

import hydra
from omegaconf import DictConfig

from aurora.checkpoint.layouts import get_layout
from aurora.checkpoint.pretrained import read_config
from aurora.config import load_config, register_schema
from aurora.data.records import DataConfig, DataError, digest_files
from aurora.runtime import resolve_device
from aurora.training import tiny
from aurora.training.build import BUNDLED_MODEL, build_conversation_task, check_ranks, load_stage
from aurora.training.config import Debug, Objective, TrainConfig
from aurora.training.conversations import ConversationTask
from aurora.training.distributed import Launch, World, launched_by_torchrun, torchrun_world
from aurora.training.export import export_checkpoint, export_model
from aurora.training.logger import CURVE_FILE
from aurora.training.loop import Task, is_finished, plain, run_stage, scaled_steps
from aurora.training.plan import format_plan, memory_plan
from aurora.training.state import (
    LOCK_FILE,
    checkpoint_path,
    checkpoint_steps,
    latest_checkpoint,
    lock_folder,
    read_state,
)

_CONFIG_FILE = "config.json"


def train(config: TrainConfig) -> None:
    """Run the recipe's unfinished stages, then export; a run that was killed continues where it stood.

    Raises:
        ValueError: for a run folder that may not be continued, a stage that starts from one that has not been run, or
            settings that do not go together.
    """
    _check_recipe(config)
    if config.plan or config.debug is Debug.meta:
        print_plans(config)
        return
    if not _learns_conversations(config):
        if launched_by_torchrun():
            raise ValueError("torchrun: rendered worlds start their own processes; want python scripts/train.py")
        if not config.export_only:
            run_rendered(config)
        if config.export_dir is not None:
            export_rendered(config)
        return
    with torchrun_world(resolve_device(config.device)) as world:
        if not config.export_only:
            run_conversations(config, world)
        if config.export_dir is not None and world.is_main:
            export_conversations(config)
        world.barrier()


def run_rendered(config: TrainConfig) -> None:
    """Run the unfinished stages: first those that start from nothing, side by side, then one after the other.

    Raises:
        ValueError: as `train`.
    """
    with _start_run(config):
        tiny.prepare(config)
        _render_pending(config)


def _render_pending(config: TrainConfig) -> None:
    """Run what is not finished of a recipe of rendered worlds."""
    pending = _pending(config)
    first = [name for name in pending if not config.stages[name].init_from]
    if first:
        _run_together(config, first)
    for name in pending:
        if name in first:
            continue
        _run_together(config, [name])
        if config.stages[name].objective is Objective.clips:
            tiny.report_captions(config, name)


def run_conversations(config: TrainConfig, world: World) -> None:
    """Run the unfinished stages one after the other, in this process and those of torchrun, or in `max_ranks` own ones.

    Raises:
        ValueError: as `train`.
    """
    with _start_run(config) if world.is_main else nullcontext():
        world.barrier()
        _train_pending(config, world)


def _train_pending(config: TrainConfig, world: World) -> None:
    """Run what is not finished of a recipe of conversations."""
    pending = _pending(config)
    if world.is_main:
        for name in config.parts or config.stages:
            if name not in pending:
                _say_finished(config, name)
    for name in pending:
        ranks = min(config.stages[name].max_ranks, config.workers)
        if world.size == 1 and ranks > 1 and not launched_by_torchrun():
            if world.device.type != "cpu":
                raise ValueError(f"stages.{name}.max_ranks={ranks}: want torchrun --nproc-per-node {ranks} for GPUs")
            Launch(ranks, run_part, config, name).join()
        else:
            run_part(world, config, name)


def run_part(world: World, config: TrainConfig, name: str) -> None:
    """Train stage `name` in this process; the entry of each worker."""
    stage, task = config.stages[name], build_task(config, name, world)
    num_steps = scaled_steps(stage, config.scale)
    identity: dict[str, str | int] = {"seed": config.seed}
    if isinstance(task, ConversationTask):
        identity["image_aspect_ratio"] = task.processor.image_processor.config.aspect_ratio.value
        identity |= {"data": task.data_digest, "files": digest_files(config.data)}
        if stage.num_epochs is not None:
            num_steps = max(2, round(task.num_steps(stage.num_epochs) * config.scale))
    run_stage(
        task,
        stage,
        name=name,
        folder=Path(config.run_dir) / name,
        num_steps=num_steps,
        world=world,
        keep=config.keep_checkpoints,
        logger=config.logger,
        identity=identity,
    )


def build_task(config: TrainConfig, name: str, world: World) -> Task:
    """Build what stage `name` learns, with the weights it starts from."""
    if config.stages[name].objective is Objective.conversations:
        return build_conversation_task(config, name, world)
    return tiny.build_task(config, name)


def print_plans(config: TrainConfig) -> None:
    """Build each stage's model without memory, and print the plan of its memory.

    Raises:
        ValueError: if a setting does not fit the model.
    """
    start = Path(config.model_path).expanduser() if config.model_path is not None else BUNDLED_MODEL
    if start.is_dir():
        config = replace(config, model=read_config(start)[1])
    else:
        print(f"model_path={config.model_path} is not here: the plan is that of the settings below `model`")
    for name in config.parts or config.stages:
        stage = config.stages[name]
        check_ranks(stage, stage.max_ranks)
        print(f"stage {name}: {stage.objective.value}", flush=True)
        print(format_plan(memory_plan(config, stage)), flush=True)


def export_rendered(config: TrainConfig) -> None:
    """Write the captioner of the last stage that has a checkpoint, with the curves of all."""
    model, tokenizer = tiny.trained_model(config)
    folder = Path(str(config.export_dir))
    export_checkpoint(model, tokenizer, folder, num_frames=config.num_frames, frame_template=config.frame_template)
    _export_curves(config, folder)


def export_conversations(config: TrainConfig) -> None:
    """Write the captioner of the last stage that has a checkpoint: averaged weights if any, adapters folded in.

    Raises:
        ValueError: if no stage has a checkpoint.
    """
    started = [name for name in config.stages if checkpoint_steps(Path(config.run_dir) / name)]
    if not started:
        raise ValueError(f"run_dir={config.run_dir}: no checkpoint of {', '.join(config.stages)}; want a trained stage")
    start, folder = load_stage(config, started[-1]), Path(str(config.export_dir))
    export_model(
        start.model,
        start.processor,
        folder,
        layout=config.export_layout,
        image_aspect_ratio=start.image_aspect_ratio,
    )
    _export_curves(config, folder)


def _export_curves(config: TrainConfig, folder: Path) -> None:
    curves = [Path(config.run_dir) / name / CURVE_FILE for name in config.stages]
    (folder / CURVE_FILE).write_text("".join(curve.read_text() for curve in curves if curve.exists()))
    print(f"exported to {folder}", flush=True)


def _learns_conversations(config: TrainConfig) -> bool:
    return any(stage.objective is Objective.conversations for stage in config.stages.values())


def _check_recipe(config: TrainConfig) -> None:
    if not config.stages:
        raise ValueError("stages: got none; want experiment=..., such as experiment=aurora_tiny")
    objectives = {stage.objective for stage in config.stages.values()}
    if Objective.conversations in objectives and len(objectives) > 1:
        others = ", ".join(sorted(objective.value for objective in objectives - {Objective.conversations}))
        raise ValueError(f"stages: conversations and {others} in one recipe; want one kind, linked by model_path")
    get_layout(config.export_layout)


def _start_run(config: TrainConfig) -> IO[str]:
    """Make the run's folder and note its configuration there; other runs are kept out of it until the file is closed.

    Raises:
        ValueError: if the folder may not be continued, cannot be written, or another run writes there now.
    """
    run_dir = Path(config.run_dir)
    try:
        found = {entry.name for entry in run_dir.iterdir()} if run_dir.exists() else set()
        if not config.resume and found - {_CONFIG_FILE, LOCK_FILE}:  # these are left by a run whose data had mistakes
            raise ValueError(f"run_dir={config.run_dir}: holds a run; want resume=true or an empty folder")
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(run_dir)
        (run_dir / _CONFIG_FILE).write_text(json.dumps(plain(asdict(config)), indent=1) + "\n")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"run_dir={config.run_dir}: cannot write there ({reason}); want a folder with room") from None
    return lock


def _say_finished(config: TrainConfig, name: str) -> None:
    """Say why a stage is not trained.

    Raises:
        ValueError: if it was trained on other files than the ones that are named now.
    """
    path = latest_checkpoint(Path(config.run_dir) / name)
    trained_on = read_state(path).get("files")
    if trained_on is not None and _is_named(config.data) and trained_on != digest_files(config.data):
        raise ValueError(
            f"run_dir={config.run_dir}: stage {name} is finished there, on other data; want another run_dir, or "
            "export_only=true to export it again"
        )
    print(f"{name}: finished before, {path}; another run_dir trains anew", flush=True)


def _is_named(data: DataConfig) -> bool:
    return data.path is not None or bool(data.sources)


def _pending(config: TrainConfig) -> list[str]:
    """Names of the stages that are not finished."""
    return [name for name in config.parts or config.stages if not _finished(config, name)]


def _finished(config: TrainConfig, name: str) -> bool:
    stage, folder = config.stages[name], Path(config.run_dir) / name
    if stage.num_epochs is None:
        return is_finished(folder, scaled_steps(stage, config.scale))
    steps = checkpoint_steps(folder)
    if not steps:
        return False
    # How many steps so many epochs are, the checkpoint knows without the data.
    state = read_state(checkpoint_path(folder, steps[-1]))
    return state["num_steps"] == steps[-1] and state["config"]["num_epochs"] == stage.num_epochs


def _run_together(config: TrainConfig, names: Sequence[str]) -> None:
    """Run the stages side by side, as many at once as there are workers."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for start in range(0, len(names), config.workers):
        group = names[start : start + config.workers]
        ranks = [min(config.stages[name].max_ranks, config.workers) if len(group) == 1 else 1 for name in group]
        launches = [Launch(size, run_part, config, name) for name, size in zip(group, ranks, strict=True)]
        for launch in launches:
            launch.join()


register_schema("train_schema", TrainConfig)


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="train")
def main(raw: DictConfig) -> None:
    """Run the recipe the command line names; called through `aurora.cli.run`."""
    config = load_config(raw, TrainConfig)
    try:
        train(config)
    except DataError as error:  # one line each, not all on one
        print("\n".join(map(str, error.mistakes)), file=sys.stderr)
        raise ValueError(f"{error.summary}; want none") from None
    except FloatingPointError as error:
        raise ValueError(f"{error}, such as a lower optim.lr or precision=fp32 gives") from None
    except KeyboardInterrupt:
        print(_where_it_stands(config), file=sys.stderr)
        raise


def _where_it_stands(config: TrainConfig) -> str:
    """Say after Ctrl-C what is kept."""
    steps = {name: checkpoint_steps(Path(config.run_dir) / name) for name in config.stages}
    kept = ", ".join(f"{name} at step {found[-1]}" for name, found in steps.items() if found)
    return f"stopped; {config.run_dir} keeps {kept or 'no checkpoint yet'}, and the same command goes on from there"
