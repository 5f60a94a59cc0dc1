"""Paired comparison of two evaluations, on the questions that both have answered.

comparison = compare(read_run(Path("runs/7b/muse")), read_run(Path("runs/13b/muse")))
print(as_markdown(comparison))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import NamedTuple

from pixellm_jax import __version__
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.bootstrap import LEVEL, RESAMPLES, SEED, Interval, paired_intervals
from pixellm_jax.evaluation.judge.judge import apply_judge
from pixellm_jax.evaluation.metrics import Scores, merge, scores
from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.evaluation.summary import group_records, tally_record
from pixellm_jax.report.html import render_page, render_table
from pixellm_jax.report.numbers import ALL, NO_JUDGE, Run, question_iou
from pixellm_jax.report.tables import TITLES, describe, format_score, markdown_table

MAX_CHANGES = 10
"""Maximum number of questions on the page that gained most, and that lost most."""

_KNOWN_DIFFERENCES = {"checkpoint", "checkpoint_hash", "mode", "limit"}
"""Settings whose differences are the subject of a comparison or are reported elsewhere."""

Pairs = list[tuple[QuestionRecord, QuestionRecord]]


class Row(NamedTuple):
    """One score of both runs on the same questions.

    Attributes:
        group: name of the group of questions; `ALL` for all.
        judge: name of the judge that decided which targets count, `NO_JUDGE` if masks alone did.
        questions: number of questions.
        score: name of the score in `metrics.Scores`.
        first: score of the first run.
        second: score of the second run.
        difference: second minus first, with its interval.
    """

    group: str
    judge: str
    questions: int
    score: str
    first: float
    second: float
    difference: Interval

    @property
    def significant(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0


class Comparison(NamedTuple):
    """Two runs, the questions of both, their scores, and remarks on them."""

    first: Run
    second: Run
    pairs: Pairs
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(first: Run, second: Run) -> Comparison:
    """Compute the scores of both runs and their differences, on their common questions.

    Raises:
        InputError: the runs are of different benchmarks or splits, or have no question in common,
            or the true masks of a question differ.
    """
    if first.benchmark != second.benchmark:
        raise InputError(
            f"{first.folder} is a run of {first.benchmark} and {second.folder} of "
            f"{second.benchmark}: "
            "compare two runs of the same benchmark and split"
        )
    others = {record.id: record for record in second.records}
    pairs = [(record, others[record.id]) for record in first.records if record.id in others]
    if not pairs:
        raise InputError(f"{first.folder} and {second.folder} have no question in common")
    for one, other in pairs:
        if (one.truth, one.void) != (other.truth, other.void):
            raise InputError(
                f"{one.id} has other true masks in {second.folder} than in {first.folder}: the two "
                "runs used different data; evaluate both on the same data"
            )
    rows = _rows(pairs, NO_JUDGE, lambda record, _: record, first, second)
    notes = _notes(first, second, pairs)
    if first.judge == second.judge != NO_JUDGE and first.threshold == second.threshold:
        judged = [pair for pair in pairs if all(record.judge for record in pair)]
        if judged:
            rows += _rows(
                judged, first.judge, lambda r, of: apply_judge(r, of.threshold), first, second
            )
        notes.append(f"{len(judged)} of the questions have scores of the judge in both runs.")
    return Comparison(first, second, pairs, tuple(rows), tuple(notes))


def as_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown."""
    first, second = comparison.first, comparison.second
    lines = [f"# {first.benchmark}", "", f"A: {describe(first)} ({first.folder.name})  "]
    lines += [f"B: {describe(second)} ({second.folder.name})", ""]
    lines += [*markdown_table(_table(comparison)), "", *comparison.notes]
    return "\n".join(lines) + "\n"


def render_comparison(comparison: Comparison) -> str:
    """Render the comparison as a page, with the questions that changed most."""
    first, second = comparison.first, comparison.second
    change = {b.id: question_iou(b) - question_iou(a) for a, b in comparison.pairs}
    ordered = sorted(comparison.pairs, key=lambda pair: change[pair[1].id])
    lost = [pair for pair in ordered if change[pair[1].id] < 0][:MAX_CHANGES]
    gained = [pair for pair in reversed(ordered) if change[pair[1].id] > 0][:MAX_CHANGES]
    parts = [
        f'<p class="lead">A: {escape(describe(first))} ({escape(first.folder.name)})'
        f"<br>B: {escape(describe(second))} ({escape(second.folder.name)})</p>",
        render_table(_table(comparison)),
        *(f'<p class="note">{escape(note)}</p>' for note in comparison.notes),
    ]
    for title, pairs in (("B is worse", lost), ("B is better", gained)):
        rows = [["question", "IoU of A", "IoU of B", "asked", "answer of A", "answer of B"]]
        for a, b in pairs:
            ious = f"{question_iou(a):.4f}", f"{question_iou(b):.4f}"
            rows.append([a.id, *ious, a.question, a.answer, b.answer])
        if pairs:
            parts.append(f"<h3>Where {title} most</h3>{render_table(rows)}")
    parts.append(f"<footer>pixellm {__version__}</footer>")
    title = f"{first.benchmark}: two evaluations"
    return render_page(title, "\n".join(parts), style="report", restricted=True)


def _rows(
    pairs: Pairs,
    judge: str,
    decide: Callable[[QuestionRecord, Run], QuestionRecord],
    first: Run,
    second: Run,
) -> list[Row]:
    """Score both runs; `decide` applies the judge of a run to a record."""
    groups = {ALL: [a.id for a, _ in pairs]} | {
        name: [record.id for record in records]
        for name, records in group_records(a for a, _ in pairs).items()
    }
    sums = {
        a.id: (tally_record(decide(a, first)), tally_record(decide(b, second))) for a, b in pairs
    }
    names = Scores._fields if judge == NO_JUDGE else ("giou", "ciou")
    rows = []
    for group, ids in groups.items():
        first_sums, second_sums = ([sums[key][run] for key in ids] for run in (0, 1))
        first_scores = scores(merge(*first_sums))
        second_scores = scores(merge(*second_sums))
        differences = paired_intervals(first_sums, second_sums)
        for name in names:
            values = getattr(first_scores, name), getattr(second_scores, name)
            if any(map(math.isfinite, values)):
                rows.append(Row(group, judge, len(ids), name, *values, getattr(differences, name)))
    return rows


def _notes(first: Run, second: Run, pairs: Pairs) -> list[str]:
    notes = [
        f"{len(pairs)} questions are in both runs; A has {len(first.records)}, B has "
        f"{len(second.records)}.",
        f"In brackets: {LEVEL:.0%} intervals of the difference by paired bootstrap over questions "
        f"({RESAMPLES} draws, seed {SEED}). * where 0 is outside; of twenty rows without a "
        "difference one gets it by chance.",
    ]
    if first.mode != second.mode:
        notes.append(
            f"NOT THE SAME MODE: A is {first.mode}, B is {second.mode}. The difference is one of "
            "modes, too."
        )
    if first.judge != second.judge or (
        first.judge != NO_JUDGE and first.threshold != second.threshold
    ):
        notes.append(
            f"NOT THE SAME JUDGE: A has {_judge(first)}, B has {_judge(second)}. Only what masks "
            "alone decide is compared."
        )
    keys = sorted((first.settings.keys() | second.settings.keys()) - _KNOWN_DIFFERENCES)
    values = [(key, first.settings.get(key), second.settings.get(key)) for key in keys]
    changed = [f"{key} {a!r} in A, {b!r} in B" for key, a, b in values if a != b]
    if changed:
        notes.append(f"Other settings: {'; '.join(changed)}.")
    reworded = sum(a.question != b.question for a, b in pairs)
    if reworded:
        notes.append(f"{reworded} of the questions are worded differently in the two runs.")
    return notes


def _judge(run: Run) -> str:
    return f"{run.judge} (threshold {run.threshold})" if run.judge != NO_JUDGE else "none"


def _table(comparison: Comparison) -> list[list[str]]:
    modes = dict.fromkeys((comparison.first.mode, comparison.second.mode))
    rows = [["questions of", "mode", "judge", "questions", "score", "A", "B", "B - A", ""]]
    for row in comparison.rows:
        rows.append(
            [
                row.group,
                " / ".join(modes),
                row.judge,
                str(row.questions),
                TITLES[row.score],
                format_score(row.first),
                format_score(row.second),
                _format_difference(row.difference),
                "*" if row.significant else "",
            ]
        )
    return rows


def _format_difference(difference: Interval) -> str:
    """Format a signed difference: "+0.0123 [-0.0011, +0.0257]"."""
    if not math.isfinite(difference.score):
        return "–"
    bounds = f" [{difference.low:+.4f}, {difference.high:+.4f}]" if difference.resamples else ""
    return f"{difference.score:+.4f}{bounds}"
