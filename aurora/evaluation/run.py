"""The verb `evaluate`: caption clips read from files at several kept ratios, and score the captions.

The captioner sees nothing but the files and the prompts; a clip's facts meet its captions in `tinyvdc.score` only, and
its questions in the judge. Captions are kept as JSON lines, so a stopped run continues, and a new run adds operating
points or clips to what is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from aurora.config import load_config
from aurora.data.tinyworld.dataset import write_dataset
from aurora.data.tinyworld.language import Category, caption_prompts
from aurora.evaluation import tinyvdc
from aurora.evaluation.clip_captions import Clip, noise_like
from aurora.evaluation.config import Benchmark, EvaluateConfig
from aurora.evaluation.report import Measured, Point, markdown, to_record
from aurora.evaluation.session import checkpoint_digest, open_session
from aurora.evaluation.vdc_run import evaluate_vdc

__all__ = ["EvaluateConfig", "checkpoint_digest", "evaluate", "noise_like"]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Caption what is missing, score everything, print the tables and write the report.

    Args:
        config: What to measure.

    Returns:
        The content of report.json.

    Raises:
        ValueError: if the checkpoint, the clips, the questions or an earlier run's captions cannot be read, or the
            judge cannot be asked.
    """
    return evaluate_vdc(config) if config.benchmark is Benchmark.vdc else evaluate_tinyvdc(config)


def evaluate_tinyvdc(config: EvaluateConfig) -> dict[str, Any]:
    """Caption TinyWorld clips and count the facts that the captions state rightly; see `evaluate`."""
    prompts = {category.value: caption_prompts(category)[0] for category in Category}
    measured = []
    with open_session(config, clip_frames=config.clip_frames, clip_px=config.clip_px) as session:
        scenes = _scenes(config)
        clips = [
            Clip(video=scene["video"], path=f"{config.data_dir}/{scene['video']}", prompts=prompts, seed=scene["seed"])
            for scene in scenes
        ]
        for point in config.points:
            rows = session.caption(clips, point)
            if broken := next((row for row in rows if "error" in row), None):
                raise ValueError(broken["error"])
            measured.append(_measure(point, rows, scenes))
            print(measured[-1].summary(), file=sys.stderr, flush=True)
        record = to_record(
            measured,
            model=session.model_name,
            clips=f"{len(clips)} clips of the {config.split} split, seeds {config.seed} to "
            f"{config.seed + len(clips) - 1}, {config.clip_px} px H.264",
            settings=session.settings,
            environment=session.environment,
        )
        session.write_report(record, markdown(record))
    return record


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="evaluate")
def main(raw: DictConfig) -> None:
    """Evaluate what the command line names; called through `aurora.cli.run`."""
    evaluate(load_config(raw, EvaluateConfig))


def _scenes(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Write the clips that are missing; return the facts of all, with `video`, the file's name."""
    write_dataset(config.dataset, progress=sys.stderr.isatty())
    lines = (Path(config.data_dir) / "scenes.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _measure(point: Point, rows: Sequence[dict[str, Any]], scenes: Sequence[dict[str, Any]]) -> Measured:
    captions = [row["captions"] for row in rows]
    return Measured(
        point=point,
        scores=tinyvdc.score(captions, scenes),
        other_clip=tinyvdc.score([*captions[1:], captions[0]], scenes).mean if len(scenes) > 1 else None,
        visual_tokens=[sum(row["visual_tokens_per_frame"]) for row in rows],
        num_frames=len(rows[0]["visual_tokens_per_frame"]),
        seconds=[row["seconds"] for row in rows],
    )
