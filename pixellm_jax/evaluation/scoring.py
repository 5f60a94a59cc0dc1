"""Score an answered question: its masks against the true masks, at the annotation's resolution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from pixellm_jax.benchmark_question import BenchmarkQuestion
from pixellm_jax.evaluation import released_metrics
from pixellm_jax.evaluation.matching import UNMATCHED, match, measure_pairs
from pixellm_jax.evaluation.record import DAMAGED, QuestionRecord
from pixellm_jax.evaluation.released_metrics import ReleasedSums, TargetMasks, merge
from pixellm_jax.images import rle
from pixellm_jax.images.geometry import VOID


class Answered(NamedTuple):
    """A question with the model's answer.

    question: the question. text: the answer, each target written `[SEG]`.
    logits: mask logits of each target at the annotation's size; positive means inside.
    reason: why the answer ended (`QuestionRecord.reason`).
    """

    question: BenchmarkQuestion
    logits: Float32[np.ndarray, "m y x"]
    text: str
    reason: str


class ReleasedLine(NamedTuple):
    """Counts of the released code for one question (see `released_metrics`): a line of a file.

    id: id of the question. iou: sum of IoUs. intersection, union: sums in pixels.
    predictions, truths: numbers of predicted and of true masks.
    """

    id: str
    iou: float
    intersection: int
    union: int
    predictions: int
    truths: int


def no_masks(question: BenchmarkQuestion) -> Float32[np.ndarray, "m y x"]:
    """Return the logits of an answer without targets."""
    return np.zeros((0, *question.hw), np.float32)


def make_record(answered: Answered, *, given: bool) -> QuestionRecord:
    """Score an answer.

    A `given` answer has its targets in the order of the true masks. Otherwise the targets are
    matched to the true masks (`matching`), after the masks of a single region have been united.
    """
    question = answered.question
    logits = answered.logits
    if question.united and len(logits) > 1 and not given:
        logits = logits.max(axis=0, keepdims=True)
    truth = _truth(question)
    pairs = _pair_in_order(len(logits), len(truth)) if given else match(logits, truth)
    areas = measure_pairs(logits > 0, truth, pairs)
    unions = areas.prediction + areas.truth - areas.intersection
    rows = zip(pairs.tolist(), areas.intersection.tolist(), unions.tolist(), strict=True)
    recorded_pairs = tuple((_index(p), _index(t), shared, union) for (p, t), shared, union in rows)
    return QuestionRecord(
        id=question.id,
        picture=question.picture,
        hw=question.hw,
        question=question.question,
        expected=question.expected,
        answer=answered.text,
        groups=question.groups,
        truth=question.truth,
        predicted=tuple(map(rle.encode, logits > 0)),
        void=question.void,
        descriptions=question.descriptions,
        pairs=recorded_pairs,
        reason=answered.reason,
    )


def make_released_line(answered: Answered, *, given: bool) -> ReleasedLine:
    """Count an answer as the released code does."""
    logits = answered.logits
    truth = _truth(answered.question)
    if given and len(logits) == len(truth):
        sums = released_metrics.tally_teacher_forced(logits, truth)
    else:
        sums = released_metrics.tally_generated([TargetMasks(logits, truth)])
    return ReleasedLine(answered.question.id, *sums[:3], len(logits), len(truth))


def released_scores(lines: Iterable[ReleasedLine]) -> dict[str, float]:
    """Compute gIoU and cIoU as the released code prints them.

    It divides the IoU of an image by its number of predictions or its number of targets, whichever
    is larger, over all its questions; for given answers the two numbers are equal. See
    docs/reference_notes.md M2.
    """
    images: dict[str, list[ReleasedLine]] = {}
    for line in sorted(lines):
        images.setdefault(line.id.rpartition("/")[0], []).append(line)
    parts = []
    for group in images.values():
        weight = max(sum(line.predictions for line in group), sum(line.truths for line in group))
        sums = merge(*(ReleasedSums(*line[1:4]) for line in group))
        parts.append(sums._replace(weight=weight))
    return released_metrics.released_scores(merge(*parts))._asdict()


def empty_non_finite(
    logits: Float32[np.ndarray, "m y x"], reason: str
) -> tuple[Float32[np.ndarray, "m y x"], str]:
    """Replace masks with non-finite logits by empty masks; the reason becomes `DAMAGED` then."""
    finite = np.isfinite(logits).all(axis=(1, 2))
    if finite.all():
        return logits, reason
    return np.where(finite[:, None, None], logits, np.float32(-1)), DAMAGED


def _truth(question: BenchmarkQuestion) -> UInt8[np.ndarray, "j y x"]:
    """Decode the true masks, with `VOID` at the void pixels."""
    masks = rle.decode(question.truth, question.hw)
    if question.void is not None and len(masks):
        masks[:, rle.decode([question.void], question.hw)[0] > 0] = VOID
    return masks


def _pair_in_order(predictions: int, truths: int) -> Int64[np.ndarray, "... 2"]:
    """Pair the first prediction with the first true mask, and so on; then the unmatched ones."""
    pairs = [(i, i) for i in range(min(predictions, truths))]
    missed = [(UNMATCHED, i) for i in range(predictions, truths)]
    extra = [(i, UNMATCHED) for i in range(truths, predictions)]
    return np.asarray([*pairs, *missed, *extra], np.int64).reshape(-1, 2)


def _index(number: int) -> int | None:
    return None if number == UNMATCHED else number
