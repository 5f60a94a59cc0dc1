"""An answered question -> its record: masks against masks, at the size of the annotation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from pixellm_jax.benchmark_question import BenchmarkQuestion
from pixellm_jax.evaluation import released_metrics
from pixellm_jax.evaluation.matching import NOBODY, match, measure_pairs
from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.evaluation.released_metrics import Question, ReleasedSums, merge
from pixellm_jax.images import rle
from pixellm_jax.images.geometry import VOID

TOO_LONG = "too long"
"""`reason` of a question whose prompt has no room in the model."""


class Answered(NamedTuple):
    """A question and what the model made of it.

    logits: of each target, at the size of the annotation; positive means inside.
    """

    question: BenchmarkQuestion
    logits: Float32[np.ndarray, "m y x"]
    text: str
    reason: str


class ReleasedLine(NamedTuple):
    """What the released code would count of a question (see `released_metrics`)."""

    id: str
    iou: float
    intersection: int
    union: int
    predictions: int
    truths: int


def no_masks(question: BenchmarkQuestion) -> Float32[np.ndarray, "m y x"]:
    """The logits of an answer without targets."""
    return np.zeros((0, *question.hw), np.float32)


def make_record(answered: Answered, *, given: bool) -> QuestionRecord:
    """Scores an answer.

    Where the answer was `given`, the targets are in the order of the truth. Else they are matched
    by their masks (`matching`), after those of one region were united.
    """
    asked, logits = answered.question, answered.logits
    if asked.united and len(logits) > 1 and not given:
        logits = logits.max(axis=0, keepdims=True)
    truth = _truth(asked)
    pairs = _in_order(len(logits), len(truth)) if given else match(logits, truth)
    areas = measure_pairs(logits > 0, truth, pairs)
    union = areas.prediction + areas.truth - areas.intersection
    rows = zip(pairs.tolist(), areas.intersection.tolist(), union.tolist(), strict=True)
    return QuestionRecord(
        id=asked.id,
        picture=asked.picture,
        hw=asked.hw,
        question=asked.question,
        expected=asked.expected,
        answer=answered.text,
        groups=asked.groups,
        truth=asked.truth,
        predicted=tuple(map(rle.encode, logits > 0)),
        void=asked.void,
        descriptions=asked.descriptions,
        pairs=tuple((_index(p), _index(t), shared, both) for (p, t), shared, both in rows),
        reason=answered.reason,
    )


def make_released_line(answered: Answered, *, given: bool) -> ReleasedLine:
    """Counts an answer as the released code does."""
    asked, logits, truth = answered.question, answered.logits, _truth(answered.question)
    if given and len(logits) == len(truth):
        sums = released_metrics.tally_teacher_forced(logits, truth)
    else:
        sums = released_metrics.tally_generated([Question(logits, truth)])
    return ReleasedLine(asked.id, *sums[:3], len(logits), len(truth))


def released_scores(lines: Iterable[ReleasedLine]) -> dict[str, float]:
    """gIoU and cIoU as the released code prints them.

    It divides the IoU of a picture by the larger one of its numbers of predictions and of targets,
    over all its questions (docs/reference_notes.md M2); of given answers the two are the same.
    """
    pictures: dict[str, list[ReleasedLine]] = {}
    for line in sorted(lines):
        pictures.setdefault(line.id.rpartition("/")[0], []).append(line)
    parts = []
    for own in pictures.values():
        weight = max(sum(line.predictions for line in own), sum(line.truths for line in own))
        sums = merge(*(ReleasedSums(*line[1:4]) for line in own))
        parts.append(sums._replace(weight=weight))
    return released_metrics.released_scores(merge(*parts))._asdict()


def sound(
    logits: Float32[np.ndarray, "m y x"], reason: str
) -> tuple[Float32[np.ndarray, "m y x"], str]:
    """Empties masks of numbers that are not finite; the answer is "damaged" then."""
    finite = np.isfinite(logits).all(axis=(1, 2))
    if finite.all():
        return logits, reason
    return np.where(finite[:, None, None], logits, np.float32(-1)), "damaged"


def _truth(asked: BenchmarkQuestion) -> UInt8[np.ndarray, "j y x"]:
    """True masks, with `VOID` at the void pixels."""
    masks = rle.decode(asked.truth, asked.hw)
    if asked.void is not None and len(masks):
        masks[:, rle.decode([asked.void], asked.hw)[0] > 0] = VOID
    return masks


def _in_order(predictions: int, truths: int) -> Int64[np.ndarray, "... 2"]:
    """The first prediction answers the first true mask, and so on; then what is left over."""
    same = [(i, i) for i in range(min(predictions, truths))]
    missed = [(NOBODY, i) for i in range(predictions, truths)]
    extra = [(i, NOBODY) for i in range(truths, predictions)]
    return np.asarray([*same, *missed, *extra], np.int64).reshape(-1, 2)


def _index(number: int) -> int | None:
    return None if number == NOBODY else number
