"""What VDC found, as tables in markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aurora.evaluation.tables import table

_METRICS = {"cider_d": 100, "bleu_1": 100, "bleu_4": 100, "rouge_l": 100}


def markdown(record: Mapping[str, Any]) -> str:
    """The tables of a record: VDCscore by category for each operating point, and caption metrics.

    Args:
        record: What report.json holds.

    Returns:
        Markdown that is also readable in a terminal.
    """
    first, second = ("all", "reference") if record["averaging"] == "all" else ("reference", "all")
    parts = [
        f"## {record['model']} on VDC: {record['clips']}",
        f"Judge: {record['judge']['name']}. Accuracy in per cent, score from 0 to 5. {_MEANING[first]}; "
        f"{_MEANING[second]}.",
    ]
    for point in record["points"]:
        rows = [_row(name, entry, first, second) for name, entry in point["scores"]["categories"].items()]
        if len(rows) > 1:
            rows.append(_row("mean", point["scores"]["mean"], first, second))
        header = ["category", f"accuracy ({first})", "score", f"accuracy ({second})", "score", "videos", "questions"]
        parts += [
            f"{point['name']}: {point['visual_tokens_per_frame']:g} tokens a frame, {_frames(point['num_frames'])}, "
            f"{point['seconds_per_clip']:.2f} s a clip",
            table([*header, "unparsed", "failed"], rows),
        ]
    parts += ["Against the reference captions (times 100):", _metrics(record)]
    parts += [f"Note: {count} {what}." for what, count in record["notes"].items()]
    if sum(point["scores"]["mean"]["failed"] for point in record["points"]):
        parts.append("Failed questions were not answered; the same command asks them again, and only them.")
    parts.append(_footer(record))
    return "\n\n".join(parts) + "\n"


_MEANING = {
    "all": "`all` keeps zeros and leaves out videos with a failed or unparsed question (95 % interval over videos)",
    "reference": "`reference` is the published script's average, without the videos that score zero",
}


def _row(name: str, entry: Mapping[str, Any], first: str, second: str) -> list[str]:
    counted = entry["all"].get("num_videos") if entry["all"] else 0
    return [
        name,
        *_average(entry, first),
        *_average(entry, second),
        "" if "videos" not in entry else f"{counted} of {entry['videos']}",
        *(str(entry[key]) for key in ("questions", "unparsed", "failed")),
    ]


def _average(entry: Mapping[str, Any], averaging: str) -> list[str]:
    """Accuracy and score; `all` has intervals."""
    average, interval = entry[averaging], entry["interval"] if averaging == "all" else None
    if average is None:
        return ["none", "none"]
    cells = [f"{100 * average['accuracy']:.2f}", f"{average['score']:.2f}"]
    if interval is not None:
        low, high = interval["accuracy"]
        cells[0] += f" ({100 * low:.1f} to {100 * high:.1f})"
        low, high = interval["score"]
        cells[1] += f" ({low:.2f} to {high:.2f})"
    return cells


def _metrics(record: Mapping[str, Any]) -> str:
    rows = [
        [f"{point['name']}, {name}", *(f"{factor * scores[key]:.1f}" for key, factor in _METRICS.items())]
        for point in record["points"]
        for name, scores in point["caption_metrics"].items()
    ]
    return table(["captions", "CIDEr-D", "BLEU-1", "BLEU-4", "ROUGE-L"], rows) if rows else "no reference captions."


def _frames(counts: Mapping[str, int]) -> str:
    """`16 frames`, or `8 to 16 frames` where clips differ."""
    low, high = counts["fewest"], counts["most"]
    return f"{low} frames" if low == high else f"{low} to {high} frames"


def _footer(record: Mapping[str, Any]) -> str:
    judge, environment = record["judge"], record["environment"]
    asked = ", ".join(f"{count} {what}" for what, count in judge["requests"].items())
    return (
        f"{environment.get('device', '?')}, {record['settings'].get('dtype', '?')}, commit "
        f"{environment.get('commit', '?')}; prompts: {record['prompts']['source']}, wording of the judge: "
        f"{judge['wording']}" + (f"; requests: {asked}" if asked else "") + "."
    )
