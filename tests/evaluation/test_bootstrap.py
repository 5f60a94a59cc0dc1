"""The bootstrap against cases with a known answer, and against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from pixellm_jax.evaluation import bootstrap
from pixellm_jax.evaluation.bootstrap import intervals, paired_intervals, resample
from pixellm_jax.evaluation.metrics import IOU_UNIT, Sums, merge, scores


def question(iou: float, union: int = 100, **others: int) -> Sums:
    """A question of one mask."""
    counts = {"targets": 1, "targets_found": 1} | others
    return Sums(1, round(iou * IOU_UNIT), round(iou * union), union, **counts)


def mixed(count: int, seed: int = 0) -> list[Sums]:
    """Questions of one to three masks, some of them without a target."""
    random = np.random.default_rng(seed)
    return [
        merge(
            *(
                question(float(random.uniform()), int(random.integers(50, 3000)))
                for _ in range(random.integers(1, 4))
            ),
            Sums(no_targets=1, no_targets_found=int(random.integers(2))),
        )
        for _ in range(count)
    ]


def test_standard_error_of_a_mean_is_the_analytic_one():
    # Draws are 20,000: their standard deviation is known to 0.5 %, three times that is allowed.
    ious = np.random.default_rng(1).beta(2, 1, 307)
    drawn = resample([question(iou) for iou in ious], resamples=20_000)[:, 0]
    assert drawn.std() == pytest.approx(ious.std() / np.sqrt(307), rel=0.015)
    assert drawn.mean() == pytest.approx(ious.mean(), abs=1e-3)


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    # 400 experiments: 95 % of coverage has a standard error of 1.1 %. The percentile interval of 83
    # questions is known to be about 0.5 % short of it. Three standard errors are allowed.
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        found = intervals([question(iou) for iou in random.beta(2, 1, 83)], resamples=400).giou
        covered += found.low <= 2 / 3 <= found.high
    assert 0.91 <= covered / 400 <= 0.98


def test_a_sample_has_the_score_of_its_questions():
    questions = mixed(23)
    drawn = resample(questions, resamples=7, seed=5)
    samples = np.random.default_rng(5).integers(23, size=(7, 23), dtype=np.int32)
    for sample, row in zip(samples, drawn, strict=True):
        chosen = [questions[place] for place in sample]
        np.testing.assert_allclose(row, scores(merge(*chosen)), rtol=1e-12)


def test_blocks_change_nothing(monkeypatch):
    questions = mixed(29)
    whole = resample(questions, resamples=31)
    monkeypatch.setattr(bootstrap, "_BLOCK", 3 * 29)
    np.testing.assert_array_equal(resample(questions, resamples=31), whole)


def test_intervals_hold_the_score_and_repeat_themselves():
    questions = mixed(61)
    found = intervals(questions)
    assert [interval.score for interval in found] == list(scores(merge(*questions)))
    for interval in found[:2] + found[3:]:
        assert interval.low < interval.score < interval.high
        assert interval.resamples == bootstrap.RESAMPLES
    assert found.t_acc[:3] == (1, 1, 1)
    assert intervals(questions) == found
    assert intervals(questions, seed=1) != found


def test_more_questions_make_narrower_intervals():
    few, many = (intervals(mixed(count)).giou for count in (50, 800))
    # By the square root of 16, up to the spread of two samples.
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.25)


def test_pairs_are_narrower_than_two_runs_apart():
    """Two runs with the same hard questions, one better by 0.02 and a little noise."""
    random = np.random.default_rng(3)
    hard = random.uniform(0, 0.9, 211)
    first = [question(iou) for iou in hard]
    second = [question(iou + random.uniform(0, 0.04)) for iou in hard]
    pair = paired_intervals(first, second).giou
    truth = [b.iou - a.iou for a, b in zip(first, second, strict=True)]
    assert pair.score == pytest.approx(np.mean(truth) / IOU_UNIT, abs=1e-12)
    error = np.std(truth) / IOU_UNIT / np.sqrt(211)
    # Ends of 2,000 draws are known to about 5 % of the interval.
    assert pair.low == pytest.approx(pair.score - 1.96 * error, abs=0.2 * error)
    assert pair.high == pytest.approx(pair.score + 1.96 * error, abs=0.2 * error)
    alone = intervals(second).giou
    assert alone.high - alone.low > 5 * (pair.high - pair.low)


def test_a_run_does_not_differ_from_itself():
    questions = mixed(41)
    assert all(pair[:3] == (0, 0, 0) for pair in paired_intervals(questions, questions))


def test_swapped_runs_change_the_sign():
    first, second = mixed(37), mixed(37, seed=1)
    forth, back = paired_intervals(first, second), paired_intervals(second, first)
    for a, b in zip(forth, back, strict=True):
        np.testing.assert_allclose(a[:3], (-b.score, -b.high, -b.low), atol=1e-12)


def test_undefined_scores_stay_undefined():
    found = intervals([question(0.5)] * 3)
    assert np.isnan(found.n_acc[:3]).all() and found.n_acc.resamples == 0
    assert found.giou[:3] == (0.5, 0.5, 0.5)
    assert np.isnan([interval[:3] for interval in intervals([])]).all()


def test_a_score_that_a_sample_may_lack_says_so():
    rare = Sums(no_targets=1, no_targets_found=1)
    found = intervals([question(0.5)] * 4 + [rare]).n_acc
    assert found[:3] == (1, 1, 1)
    # The one question is left out by (4/5)**5 = 33 % of 2,000 samples, give or take 1 %.
    assert found.resamples / bootstrap.RESAMPLES == pytest.approx(1 - 0.8**5, abs=0.04)


def test_runs_of_different_length_are_refused():
    with pytest.raises(ValueError, match="3 questions against 4"):
        paired_intervals(mixed(3), mixed(4))
