"""Summarise records of questions: scores over all of them, and over each group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pixellm_jax.benchmark_question import GIVEN
from pixellm_jax.evaluation.metrics import Areas, Sums, merge, scores, tally
from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.images.rle import area
from pixellm_jax.text.answer import MARKER


class Summary(NamedTuple):
    """Scores over questions, from 0 to 1; NaN where the denominator is zero.

    questions: number of questions. masks: true masks and extra predictions.
    giou, ciou, t_acc, n_acc: see `metrics.Scores`.
    right_count: share of answers with the right number of targets.
    empty_right: share of questions without a target whose answer has none.
    same_text: share of answers that equal the expected answer, where there is one.
    The last three are NaN where the answers were given.
    """

    questions: int
    masks: int
    giou: float
    ciou: float
    t_acc: float
    n_acc: float
    right_count: float
    empty_right: float
    same_text: float


def tally_record(record: QuestionRecord) -> Sums:
    """Sum over the pairs of a question.

    From intersection I, union U and the area T of the true mask (recorded without void pixels)
    follows the area U - T + I of the prediction.
    """
    areas = list[tuple[int, int, int]]()
    extra = list[bool]()
    for _, truth, intersection, union in record.pairs:
        true_area = 0 if truth is None else area(record.truth[truth])
        areas.append((intersection, union - true_area + intersection, true_area))
        extra.append(truth is None)
    table = np.asarray(areas, np.int64).reshape(-1, 3)
    return tally(Areas(*table.T), extra=np.asarray(extra, bool))


def summarise(records: Iterable[QuestionRecord]) -> Summary:
    """Compute the scores over questions, all or any part of them."""
    rows = list(records)
    sums = merge(*map(tally_record, rows))
    metrics = scores(sums)
    written = [row for row in rows if row.reason != GIVEN]
    counts = [(count_targets(row), len(row.truth)) for row in written]
    return Summary(
        questions=len(rows),
        masks=sums.masks,
        giou=metrics.giou,
        ciou=metrics.ciou,
        t_acc=metrics.t_acc,
        n_acc=metrics.n_acc,
        right_count=_share(predicted == true for predicted, true in counts),
        empty_right=_share(predicted == 0 for predicted, true in counts if true == 0),
        same_text=_share(
            _normalise(row.answer) == _normalise(row.expected) for row in written if row.expected
        ),
    )


def count_targets(record: QuestionRecord) -> int:
    """Return the number of targets in the answer, before masks were united."""
    return max(record.answer.count(MARKER), len(record.predicted))


def group_records(records: Iterable[QuestionRecord]) -> dict[str, list[QuestionRecord]]:
    """Return the records of each group by its name, sorted by name."""
    groups: dict[str, list[QuestionRecord]] = {}
    for record in records:
        for name in record.groups:
            groups.setdefault(name, []).append(record)
    return dict(sorted(groups.items()))


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _share(values: Iterable[bool]) -> float:
    items = list(values)
    return sum(items) / len(items) if items else float("nan")
