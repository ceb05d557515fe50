"""What the benchmarks share: a checkpoint, processes to caption with, the log of captions, and the report's files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora.captioning import BUNDLED_MODEL
from aurora.checkpoint.pretrained import resolve_checkpoint
from aurora.evaluation.clip_captions import Captioning, Clip, caption_clips
from aurora.evaluation.config import EvaluateConfig
from aurora.evaluation.report import Point
from aurora.evaluation.workers import worker_pool
from aurora.records import JsonLines
from aurora.runtime import environment_report, resolve_device, resolve_dtype, set_threads

_IDENTITY_SUFFIXES = (".safetensors", ".json", ".model", ".jinja")


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One evaluation under way."""

    captioning: Captioning
    settings: Mapping[str, Any]
    """What a caption depends on apart from its clip, prompts and operating point."""
    log: JsonLines
    pool: ProcessPoolExecutor | None
    output: Path
    environment: Mapping[str, str]

    @property
    def model_name(self) -> str:
        """Name of the checkpoint's folder."""
        return Path(self.captioning.model_path).name

    def caption(self, clips: Sequence[Clip], point: Point) -> list[dict[str, Any]]:
        """A row for each clip, from the log where it is there; see `caption_clips`."""
        return caption_clips(clips, point, self.captioning, self.log, settings=self.settings, pool=self.pool)

    def write(self, name: str, text: str) -> None:
        """Put a file into the output folder, whole or not at all."""
        path = self.output / name
        beside = path.with_name(f".{name}.{os.getpid()}.part")
        beside.write_text(text, encoding="utf-8", errors="replace")
        beside.replace(path)

    def write_report(self, record: Mapping[str, Any], text: str) -> None:
        """Write report.json and report.md, and print the latter."""
        self.write("report.json", json.dumps(record, indent=1) + "\n")
        self.write("report.md", text)
        print(text, end="")


@contextmanager
def open_session(config: EvaluateConfig, **settings: Any) -> Iterator[Session]:
    """Find the checkpoint, open the log and start the processes.

    Args:
        config: What to measure.
        **settings: Further settings that captions depend on.

    Yields:
        The session.

    Raises:
        ValueError: if the checkpoint or an earlier run's captions cannot be read.
    """
    model_path = resolve_checkpoint(config.model_path if config.model_path is not None else BUNDLED_MODEL)
    device = resolve_device(config.device)
    threads = set_threads(config.threads)
    workers = threads if device.type == "cpu" else 1
    output = Path(config.output).expanduser()
    captioning = Captioning(
        model_path=str(model_path),
        device=str(device),
        dtype=config.dtype,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        num_frames=config.num_frm,
    )
    shared = {
        "model_sha256": checkpoint_digest(model_path),
        **settings,
        "dtype": str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        "max_new_tokens": config.max_new_tokens,
        "num_frm": config.num_frm,
    }
    environment = environment_report() | {"device": str(device), "processes": str(workers)}
    with JsonLines(output / "captions.jsonl", overwrite=config.overwrite) as log, worker_pool(workers) as pool:
        yield Session(
            captioning=captioning, settings=shared, log=log, pool=pool, output=output, environment=environment
        )


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over a checkpoint's weights, configuration and tokenizer: a caption is reused for these files only."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in _IDENTITY_SUFFIXES and file.is_file():
            with file.open("rb") as stream:
                digest.update(file.relative_to(folder).as_posix().encode())
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
