"""The verb `corpus`: caption a large collection with several workers, on this machine or on a Ray cluster.

Files are dealt out to shards by a checksum of their names; a shard is a JSON-lines file that one worker at a time
writes, row by row. So whatever dies, a worker, a node or the command, rows stay, the same command does the rest, and
files that are added later fall into their shards. In the end the shards are put together as `captions.jsonl`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import hydra
from omegaconf import DictConfig

from aurora.captioning import CaptionConfig, Captioner, not_done, shared_columns
from aurora.config import load_config, register_schema
from aurora.evaluation.workers import worker_pool
from aurora.processing.files import read_json
from aurora.processing.inputs import find_inputs
from aurora.records import JsonLines, lock_file, read_rows
from aurora.runtime import num_cores, resolve_device

if TYPE_CHECKING:
    from rich.progress import Progress

PLAN_FILE = "corpus.json"
CAPTIONS_FILE = "captions.jsonl"
_RAY_RETRIES = 3
"""How often Ray starts a worker that died anew, and gives its shard to it."""


class Engine(Enum):
    """Who runs the workers."""

    local = "local"
    ray = "ray"


@dataclass(kw_only=True, slots=True)
class CorpusConfig(CaptionConfig):
    """Caption a large collection of images and videos with several workers."""

    output: str | None = "outputs/corpus"
    """Folder for shards and captions.jsonl; on a cluster one that all nodes see."""
    engine: Engine = Engine.local
    """local: processes of this machine; ray: actors of a Ray cluster, one on each GPU."""
    workers: int = 0
    """Workers; 0 is one for each CPU core (local), or one for each GPU or else core of the cluster (ray)."""
    ray_address: str | None = None
    """A running cluster, such as auto or ray://head:10001; null starts one of this machine."""
    shard_size: int = 64
    """Files of a shard, about; decided by the first run."""
    part: int = 0
    """Which part of the shards this command does, from 0; see num_parts."""
    num_parts: int = 1
    """Into how many commands the shards are shared out, such as the tasks of a Slurm array."""

    def __post_init__(self) -> None:
        """Check ranges."""
        CaptionConfig.__post_init__(self)
        for key, least in (("workers", 0), ("shard_size", 1), ("num_parts", 1)):
            if (value := getattr(self, key)) < least:
                raise ValueError(f"{key}={value}: want at least {least}")
        if not 0 <= self.part < self.num_parts:
            raise ValueError(f"part={self.part}: want 0 to {self.num_parts - 1}, as num_parts={self.num_parts}")
        if not self.output:
            raise ValueError("output=null: want a folder")


register_schema("corpus_schema", CorpusConfig)


class Shard(NamedTuple):
    """Some of the files, and where their rows go."""

    path: Path
    files: list[Path]
    """Those without a caption."""


class Counts(NamedTuple):
    """What became of the files of a shard."""

    captioned: int
    failed: int


def caption_corpus(config: CorpusConfig) -> Counts:
    """Caption what has no caption yet, and put the captions together once all have one.

    Args:
        config: What to caption, and with how many workers.

    Returns:
        How many files this run captioned, and how many it could not.

    Raises:
        ValueError: if no file could be captioned, another run writes to the folder, Ray is missing, or a worker died.
        FileNotFoundError: if there is no input.
    """
    if config.engine is Engine.ray and importlib.util.find_spec("ray") is None:
        raise ValueError("engine=ray: needs Ray; pip install ray, or engine=local")
    files = _find_files(config.visual_input)
    folder = Path(str(config.output)).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    num_shards = _num_shards(folder, len(files), config)
    shards = deal_out(files, folder, num_shards)
    own = shards[config.part :: config.num_parts]
    with _only_writer(folder, config):
        todo = [left for shard in own if (left := _left(shard, config)).files]
        total = sum(len(shard.files) for shard in todo)
        there = sum(len(shard.files) for shard in own) - total
        if there:
            print(f"{there} of {there + total} files are captioned already", file=sys.stderr)
        counts = _caption(config, todo, total) if todo else Counts(0, 0)
    if counts.failed and not counts.captioned and not there:
        raise ValueError(f"all {counts.failed} files failed; {_first_error(todo)}")
    _put_together(config, folder, shards)
    return counts


def deal_out(files: Sequence[Path], folder: Path, num_shards: int) -> list[Shard]:
    """Assign each file to a shard by a checksum of its name, whatever other files there are.

    Args:
        files: All of them.
        folder: Of the shards.
        num_shards: How many there are.

    Returns:
        Every shard, with its files in their order.
    """
    shards = [Shard(folder / "shards" / f"{number:05d}-of-{num_shards:05d}.jsonl", []) for number in range(num_shards)]
    for file in files:
        shards[zlib.crc32(os.fsencode(file)) % num_shards].files.append(file)
    return shards


class Worker:
    """One loaded model, which does one shard after another; also what a Ray actor is."""

    def __init__(self, config: CorpusConfig, folder: Path | None = None) -> None:
        """Load the model on `config.device`.

        Args:
            config: What to caption and how.
            folder: Where relative paths begin, if that is not where this process is.
        """
        if folder is not None:
            os.chdir(folder)
        self.captioner = Captioner.load(config)
        self.shared = shared_columns(config)

    def run(self, shard: Shard) -> Counts:
        """Caption the files of a shard that have no caption, each row on the disk as soon as it is there."""
        captioned = failed = 0
        with (
            JsonLines(shard.path) as log,
            closing(self.captioner.caption_all(not_done(shard.files, log.rows, self.shared))) as rows,
        ):
            for row in rows:
                log.append(row | self.shared)
                failed += "error" in row
                captioned += "error" not in row
        return Counts(captioned, failed)


_worker: Worker | None = None


def _run(config: CorpusConfig, shard: Shard) -> Counts:
    """In a process of the pool: load the model with the first shard."""
    global _worker
    if _worker is None:
        _worker = Worker(config)
    return _worker.run(shard)


def _caption(config: CorpusConfig, shards: Sequence[Shard], total: int) -> Counts:
    """Run all shards behind a bar."""
    started = time.monotonic()
    captioned = failed = 0
    run = _run_on_ray if config.engine is Engine.ray else _run_here
    with _bar() as progress:
        task = progress.add_task("captioning", total=total)
        for counts in run(config, shards):
            captioned, failed = captioned + counts.captioned, failed + counts.failed
            progress.update(task, completed=captioned + failed)
            if not progress.console.is_terminal:
                took = time.monotonic() - started
                print(f"{captioned + failed} of {total} files, {(captioned + failed) / took:.2f} a second",
                      file=sys.stderr)  # fmt: skip
    took = time.monotonic() - started
    print(f"{captioned} captioned, {failed} failed, {took:.0f} s, {total / took:.2f} files a second", file=sys.stderr)
    return Counts(captioned, failed)


def _run_here(config: CorpusConfig, shards: Sequence[Shard]) -> Iterator[Counts]:
    """Processes of this machine; on a GPU there is one, which is this process."""
    on_cpu = resolve_device(config.device).type == "cpu"
    if config.workers > 1 and not on_cpu:
        raise ValueError(f"workers={config.workers}: want engine=ray to use several GPUs, or a part of its own on each")
    workers = min(config.workers or (num_cores() if on_cpu else 1), len(shards))
    if workers == 1:
        worker = Worker(config)
        yield from map(worker.run, shards)
        return
    alone = dataclasses.replace(config, threads=1)
    with worker_pool(workers) as pool:
        assert pool is not None
        for done in as_completed([pool.submit(_run, alone, shard) for shard in shards]):
            yield done.result()


def _run_on_ray(config: CorpusConfig, shards: Sequence[Shard]) -> Iterator[Counts]:
    """Actors of a cluster; one that dies is started anew, and its shard goes on where it was."""
    ray: Any = importlib.import_module("ray")  # an extra, which need not be there where types are checked
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(config.ray_address, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0)) if config.device in ("auto", "cuda") else 0
        workers = min(config.workers or gpus or int(there["CPU"]), len(shards))
        settings = dataclasses.replace(config, threads=0 if gpus else config.threads or 1)
        retries = {"max_restarts": _RAY_RETRIES, "max_task_retries": _RAY_RETRIES}
        actor = ray.remote(num_gpus=1 if gpus else 0, num_cpus=1, **retries)(Worker)
        actors = [actor.remote(settings, Path.cwd()) for _ in range(workers)]
        pool = importlib.import_module("ray.util").ActorPool(actors)
        yield from pool.map_unordered(lambda worker, shard: worker.run.remote(shard), list(shards))
    except ray.exceptions.RayTaskError as error:
        raise ValueError(f"a worker failed: {error.cause}; the same command goes on") from error
    except ray.exceptions.RayActorError as error:
        raise ValueError(f"a worker died {_RAY_RETRIES + 1} times ({error}); the same command goes on") from error
    finally:
        ray.shutdown()


def _find_files(visual_input: str) -> list[Path]:
    """A folder, a glob, or a .txt with a path on each line, relative to the file."""
    path = Path(visual_input).expanduser()
    if path.suffix.lower() != ".txt" or not path.is_file():
        return find_inputs(visual_input)
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    files = list(dict.fromkeys(path.parent / line.strip() for line in lines if line.strip()))
    if not files:
        raise ValueError(f"visual_input={visual_input}: no path in this list, want one on each line")
    return files


def _num_shards(folder: Path, num_files: int, config: CorpusConfig) -> int:
    """As many as the first run decided."""
    plan = folder / PLAN_FILE
    if plan.exists():
        number = read_json(plan).get("num_shards")
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{plan}: num_shards={number!r}, want at least 1; this is no folder of `aurora corpus`")
        return number
    number = math.ceil(num_files / config.shard_size)
    # Of several parts that begin at once, one decides.
    beside = plan.with_name(f".{PLAN_FILE}.{os.getpid()}.part")
    beside.write_text(json.dumps({"num_shards": number}) + "\n", encoding="utf-8")
    try:
        os.link(beside, plan)
    except FileExistsError:
        return _num_shards(folder, num_files, config)
    finally:
        beside.unlink()
    return number


def _left(shard: Shard, config: CorpusConfig) -> Shard:
    """The shard with those of its files that have no caption of these settings."""
    if config.overwrite:
        shard.path.unlink(missing_ok=True)
        return shard
    return shard._replace(files=not_done(shard.files, read_rows(shard.path), shared_columns(config)))


def _put_together(config: CorpusConfig, folder: Path, shards: Sequence[Shard]) -> None:
    """Write captions.jsonl: of each file the last row, in the order of the shards; not while some have none."""
    shared = shared_columns(config)
    target = folder / CAPTIONS_FILE
    beside = target.with_name(f".{CAPTIONS_FILE}.{os.getpid()}.part")
    missing = 0
    try:
        with beside.open("wb") as file:
            for shard in shards:
                rows = _rows_by_file(shard, shared)
                names = [str(name) for name in shard.files]
                missing += any(name not in rows for name in names)
                for name in names if not missing else ():
                    file.write(json.dumps(rows[name], ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if not missing:
            beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    if missing:
        of_all = f"{missing} of {len(shards)} shards"
        print(f"{of_all} are other parts'; the last part writes {CAPTIONS_FILE}", file=sys.stderr)
    else:
        print(target)


def _rows_by_file(shard: Shard, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The last row of each file with these settings."""
    rows = (row for row in read_rows(shard.path) if all(row.get(key) == shared[key] for key in shared))
    return {str(row.get("file")): row for row in rows}


def _first_error(shards: Sequence[Shard]) -> str:
    errors = (row["error"] for shard in shards for row in read_rows(shard.path) if "error" in row)
    return f"the first: {next(errors, 'unknown')}"


def _only_writer(folder: Path, config: CorpusConfig) -> IO[str]:
    """Keep other runs of this part out."""
    return lock_file(folder / f".lock-{config.part}-of-{config.num_parts}", f"output={folder}")


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="corpus")
def main(raw: DictConfig) -> None:
    """Caption what the command line names; called through `aurora.cli.run`."""
    caption_corpus(load_config(raw, CorpusConfig))
