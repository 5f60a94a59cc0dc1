"""`pixellm compare`: two evaluations side by side, on the questions that both have answered."""

from __future__ import annotations

import argparse
import html
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pixellm_jax.cli.report_page import draw_table, write_page
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.bootstrap import DRAWS, LEVEL, SEED, Interval, paired_intervals
from pixellm_jax.evaluation.judge.judge import apply_judge
from pixellm_jax.evaluation.metrics import Scores, merge, scores
from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.evaluation.summary import group_records, tally_record
from pixellm_jax.report.numbers import ALL, NO_JUDGE, Run, question_iou, read_run
from pixellm_jax.report.tables import TITLES, cell, describe, table

CHANGES = 10
"""Questions on the page that gained most, and that lost most."""

_EXPECTED = {"checkpoint", "checkpoint_hash", "mode", "limit"}
"""Settings that a comparison is of, or that are told in another way."""

EXAMPLES = """example:
  pixellm compare runs/7b/muse runs/13b/muse --out muse.html
"""

Pairs = list[tuple[QuestionRecord, QuestionRecord]]


class Row(NamedTuple):
    """A score of both runs on the same questions. difference: second less first."""

    part: str
    judge: str
    questions: int
    score: str
    first: float
    second: float
    difference: Interval

    @property
    def clear(self) -> bool:
        """The interval does not hold 0."""
        return self.difference.low > 0 or self.difference.high < 0


class Comparison(NamedTuple):
    """Two runs. notes: what has to be said with the rows. pairs: questions of both."""

    first: Run
    second: Run
    pairs: Pairs
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="put two evaluations side by side",
        description="Compares two folders that `pixellm evaluate` wrote, question by question, "
        "with intervals of the differences, and prints a table in Markdown.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", type=Path, metavar="A")
    parser.add_argument("second", type=Path, metavar="B")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write a page (.html)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Prints the table; writes the page if one is wanted."""
    comparison = compare(read_run(options.first), read_run(options.second))
    print(as_markdown(comparison), end="")
    if options.out is not None:
        try:
            options.out.write_text(draw_page(comparison), encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(
                f"{options.out}: cannot be written ({error.strerror or error})"
            ) from None
        print(f"\npage: {options.out}")


def compare(first: Run, second: Run) -> Comparison:
    """The scores of both runs and their differences, on the questions that both have.

    Raises:
        InputError: another benchmark or split, no common question, or one that is not the same.
    """
    if first.benchmark != second.benchmark:
        raise InputError(
            f"{first.folder} is of {first.benchmark} and {second.folder} of {second.benchmark}: "
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
                "runs are of different data; evaluate both on the same"
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
    """The comparison as Markdown."""
    first, second = comparison.first, comparison.second
    lines = [f"# {first.benchmark}", "", f"A: {describe(first)} ({first.folder.name})  "]
    lines += [f"B: {describe(second)} ({second.folder.name})", ""]
    lines += [*table(_cells(comparison)), "", *comparison.notes]
    return "\n".join(lines) + "\n"


def draw_page(comparison: Comparison) -> str:
    """The comparison as a page, with the questions that changed most."""
    first, second = comparison.first, comparison.second
    change = {b.id: question_iou(b) - question_iou(a) for a, b in comparison.pairs}
    ordered = sorted(comparison.pairs, key=lambda pair: change[pair[1].id])
    lost = [pair for pair in ordered if change[pair[1].id] < 0][:CHANGES]
    gained = [pair for pair in reversed(ordered) if change[pair[1].id] > 0][:CHANGES]
    parts = [
        f'<p class="lead">A: {html.escape(describe(first))} ({html.escape(first.folder.name)})'
        f"<br>B: {html.escape(describe(second))} ({html.escape(second.folder.name)})</p>",
        draw_table(_cells(comparison)),
        *(f'<p class="note">{html.escape(note)}</p>' for note in comparison.notes),
    ]
    for title, pairs in (("B is worse", lost), ("B is better", gained)):
        rows = [["question", "IoU of A", "IoU of B", "asked", "answer of A", "answer of B"]]
        for a, b in pairs:
            ious = f"{question_iou(a):.4f}", f"{question_iou(b):.4f}"
            rows.append([a.id, *ious, a.question, a.answer, b.answer])
        if pairs:
            parts.append(f"<h3>Where {title} most</h3>{draw_table(rows)}")
    return write_page(f"{first.benchmark}: two evaluations", "\n".join(parts))


def _rows(
    pairs: Pairs,
    judge: str,
    decide: Callable[[QuestionRecord, Run], QuestionRecord],
    first: Run,
    second: Run,
) -> list[Row]:
    groups = {ALL: [a.id for a, _ in pairs]} | {
        name: [record.id for record in records]
        for name, records in group_records(a for a, _ in pairs).items()
    }
    sums = {
        a.id: (tally_record(decide(a, first)), tally_record(decide(b, second))) for a, b in pairs
    }
    names = Scores._fields if judge == NO_JUDGE else ("giou", "ciou")
    rows = []
    for part, ids in groups.items():
        one, other = ([sums[key][side] for key in ids] for side in (0, 1))
        before, after = scores(merge(*one)), scores(merge(*other))
        found = paired_intervals(one, other)
        for name in names:
            values = getattr(before, name), getattr(after, name)
            if any(map(math.isfinite, values)):
                row = Row(part, judge, len(ids), name, *values, getattr(found, name))
                rows.append(row)
    return rows


def _notes(first: Run, second: Run, pairs: Pairs) -> list[str]:
    notes = [
        f"{len(pairs)} questions are in both runs; A has {len(first.records)}, B has "
        f"{len(second.records)}.",
        f"In brackets: {LEVEL:.0%} intervals of the difference by paired bootstrap over questions "
        f"({DRAWS} draws, seed {SEED}). * where 0 is outside; of twenty rows without a difference "
        "one gets it by chance.",
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
    others = sorted((first.settings.keys() | second.settings.keys()) - _EXPECTED)
    values = [(key, first.settings.get(key), second.settings.get(key)) for key in others]
    changed = [f"{key} {a!r} in A, {b!r} in B" for key, a, b in values if a != b]
    if changed:
        notes.append(f"Other settings: {'; '.join(changed)}.")
    reworded = sum(a.question != b.question for a, b in pairs)
    if reworded:
        notes.append(f"{reworded} of the questions are worded differently in the two runs.")
    return notes


def _judge(run: Run) -> str:
    return f"{run.judge} (threshold {run.threshold})" if run.judge != NO_JUDGE else "none"


def _cells(comparison: Comparison) -> list[list[str]]:
    modes = dict.fromkeys((comparison.first.mode, comparison.second.mode))
    rows = [["questions of", "mode", "judge", "questions", "score", "A", "B", "B - A", ""]]
    for row in comparison.rows:
        difference = row.difference
        bounds = f" [{difference.low:+.4f}, {difference.high:+.4f}]" if difference.draws else ""
        shown = f"{difference.score:+.4f}{bounds}" if math.isfinite(difference.score) else "–"
        name = TITLES[row.score]
        scored = cell(row.first), cell(row.second)
        start = [row.part, " / ".join(modes), row.judge, str(row.questions), name]
        rows.append([*start, *scored, shown, "*" if row.clear else ""])
    return rows
