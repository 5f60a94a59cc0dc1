"""Which predicted mask answers which true one, question by question.

See docs/reference_notes.md 5.4, 5.5.
The cheapest assignment for the cost BCE + Dice, weighted 1 : 1, over a fixed grid of points. (The
released code draws the points at random, so that its scores vary: M4.)
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
"""Points along each side of a picture: 12544, the number that the released code draws."""

NOBODY = -1


class Costs(NamedTuple):
    """What it costs to take a prediction (m) for a true mask (j); their sum decides.

    bce: mean over known points. dice: 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), p = sigmoid.
    """

    bce: Float64[np.ndarray, "m j"]
    dice: Float64[np.ndarray, "m j"]


def match(
    logits: Float[np.ndarray, "m y x"], truth: UInt8[np.ndarray, "j y x"]
) -> Int64[np.ndarray, "... 2"]:
    """Pairs (prediction, true mask) of one question: matched, then missed, then extra.

    A missed true mask has `NOBODY` for its prediction, an extra prediction for its true mask.

    Raises:
        ValueError: logits that are not finite.
    """
    return assign(costs(sample(logits), sample(truth)))


def sample(masks: Shaped[np.ndarray, "... y x"], side: int = GRID) -> Shaped[np.ndarray, "... Y X"]:
    """Pixels under the centres of `side` x `side` equal cells; all of a side that is shorter."""
    rows, columns = (
        np.arange(size) if size <= side else (2 * np.arange(side) + 1) * size // (2 * side)
        for size in masks.shape[-2:]
    )
    return masks[..., rows[:, None], columns]


def costs(logits: Float[np.ndarray, "m y x"], truth: Num[np.ndarray, "j y x"]) -> Costs:
    """Costs over all given points; `truth` above 1 is 1, and `VOID` is a point that is not counted.

    Raises:
        ValueError: logits that are not finite.
    """
    x, t = (
        masks.reshape(len(masks), math.prod(masks.shape[1:])).astype(np.float64)
        for masks in (logits, truth)
    )
    if not np.isfinite(x).all():
        raise ValueError("mask logits that are not finite: the model has diverged")
    known = (t != VOID).astype(np.float64)
    t = np.minimum(t * known, 1)
    p = np.exp(-np.logaddexp(0, -x))
    bce = (np.logaddexp(0, x) @ known.T - x @ t.T) / np.maximum(known.sum(1), 1)
    dice = 1 - (2 * p @ t.T + 1) / (p @ known.T + t.sum(1) + 1)
    return Costs(bce, dice)


def assign(costs: Costs) -> Int64[np.ndarray, "... 2"]:
    """Pairs of the least total cost, then what is left over on either side (`match`)."""
    total = costs.bce + costs.dice
    predictions, truths = linear_sum_assignment(total)
    missed = np.setdiff1d(np.arange(total.shape[1]), truths)
    extra = np.setdiff1d(np.arange(total.shape[0]), predictions)
    pairs = [
        *zip(predictions, truths, strict=True),
        *((NOBODY, target) for target in missed),
        *((prediction, NOBODY) for prediction in extra),
    ]
    return np.asarray(pairs, np.int64).reshape(-1, 2)


def measure_pairs(
    inside: Bool[np.ndarray, "m y x"],
    truth: UInt8[np.ndarray, "j y x"],
    pairs: Int64[np.ndarray, "... 2"],
) -> Areas:
    """Areas of the pairs of one question. What has no partner is measured against an empty mask.

    So a missed mask and an extra prediction have no intersection, and their area counts in the
    union.
    """
    nothing = np.zeros(inside.shape[1:], bool)
    areas = [
        measure(
            nothing if prediction == NOBODY else inside[prediction],
            nothing.view(np.uint8) if target == NOBODY else truth[target],
        )
        for prediction, target in pairs
    ]
    return Areas(*np.asarray(areas, np.int64).reshape(-1, 3).T)


def tally_question(logits: Float[np.ndarray, "m y x"], truth: UInt8[np.ndarray, "j y x"]) -> Sums:
    """Sums of one question whose predictions come in any order and number; inside is above 0."""
    pairs = match(logits, truth)
    areas = measure_pairs(logits > 0, truth, pairs)
    return tally(areas, extra=pairs[:, 1] == NOBODY)
