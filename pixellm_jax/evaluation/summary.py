"""Records of questions -> scores: of all, and of each of their groups."""

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
    """Scores over questions, from 0 to 1; NaN where there is nothing to divide by.

    masks: true masks and extra predictions. giou, ciou, t_acc, n_acc: see `metrics.Scores`.
    right_count: share of answers with the right number of targets. empty_right: share of questions
    without a target that got none. same_text: share of answers that are the expected one word for
    word, where there is one. The last three are NaN where answers were given.
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
    """Sums of a question, from its pairs.

    The areas behind intersection I and union U are the truth's T (its void pixels are left out of
    the record) and U - T + I of the prediction.
    """
    areas, extra = list[tuple[int, int, int]](), list[bool]()
    for _, truth, intersection, union in record.pairs:
        inside = 0 if truth is None else area(record.truth[truth])
        areas.append((intersection, union - inside + intersection, inside))
        extra.append(truth is None)
    table = np.asarray(areas, np.int64).reshape(-1, 3)
    return tally(Areas(*table.T), extra=np.asarray(extra, bool))


def summarise(records: Iterable[QuestionRecord]) -> Summary:
    """The scores of any part of the questions."""
    rows = list(records)
    sums = merge(*map(tally_record, rows))
    found = scores(sums)
    written = [row for row in rows if row.reason != GIVEN]
    counts = [(count_targets(row), len(row.truth)) for row in written]
    return Summary(
        questions=len(rows),
        masks=sums.masks,
        giou=found.giou,
        ciou=found.ciou,
        t_acc=found.t_acc,
        n_acc=found.n_acc,
        right_count=_share(predicted == true for predicted, true in counts),
        empty_right=_share(predicted == 0 for predicted, true in counts if true == 0),
        same_text=_share(
            _plain(row.answer) == _plain(row.expected) for row in written if row.expected
        ),
    )


def count_targets(record: QuestionRecord) -> int:
    """Targets that the answer names; more than `predicted` where these were united."""
    return max(record.answer.count(MARKER), len(record.predicted))


def group_records(records: Iterable[QuestionRecord]) -> dict[str, list[QuestionRecord]]:
    """The questions of each group, by its name."""
    groups: dict[str, list[QuestionRecord]] = {}
    for record in records:
        for name in record.groups:
            groups.setdefault(name, []).append(record)
    return dict(sorted(groups.items()))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")
