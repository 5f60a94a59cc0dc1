"""Numbers of a report as JSON, as Markdown, and as rows of tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pixellm_jax.benchmark_question import GIVEN
from pixellm_jax.evaluation.bootstrap import LEVEL, RESAMPLES, SEED, Interval
from pixellm_jax.report.numbers import ALL, BINS, NO_JUDGE, GroupScores, Report, Run
from pixellm_jax.report.published import find_published

TITLES = {
    "giou": "gIoU",
    "ciou": "cIoU",
    "t_acc": "T-acc",
    "n_acc": "N-acc",
    "right_count": "right count",
    "empty_right": "empty right",
    "same_text": "same text",
}
"""Titles of the scores of a `Summary`."""


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON values; scores that are not defined are None."""
    run = report.run
    same_mode, other_modes = find_published(
        run.settings["benchmark"], run.settings["split"], run.mode
    )
    plain = [group for group in report.scores if group.judge == NO_JUDGE]
    judged = [group for group in report.scores if group.judge != NO_JUDGE]
    seconds = run.work.get("seconds", {})
    timed = run.work.get("questions", 0)
    total = sum(seconds.values())
    released = run.work.get("released")
    return {
        **run.settings,
        "scores": _group_json(plain[0]),
        "groups": {group.name: _group_json(group) for group in plain[1:]},
        "judged": None
        if report.unjudged is None
        else {
            "judge": run.judge,
            "threshold": run.threshold,
            "questions_without_scores": report.unjudged,
            "scores": _group_json(judged[0]) if judged else None,
            "groups": {group.name: _group_json(group) for group in judged[1:]},
        },
        "bootstrap": {"unit": "question", "draws": RESAMPLES, "seed": SEED, "level": LEVEL},
        "iou_histogram": {"bins": BINS, **report.iou},
        "targets": [
            {"true": true, "written": written, "questions": count}
            for (true, written), count in report.counts.items()
        ],
        "reasons": report.reasons,
        "text": report.text and report.text._asdict(),
        "published": [row._asdict() for row in same_mode],
        "published_in_another_mode": [row._asdict() for row in other_modes],
        "seconds_per_1000": 1000 * total / timed if timed else None,
        "shares": {name: part / total for name, part in seconds.items()} if total else {},
        "left_out": run.work.get("left_out", {}),
        "released": {**released, "comparable": False} if released else None,
    }


def as_markdown(report: Report) -> str:
    """Return the report as Markdown: scores, remarks, and comparable published scores."""
    run = report.run
    lines = [f"# {describe(run)}", "", *markdown_table(score_rows(report.scores, run.mode)), ""]
    lines += [*notes(report), ""]
    published, remarks = published_rows(report)
    if len(published) > 1:
        lines += ["## Published", "", *markdown_table(published), ""]
    lines += remarks
    return "\n".join(lines).rstrip() + "\n"


def describe(run: Run) -> str:
    """Return one line with model, benchmark, mode and precision of a run."""
    checkpoint = run.settings.get("checkpoint")
    model = f"{checkpoint}: " if isinstance(checkpoint, str) and checkpoint else ""
    weights = run.settings.get("weights")
    precision = f", weights in {weights}" if weights is not None else ""
    limit = run.settings.get("limit")
    limited = f", only the first {limit} pictures" if limit is not None else ""
    return f"{model}{run.benchmark}, mode {run.mode}{precision}{limited}"


def notes(report: Report) -> list[str]:
    """Return the remarks that scores need to be read correctly."""
    run = report.run
    lines = [
        f"In brackets: {LEVEL:.0%} intervals by bootstrap over questions ({RESAMPLES} draws, seed "
        f"{SEED}). Masks: true ones and extra predictions."
    ]
    if report.unjudged is not None:
        lines.append(
            f"Judge: {run.judge}; a target with less than {run.threshold} of 10 has intersection 0."
        )
    if report.unjudged:
        lines.append(
            f"{report.unjudged} of {len(run.records)} questions have no scores of the judge and "
            "are left out of the judged rows."
        )
    if run.mode == GIVEN:
        lines.append("The answers were given; only the masks are the model's.")
    if text := report.text:
        lines.append(
            f"Words of {text.answers} answers: exact match {text.exact:.4f}, ROUGE-L "
            f"{text.rouge_l:.4f}, {text.length:.2f} times as long as the expected ones; "
            f"{text.marked:.4f} of them point at a target where none is expected."
        )
    if left_out := run.work.get("left_out"):
        name, reason = next(iter(left_out.items()))
        lines.append(
            f"Of {len(left_out)} pictures something was left out; the first is {name}: {reason}"
        )
    if released := run.work.get("released"):
        scored = ", ".join(f"{TITLES[name]} {released[name]:.4f}" for name in ("giou", "ciou"))
        lines.append(f"As the released code counts, comparable with nothing else: {scored}.")
    return lines


def score_rows(scores: Sequence[GroupScores], mode: str) -> list[list[str]]:
    """Return a table of scores, its head first; every row names its mode and its judge."""
    names = [
        name
        for name in TITLES
        if any(math.isfinite(getattr(group.summary, name)) for group in scores)
    ]
    head = ["questions of", "mode", "judge", "questions", "masks", *(TITLES[n] for n in names)]
    rows = [head]
    for group in scores:
        cells = [
            format_score(getattr(group.summary, name), getattr(group.intervals, name, None))
            for name in names
        ]
        counts = [str(group.summary.questions), str(group.summary.masks)]
        rows.append([group.name, mode, group.judge, *counts, *cells])
    return rows


def published_rows(report: Report) -> tuple[list[list[str]], list[str]]:
    """Return a table of the run next to scores published in the same mode, and remarks on it."""
    run = report.run
    same_mode, other_modes = find_published(
        run.settings["benchmark"], run.settings["split"], run.mode
    )
    names = ("giou", "ciou", "t_acc", "n_acc")
    rows = [["system", "questions of", "mode", "judge", *(TITLES[n] for n in names), "source"]]
    for group in report.scores:
        if any(group.name == (row.group or ALL) for row in same_mode):
            cells = [format_score(getattr(group.summary, name)) for name in names]
            rows.append(["this run", group.name, run.mode, group.judge, *cells, ""])
    sources = list(dict.fromkeys(row.source for row in same_mode))
    for row in same_mode:
        cells = [_format_published(row.scores.get(name)) for name in names]
        number = f"({sources.index(row.source) + 1})"
        rows.append(
            [row.system, row.group or ALL, str(row.mode), row.judge or NO_JUDGE, *cells, number]
        )
    remarks = [f"({number}) {source}" for number, source in enumerate(sources, 1)]
    remarks += dict.fromkeys(f"{row.system}: {row.note}" for row in same_mode if row.note)
    if same_mode and run.settings.get("limit") is not None:
        remarks.append("This run is of a part of the split, the published scores are of all of it.")
    if other_modes:
        systems = ", ".join(dict.fromkeys(row.system for row in other_modes))
        remarks.append(
            f"Published for {run.benchmark}, but in another mode than {run.mode} or one that no "
            f"source names, and so not beside it: {systems}."
        )
    return rows, remarks


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, its head first; `|` in a cell is escaped."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(cells[0])}", *lines[1:]]


def format_score(score: float, interval: Interval | None = None) -> str:
    """Format a score: "0.8123 [0.7911, 0.8317]", or a dash if it is not defined."""
    if not math.isfinite(score):
        return "–"
    bounds = (
        f" [{interval.low:.4f}, {interval.high:.4f}]" if interval and interval.resamples else ""
    )
    return f"{score:.4f}{bounds}"


def _format_published(score: float | None) -> str:
    """Format a published score with as many digits as its source has: three or four."""
    if score is None:
        return "–"
    return f"{score:.3f}" if round(score, 3) == score else f"{score:.4f}"


def _group_json(group: GroupScores) -> dict[str, Any]:
    return {
        **{
            name: None if math.isnan(value) else value
            for name, value in group.summary._asdict().items()
        },
        "intervals": {
            name: [interval.low, interval.high] if interval.resamples else None
            for name, interval in group.intervals._asdict().items()
        },
    }
