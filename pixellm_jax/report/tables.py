"""The numbers of a report as JSON, as Markdown and as rows of tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pixellm_jax.benchmark_question import GIVEN
from pixellm_jax.evaluation.bootstrap import DRAWS, LEVEL, SEED, Interval
from pixellm_jax.report.numbers import ALL, BINS, NO_JUDGE, Part, Report, Run
from pixellm_jax.report.published import Published, find_published

TITLES = {
    "giou": "gIoU",
    "ciou": "cIoU",
    "t_acc": "T-acc",
    "n_acc": "N-acc",
    "right_count": "right count",
    "empty_right": "empty right",
    "same_text": "same text",
}
"""The scores of a `Summary`, for people."""


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs; scores that are not defined are None."""
    run, work = report.run, report.run.work
    same, others = find_published(run.settings["benchmark"], run.settings["split"], run.mode)
    plain, judged = (
        [p for p in report.parts if (p.judge != NO_JUDGE) is is_judged]
        for is_judged in (False, True)
    )
    seconds, timed = work.get("seconds", {}), work.get("questions", 0)
    whole = sum(seconds.values())
    released = work.get("released")
    return {
        **run.settings,
        "scores": _part_json(plain[0]),
        "groups": {part.name: _part_json(part) for part in plain[1:]},
        "judged": None
        if report.unjudged is None
        else {
            "judge": run.judge,
            "threshold": run.threshold,
            "questions_without_scores": report.unjudged,
            "scores": _part_json(judged[0]) if judged else None,
            "groups": {part.name: _part_json(part) for part in judged[1:]},
        },
        "bootstrap": {"unit": "question", "draws": DRAWS, "seed": SEED, "level": LEVEL},
        "iou_histogram": {"bins": BINS, **report.iou},
        "targets": [
            {"true": true, "written": written, "questions": count}
            for (true, written), count in report.counts.items()
        ],
        "reasons": report.reasons,
        "text": report.text and report.text._asdict(),
        "published": [row._asdict() for row in same],
        "published_in_another_mode": [row._asdict() for row in others],
        "seconds_per_1000": 1000 * whole / timed if timed else None,
        "shares": {name: own / whole for name, own in seconds.items()} if whole else {},
        "left_out": work.get("left_out", {}),
        "released": {**released, "comparable": False} if released else None,
    }


def as_markdown(report: Report) -> str:
    """The report as Markdown: one table of scores, and the published ones that mean the same."""
    run = report.run
    lines = [f"# {describe(run)}", "", *table(score_rows(report.parts, run.mode)), ""]
    lines += [*notes(report), ""]
    rows, others = published_rows(report)
    if len(rows) > 1:
        lines += ["## Published", "", *table(rows), ""]
    lines += others
    return "\n".join(lines).rstrip() + "\n"


def describe(run: Run) -> str:
    """A run in a line."""
    checkpoint = run.settings.get("checkpoint")
    model = f"{checkpoint}: " if isinstance(checkpoint, str) and checkpoint else ""
    limit = run.settings.get("limit")
    weights = run.settings.get("weights")
    precision = f", weights in {weights}" if weights is not None else ""
    limited = f", only the first {limit} pictures" if limit is not None else ""
    return f"{model}{run.benchmark}, mode {run.mode}{precision}{limited}"


def notes(report: Report) -> list[str]:
    """What has to be said with the scores."""
    run, lines = report.run, []
    lines.append(
        f"In brackets: {LEVEL:.0%} intervals by bootstrap over questions ({DRAWS} draws, seed "
        f"{SEED}). Masks: true ones and extra predictions."
    )
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


def score_rows(parts: Sequence[Part], mode: str) -> list[list[str]]:
    """A table, its head first: every row names its mode and judge."""
    names = [n for n in TITLES if any(math.isfinite(getattr(p.summary, n)) for p in parts)]
    head = ["questions of", "mode", "judge", "questions", "masks", *(TITLES[n] for n in names)]
    rows = [head]
    for part in parts:
        cells = [
            cell(getattr(part.summary, name), getattr(part.intervals, name, None)) for name in names
        ]
        counts = [str(part.summary.questions), str(part.summary.masks)]
        rows.append([part.name, mode, part.judge, *counts, *cells])
    return rows


def published_rows(report: Report) -> tuple[list[list[str]], list[str]]:
    """A table of what is published in the same mode, one's own first; and a word on the rest."""
    run = report.run
    same, others = find_published(run.settings["benchmark"], run.settings["split"], run.mode)
    names = ("giou", "ciou", "t_acc", "n_acc")
    rows = [["system", "questions of", "mode", "judge", *(TITLES[n] for n in names), "source"]]
    groups = [part for part in report.parts if any(_is_of(row, part) for row in same)]
    for part in groups:
        own = [cell(getattr(part.summary, name), None) for name in names]
        rows.append(["this run", part.name, run.mode, part.judge, *own, ""])
    sources = list(dict.fromkeys(row.source for row in same))
    for row in same:
        cells = [_published_cell(row.scores.get(name)) for name in names]
        number = f"({sources.index(row.source) + 1})"
        rows.append(
            [row.system, row.group or ALL, str(row.mode), row.judge or NO_JUDGE, *cells, number]
        )
    words = [f"({number}) {source}" for number, source in enumerate(sources, 1)]
    words += dict.fromkeys(f"{row.system}: {row.note}" for row in same if row.note)
    if same and run.settings.get("limit") is not None:
        words.append("This run is of a part of the split, the published scores are of all of it.")
    if others:
        systems = ", ".join(dict.fromkeys(row.system for row in others))
        words.append(
            f"Published for {run.benchmark}, but in another mode than {run.mode} or one that no "
            f"source names, and so not beside it: {systems}."
        )
    return rows, words


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; `|` in a cell is escaped."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(cells[0])}", *lines[1:]]


def _published_cell(score: float | None) -> str:
    """With the digits that were published: three or four."""
    if score is None:
        return "–"
    return f"{score:.3f}" if round(score, 3) == score else f"{score:.4f}"


def _is_of(row: Published, part: Part) -> bool:
    return part.name == (row.group or ALL)


def _part_json(part: Part) -> dict[str, Any]:
    found = part.summary._asdict()
    return {
        **{name: None if value != value else value for name, value in found.items()},
        "intervals": {
            name: [interval.low, interval.high] if interval.draws else None
            for name, interval in part.intervals._asdict().items()
        },
    }


def cell(score: float, interval: Interval | None = None) -> str:
    """A score as in "0.8123 [0.7911, 0.8317]"; a dash if it is not defined."""
    if not math.isfinite(score):
        return "–"
    bounds = f" [{interval.low:.4f}, {interval.high:.4f}]" if interval and interval.draws else ""
    return f"{score:.4f}{bounds}"
