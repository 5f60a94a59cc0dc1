"""Scores as the released evaluation code prints them, faults included.

They serve only the comparison with its logs, never with `metrics.py`. The faults: a small number is
added to every denominator, mask values above 1 are lost, unmatched predictions are compared by
their raw logits (M1), and MUSE divides by less than the number of pairs (M2). See
docs/reference_notes.md 4.7, 5.5, M1, M2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from pixellm_jax.evaluation.matching import UNMATCHED, match
from pixellm_jax.images.geometry import VOID


class TargetMasks(NamedTuple):
    """Mask logits and true masks of one question, at the original size of the image."""

    logits: Float[np.ndarray, "m y x"]
    truth: UInt8[np.ndarray, "j y x"]


class ReleasedSums(NamedTuple):
    """Sums of IoU, intersection and union over masks; `weight` is the denominator of the IoU."""

    iou: float = 0.0
    intersection: int = 0
    union: int = 0
    weight: int = 0


class ReleasedScores(NamedTuple):
    """Scores as the released code prints them."""

    giou: float
    ciou: float


def tally_teacher_forced(
    logits: Float[np.ndarray, "m y x"], truth: UInt8[np.ndarray, "m y x"]
) -> ReleasedSums:
    """Count the referring sets and ReasonSeg, prediction by prediction."""
    masks = [_compare(*pair) for pair in zip(logits, truth, strict=True)]
    return merge(*masks)._replace(weight=len(masks))


def tally_generated(questions: Sequence[TargetMasks]) -> ReleasedSums:
    """Count the questions about a MUSE image, with the assignment of `matching.match`.

    (The released assignment is over random points; over many points it is the same.)
    """
    masks = []
    for logits, truth in questions:
        for prediction, target in match(logits, truth):
            if target == UNMATCHED:
                masks.append(_compare_extra(logits[prediction]))
            elif prediction == UNMATCHED:
                masks.append(_compare(np.zeros(truth.shape[1:], np.float32), truth[target]))
            else:
                masks.append(_compare(logits[prediction], truth[target]))
    totals = (sum(map(len, side)) for side in zip(*questions, strict=True))
    return merge(*masks)._replace(weight=max(totals, default=0))


def merge(*parts: ReleasedSums) -> ReleasedSums:
    """Add sums."""
    return ReleasedSums(*map(sum, zip(*parts, strict=True))) if parts else ReleasedSums()


def released_scores(sums: ReleasedSums) -> ReleasedScores:
    """Compute the scores of sums, 0 for empty sums."""
    return ReleasedScores(sums.iou / (sums.weight + 1e-5), sums.intersection / (sums.union + 1e-10))


def _compare(logits: Float[np.ndarray, "y x"], truth: UInt8[np.ndarray, "y x"]) -> ReleasedSums:
    inside, target = (logits > 0) & (truth != VOID), truth == 1
    intersection = int((inside & target).sum())
    return _sums(intersection, int(inside.sum() + target.sum()) - intersection)


def _compare_extra(logits: Float[np.ndarray, "y x"]) -> ReleasedSums:
    """Compare with nothing, by a two-bin histogram over [0, 1] of the raw logits."""
    return _sums(0, int(((logits >= 0.5) & (logits <= 1)).sum()))


def _sums(intersection: int, union: int) -> ReleasedSums:
    return ReleasedSums(intersection / (union + 1e-5) + (union == 0), intersection, union)
