"""Confidence intervals by bootstrap over questions: of scores, and of differences of two runs.

A question is drawn as a whole, for its masks are not independent of each other (Efron and
Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13). What is drawn are its
`metrics.Sums`, so that a score of a sample is the score that these questions would have had, ratios
of sums (cIoU) included. Questions about one picture count as independent; where a picture has many,
the intervals are somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from pixellm_jax.evaluation.metrics import IOU_UNIT, Scores, Sums, merge, scores

DRAWS = 2000
"""Resamples: the ends of a 95 % interval then lie on the 50th draw from either side."""

SEED = 0
LEVEL = 0.95

_BLOCK = 2**21
"""Counts held at once, draws x questions: 16 MiB for each array of them."""


class Interval(NamedTuple):
    """A score and its confidence interval; all are NaN where the score is not defined.

    draws: resamples in which it was defined, out of `DRAWS`.
    """

    score: float
    low: float
    high: float
    draws: int


class Intervals(NamedTuple):
    """An interval for each score of `metrics.Scores`."""

    giou: Interval
    ciou: Interval
    t_acc: Interval
    n_acc: Interval


def resample(
    questions: Sequence[Sums], *, draws: int = DRAWS, seed: int = SEED
) -> Float64[np.ndarray, "{draws} 4"]:
    """Scores (as in `metrics.Scores`) of `draws` samples with replacement of the questions.

    NaN where a sample has nothing to divide by. The same seed and number of questions draw the
    same questions, which is what pairs two runs.
    """
    sums = np.array([_in_units(question) for question in questions], np.float64)
    count, drawn = len(questions), np.empty((draws, len(Sums._fields)))
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(1, count))
    for start in range(0, draws, block) if count else ():
        stop = min(draws, start + block)
        chosen = random.integers(count, size=(stop - start, count), dtype=np.int32)
        cells = chosen + count * np.arange(stop - start)[:, None]
        times = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape)
        drawn[start:stop] = times.astype(np.float64) @ sums
    if not count:
        return np.full((draws, len(Scores._fields)), np.nan)
    part = Sums(*drawn.T)
    ratios = (
        (part.iou, part.masks),
        (part.intersection, part.union),
        (part.targets_found, part.targets),
        (part.no_targets_found, part.no_targets),
    )
    return np.stack([np.where(b > 0, a / np.maximum(b, 1), np.nan) for a, b in ratios], axis=1)


def intervals(questions: Sequence[Sums], *, draws: int = DRAWS, seed: int = SEED) -> Intervals:
    """Percentile intervals of the scores over all questions."""
    found = scores(merge(*questions))
    return _intervals(found, resample(questions, draws=draws, seed=seed))


def paired_intervals(
    first: Sequence[Sums], second: Sequence[Sums], *, draws: int = DRAWS, seed: int = SEED
) -> Intervals:
    """Percentile intervals of scores of `second` less those of `first`, on the same questions.

    In each resample both runs get the same questions: what makes a question hard for both cancels.

    Raises:
        ValueError: the runs differ in their number of questions.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} questions against {len(second)}: pair them first")
    found = np.subtract(scores(merge(*second)), scores(merge(*first)))
    drawn = [resample(questions, draws=draws, seed=seed) for questions in (second, first)]
    return _intervals(Scores(*map(float, found)), drawn[0] - drawn[1])


def _in_units(question: Sums) -> tuple[float, ...]:
    """The sums, the IoU as a number. Integers below 2**53 are exact, and so are sums of them."""
    return tuple(
        value / IOU_UNIT if name == "iou" else float(value)
        for name, value in question._asdict().items()
    )


def _intervals(found: Scores, drawn: Float64[np.ndarray, "... 4"]) -> Intervals:
    return Intervals(*map(_interval, found, drawn.T))


def _interval(score: float, drawn: Float64[np.ndarray, "..."]) -> Interval:
    known = drawn[np.isfinite(drawn)]
    if not len(known) or not np.isfinite(score):
        return Interval(score, np.nan, np.nan, 0)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(score, float(low), float(high), len(known))
