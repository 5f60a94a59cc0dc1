"""The scores that the released evaluation code prints, faults included.

See docs/reference_notes.md 4.7, 5.5, M1, M2.
Only for comparison with its logs, never with `metrics.py`. Its faults: a small number is added to
every denominator, mask values above 1 are lost, unmatched predictions are compared by their raw
logits (M1), and MUSE divides by less than the number of pairs (M2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from pixellm_jax.evaluation.matching import NOBODY, match
from pixellm_jax.images.geometry import VOID


class Question(NamedTuple):
    """Mask logits and true masks of one question, at the original size of the picture."""

    logits: Float[np.ndarray, "m y x"]
    truth: UInt8[np.ndarray, "j y x"]


class ReleasedSums(NamedTuple):
    """Sums of IoU, intersection, union, and what the IoU is divided by."""

    iou: float = 0.0
    intersection: int = 0
    union: int = 0
    weight: int = 0


class ReleasedScores(NamedTuple):
    """gIoU and cIoU as the released code prints them."""

    giou: float
    ciou: float


def tally_teacher_forced(
    logits: Float[np.ndarray, "m y x"], truth: UInt8[np.ndarray, "m y x"]
) -> ReleasedSums:
    """Sums of the refer sets and ReasonSeg: prediction by prediction."""
    masks = [_compare(*pair) for pair in zip(logits, truth, strict=True)]
    return merge(*masks)._replace(weight=len(masks))


def tally_generated(questions: Sequence[Question]) -> ReleasedSums:
    """Sums of a MUSE picture, question by question, with the assignment of `matching.match`.

    (The released assignment is over random points; over many it is the same.)
    """
    masks = []
    for logits, truth in questions:
        for prediction, target in match(logits, truth):
            if target == NOBODY:
                masks.append(_compare_extra(logits[prediction]))
            elif prediction == NOBODY:
                masks.append(_compare(np.zeros(truth.shape[1:], np.float32), truth[target]))
            else:
                masks.append(_compare(logits[prediction], truth[target]))
    totals = (sum(map(len, side)) for side in zip(*questions, strict=True))
    return merge(*masks)._replace(weight=max(totals, default=0))


def merge(*parts: ReleasedSums) -> ReleasedSums:
    """Sums of everything."""
    return ReleasedSums(*map(sum, zip(*parts, strict=True))) if parts else ReleasedSums()


def released_scores(sums: ReleasedSums) -> ReleasedScores:
    """The scores of all that was summed, 0 where nothing was."""
    return ReleasedScores(sums.iou / (sums.weight + 1e-5), sums.intersection / (sums.union + 1e-10))


def _compare(logits: Float[np.ndarray, "y x"], truth: UInt8[np.ndarray, "y x"]) -> ReleasedSums:
    inside, target = (logits > 0) & (truth != VOID), truth == 1
    intersection = int((inside & target).sum())
    return _sums(intersection, int(inside.sum() + target.sum()) - intersection)


def _compare_extra(logits: Float[np.ndarray, "y x"]) -> ReleasedSums:
    """A histogram of two bins over [0, 1], of the logits themselves."""
    return _sums(0, int(((logits >= 0.5) & (logits <= 1)).sum()))


def _sums(intersection: int, union: int) -> ReleasedSums:
    return ReleasedSums(intersection / (union + 1e-5) + (union == 0), intersection, union)
