"""Match predicted to true masks, question by question.

Hungarian matching: the assignment of minimum total cost, BCE + Dice weighted 1 : 1, over a fixed
grid of points. (The released code samples the points at random, so that its scores vary: M4.) See
docs/reference_notes.md 5.4, 5.5.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Num, Shaped, UInt8
from scipy.optimize import linear_sum_assignment

from pixellm_jax.evaluation.metrics import Areas, Sums, measure, tally
from pixellm_jax.images.geometry import VOID

GRID = 112
"""Points along each side of an image: 12544 in total, as many as the released code samples."""

UNMATCHED = -1
"""Index in place of a missing partner."""


class Costs(NamedTuple):
    """Costs of matching prediction m to true mask j; their sum is minimised.

    bce: binary cross-entropy, mean over known points.
    dice: 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), p = sigmoid(logit).
    """

    bce: Float64[np.ndarray, "m j"]
    dice: Float64[np.ndarray, "m j"]


def match(
    logits: Float[np.ndarray, "m y x"], truth: UInt8[np.ndarray, "j y x"]
) -> Int64[np.ndarray, "... 2"]:
    """Return pairs (prediction, true mask) of one question: matched, then missed, then extra.

    The prediction of a missed true mask, and the true mask of an extra prediction, is `UNMATCHED`.

    Raises:
        ValueError: the logits are not finite.
    """
    return assign(costs(sample(logits), sample(truth)))


def sample(masks: Shaped[np.ndarray, "... y x"], side: int = GRID) -> Shaped[np.ndarray, "... Y X"]:
    """Return the pixels at the centres of `side` x `side` equal cells; all along a shorter side."""
    rows, columns = (
        np.arange(size) if size <= side else (2 * np.arange(side) + 1) * size // (2 * side)
        for size in masks.shape[-2:]
    )
    return masks[..., rows[:, None], columns]


def costs(logits: Float[np.ndarray, "m y x"], truth: Num[np.ndarray, "j y x"]) -> Costs:
    """Compute costs over all given points; `truth` above 1 counts as 1, `VOID` is excluded.

    Raises:
        ValueError: the logits are not finite.
    """
    x, t = (
        masks.reshape(len(masks), math.prod(masks.shape[1:])).astype(np.float64)
        for masks in (logits, truth)
    )
    if not np.isfinite(x).all():
        raise ValueError("mask logits are not finite: the model has diverged")
    known = (t != VOID).astype(np.float64)
    t = np.minimum(t * known, 1)
    p = np.exp(-np.logaddexp(0, -x))
    bce = (np.logaddexp(0, x) @ known.T - x @ t.T) / np.maximum(known.sum(1), 1)
    dice = 1 - (2 * p @ t.T + 1) / (p @ known.T + t.sum(1) + 1)
    return Costs(bce, dice)


def assign(costs: Costs) -> Int64[np.ndarray, "... 2"]:
    """Return the pairs of minimum total cost, then the unmatched masks (see `match`)."""
    total = costs.bce + costs.dice
    predictions, truths = linear_sum_assignment(total)
    missed = np.setdiff1d(np.arange(total.shape[1]), truths)
    extra = np.setdiff1d(np.arange(total.shape[0]), predictions)
    pairs = [
        *zip(predictions, truths, strict=True),
        *((UNMATCHED, target) for target in missed),
        *((prediction, UNMATCHED) for prediction in extra),
    ]
    return np.asarray(pairs, np.int64).reshape(-1, 2)


def measure_pairs(
    inside: Bool[np.ndarray, "m y x"],
    truth: UInt8[np.ndarray, "j y x"],
    pairs: Int64[np.ndarray, "... 2"],
) -> Areas:
    """Measure the pairs of one question; an unmatched mask is measured against an empty mask.

    A missed mask and an extra prediction thus have intersection 0, and their area is the union.
    """
    empty = np.zeros(inside.shape[1:], bool)
    areas = [
        measure(
            empty if prediction == UNMATCHED else inside[prediction],
            empty.view(np.uint8) if target == UNMATCHED else truth[target],
        )
        for prediction, target in pairs
    ]
    return Areas(*np.asarray(areas, np.int64).reshape(-1, 3).T)


def tally_question(logits: Float[np.ndarray, "m y x"], truth: UInt8[np.ndarray, "j y x"]) -> Sums:
    """Match and count one question with any number of predictions; positive logits are inside."""
    pairs = match(logits, truth)
    areas = measure_pairs(logits > 0, truth, pairs)
    return tally(areas, extra=pairs[:, 1] == UNMATCHED)
