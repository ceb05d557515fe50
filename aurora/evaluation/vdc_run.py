"""VDC from a folder to a report: captions with one encoding for all prompts of a clip, judged questions, averages.

Every caption is on disk as soon as it exists, and so is every reply of the judge; the same command continues with what
is missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from aurora.evaluation.caption_metrics import caption_metrics
from aurora.evaluation.chat_client import ChatClient
from aurora.evaluation.clip_captions import Clip, with_progress
from aurora.evaluation.config import EvaluateConfig
from aurora.evaluation.judge import Judge, JudgeConfig, JudgeKind, Wording
from aurora.evaluation.judge_stub import serve
from aurora.evaluation.judging import Item, Judged, judge_questions
from aurora.evaluation.published_texts import choose_prompts, read_prompts, read_wording
from aurora.evaluation.reply_cache import ReplyCache
from aurora.evaluation.rule_judge import RuleJudge
from aurora.evaluation.session import Session, open_session
from aurora.evaluation.vdc import Vdc, VdcClip, read_vdc
from aurora.evaluation.vdc_report import markdown
from aurora.evaluation.vdcscore import score_categories


def evaluate_vdc(config: EvaluateConfig) -> dict[str, Any]:
    """Run VDC on a folder in the published format; see `aurora.evaluation.run.evaluate`."""
    vdc = read_vdc(config.data, config.num_clips)
    prompts = read_prompts(config.data.prompts_file, config.data.categories)
    wording = read_wording(config.judge.wording_file)
    chosen = {clip.video_id: choose_prompts(prompts, clip.video_id, config.seed) for clip in vdc.clips}
    clips = [
        Clip(video=clip.video_id, path=clip.path, prompts=chosen[clip.video_id], seed=index)
        for index, clip in enumerate(vdc.clips)
        if clip.path is not None
    ]
    with open_session(config, benchmark="vdc") as session, open_judge(config.judge, session.output) as judge:
        points = []
        verdicts: list[dict[str, Any]] = []
        for point in config.points:
            rows, unreadable = _readable(session.caption(clips, point), allowed=config.data.allow_missing)
            judged = _judge(judge, vdc.clips, rows, wording, config.judge.concurrency, point.name)
            verdicts += [{"point": point.name, **entry.to_dict()} for entry in judged]
            points.append({"name": point.name, **point.columns, **_measure(vdc.clips, rows, judged)})
            print(_summary(points[-1], config.averaging.value), file=sys.stderr, flush=True)
            if unreadable:
                vdc.notes["videos that cannot be read"] = unreadable
        session.write("verdicts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in verdicts))
        record = _record(config, session, vdc, judge, wording, points)
        session.write_report(record, markdown(record))
    return record


@contextmanager
def open_judge(config: JudgeConfig, output: Path) -> Iterator[Judge]:
    """Whom the settings name, with what it needs for as long as the block runs.

    Args:
        config: The judge.
        output: Folder for replies.sqlite, where the settings name no other file.

    Yields:
        The judge.

    Raises:
        ValueError: if a server cannot be asked for its model, or the file of replies is something else.
    """
    if config.kind is JudgeKind.rules:
        yield RuleJudge()
        return
    with ExitStack() as stack:
        if config.kind is JudgeKind.stub:
            config.url, config.model = stack.enter_context(serve()), None
        cache = stack.enter_context(ReplyCache(config.cache or output / "replies.sqlite"))
        client = ChatClient(config, cache)
        stack.callback(client.stop)
        yield client


def _readable(rows: Sequence[dict[str, Any]], *, allowed: bool) -> tuple[dict[str, dict[str, Any]], int]:
    """Rows with captions by video, and how many have none."""
    broken = [row for row in rows if "error" in row]
    if broken and (not allowed or len(broken) == len(rows)):
        raise ValueError(f"{broken[0]['error']} ({len(broken)} of {len(rows)} videos; data.allow_missing=true goes on)")
    return {row["video"]: row for row in rows if "error" not in row}, len(broken)


def _judge(
    judge: Judge,
    clips: Sequence[VdcClip],
    rows: Mapping[str, Mapping[str, Any]],
    wording: Wording,
    concurrency: int,
    title: str,
) -> list[Judged]:
    """Every question of every captioned clip, in the order of the clips."""
    items = [
        Item(
            video=clip.video_id,
            category=category,
            question=entry.question,
            answer=entry.answer,
            caption=rows[clip.video_id]["captions"][category],
        )
        for clip in clips
        if clip.video_id in rows
        for category, questions in clip.questions.items()
        for entry in questions
    ]
    if not items:
        raise ValueError("data.root: no question belongs to a captioned video; want questions with the same video ids")
    judged: dict[Item, Judged] = {}
    results = judge_questions(judge, items, wording, concurrency=concurrency)
    for entry in with_progress(results, len(items), f"judging, {title}"):
        judged[entry.item] = entry
    return [judged[item] for item in items]


def _measure(
    clips: Sequence[VdcClip], rows: Mapping[str, Mapping[str, Any]], judged: Sequence[Judged]
) -> dict[str, Any]:
    """Everything about one operating point, as plain values."""
    tokens = [row["visual_tokens_per_frame"] for row in rows.values()]
    metrics = {}
    for category in dict.fromkeys(name for clip in clips for name in clip.captions):
        pairs = [
            (rows[clip.video_id]["captions"][category], [clip.captions[category]])
            for clip in clips
            if clip.video_id in rows and category in clip.captions
        ]
        if pairs:
            metrics[category] = caption_metrics([pair[0] for pair in pairs], [pair[1] for pair in pairs]).to_dict()
    return {
        "visual_tokens_per_frame": sum(map(sum, tokens)) / sum(map(len, tokens)),
        "num_frames": {"fewest": min(map(len, tokens)), "most": max(map(len, tokens))},
        "seconds_per_clip": fmean(row["seconds"] for row in rows.values()),
        "scores": score_categories(judged),
        "caption_metrics": metrics,
    }


def _summary(point: Mapping[str, Any], averaging: str) -> str:
    """One line about an operating point."""
    mean = point["scores"]["mean"]
    average = mean[averaging]
    found = (
        "no average" if average is None else f"{100 * average['accuracy']:.2f} % right, score {average['score']:.2f}"
    )
    counts = f"{mean['judged']} of {mean['questions']} questions judged"
    return f"{point['name']}: {found}; {counts}, {mean['unparsed']} unparsed, {mean['failed']} failed"


def _record(
    config: EvaluateConfig, session: Session, vdc: Vdc, judge: Judge, wording: Wording, points: list[dict[str, Any]]
) -> dict[str, Any]:
    source = config.data.prompts_file
    counts = dict(sorted(judge.counts.items())) if isinstance(judge, ChatClient) else {}
    return {
        "benchmark": "VDC",
        "model": session.model_name,
        "clips": f"{len(vdc.clips)} clips, {', '.join(config.data.categories)}",
        "averaging": config.averaging.value,
        "settings": dict(session.settings),
        "prompts": {
            "source": "ours" if source is None else Path(source).name,
            "seed": config.seed,
            "lists": read_prompts(source, config.data.categories),
        },
        "judge": {
            "name": judge.name,
            "kind": config.judge.kind.value,
            "wording": "ours" if config.judge.wording_file is None else Path(config.judge.wording_file).name,
            "wording_sha256": wording.digest(),
            "requests": counts,
        },
        "notes": vdc.notes,
        "environment": dict(session.environment),
        "points": points,
    }
