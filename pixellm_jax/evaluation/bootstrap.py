"""Bootstrap confidence intervals over questions, for scores and for differences of two runs.

A question is resampled as a whole, because its masks are not independent of each other (Efron and
Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13). Its `metrics.Sums` are resampled,
and scores are computed from their totals: cIoU is a ratio of sums, not a mean over questions, and
two runs must share their resamples, which is why the code is ours. Questions about the same image
are treated as independent; where an image has many, the intervals are somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from pixellm_jax.evaluation.metrics import IOU_UNIT, Scores, Sums, merge, scores

RESAMPLES = 2000
"""Number of resamples; about 50 of them lie beyond each end of a 95 % interval."""

SEED = 0

LEVEL = 0.95
"""Confidence level."""

_BLOCK = 2**21
"""Size of a block in resamples x questions: at most 16 MiB per array, or one resample."""


class Interval(NamedTuple):
    """A score, or a difference of two, with its confidence interval; NaN where it is undefined.

    resamples: number of resamples in which the score was defined.
    """

    score: float
    low: float
    high: float
    resamples: int


class Intervals(NamedTuple):
    """Interval of each score of `metrics.Scores`."""

    giou: Interval
    ciou: Interval
    t_acc: Interval
    n_acc: Interval


def resample(
    questions: Sequence[Sums], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Float64[np.ndarray, "{resamples} 4"]:
    """Draw questions with replacement and return the scores (`metrics.Scores`) of each sample.

    A score is NaN where its denominator is zero. The same seed and number of questions give the
    same samples, so that two runs can be paired.
    """
    if not questions:
        return np.full((resamples, len(Scores._fields)), np.nan)
    sums = np.array([_in_units(question) for question in questions], np.float64)
    count = len(questions)
    samples = np.empty((resamples, len(Sums._fields)))
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        stop = min(resamples, start + block)
        chosen = rng.integers(count, size=(stop - start, count), dtype=np.int32)
        # Each resample has a range of its own, so that one bincount counts them all.
        cells = chosen + count * np.arange(stop - start)[:, None]
        multiplicity = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape)
        samples[start:stop] = multiplicity.astype(np.float64) @ sums
    part = Sums(*samples.T)
    ratios = (
        (part.iou, part.masks),
        (part.intersection, part.union),
        (part.targets_found, part.targets),
        (part.no_targets_found, part.no_targets),
    )
    return np.stack([np.where(b > 0, a / np.maximum(b, 1), np.nan) for a, b in ratios], axis=1)


def intervals(
    questions: Sequence[Sums], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Intervals:
    """Return the scores over all questions with their percentile intervals."""
    actual = scores(merge(*questions))
    return _intervals(actual, resample(questions, resamples=resamples, seed=seed))


def paired_intervals(
    first: Sequence[Sums], second: Sequence[Sums], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Intervals:
    """Return percentile intervals of the scores of `second` minus the scores of `first`.

    Each resample selects the same questions in both runs, so that difficulty common to both runs
    cancels.

    Raises:
        ValueError: the runs have different numbers of questions.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} questions against {len(second)}: pair them first")
    difference = np.subtract(scores(merge(*second)), scores(merge(*first)))
    samples = [resample(questions, resamples=resamples, seed=seed) for questions in (second, first)]
    return _intervals(Scores(*map(float, difference)), samples[0] - samples[1])


def _in_units(question: Sums) -> tuple[float, ...]:
    """Convert sums to floats, the fixed-point IoU included; integers below 2**53 stay exact."""
    return tuple(
        value / IOU_UNIT if name == "iou" else float(value)
        for name, value in question._asdict().items()
    )


def _intervals(actual: Scores, samples: Float64[np.ndarray, "... 4"]) -> Intervals:
    return Intervals(*map(_interval, actual, samples.T))


def _interval(score: float, samples: Float64[np.ndarray, "..."]) -> Interval:
    defined = samples[np.isfinite(samples)]
    if not len(defined) or not np.isfinite(score):
        return Interval(score, np.nan, np.nan, 0)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(score, float(low), float(high), len(defined))
