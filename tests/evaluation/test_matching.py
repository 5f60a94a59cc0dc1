"""Matching: by hand, against every assignment there is, and in any order."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from pixellm_jax.evaluation.matching import (
    GRID,
    UNMATCHED,
    Costs,
    assign,
    costs,
    match,
    measure_pairs,
    sample,
    tally_question,
)
from pixellm_jax.evaluation.metrics import IOU_UNIT, Sums, scores
from pixellm_jax.images.geometry import VOID

# Means over a few dozen points in float64.
TOLERANCE = 1e-12

Y, X = 11, 7


def draw(seed: int, predictions: int, targets: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((predictions, Y, X)).astype(np.float32)
    truth = rng.choice([0, 1, VOID], (targets, Y, X), p=[0.6, 0.3, 0.1]).astype(np.uint8)
    return logits, truth


def logits_of(truth: np.ndarray, size: float = 8.0) -> np.ndarray:
    return np.where(truth == 1, size, -size).astype(np.float32)


def by_loop(logits: np.ndarray, truth: np.ndarray) -> Costs:
    """One pair at a time."""
    bce, dice = np.zeros((2, len(logits), len(truth)))
    for m, j in np.ndindex(bce.shape):
        known = truth[j] != VOID
        t, p = truth[j][known], 1 / (1 + np.exp(-logits[m][known].astype(np.float64)))
        bce[m, j] = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
        dice[m, j] = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    return Costs(bce, dice)


def test_costs_on_paper():
    # sigmoid(ln 3) = 3/4; the third pixel is void for one target.
    logits = np.log(3) * np.asarray([[[1, -1, 1]]], np.float32)
    truth = np.asarray([[[1, 0, VOID]], [[0, 0, 0]]], np.uint8)
    found = costs(logits, truth)
    right, wrong = np.log(4 / 3), np.log(4)
    np.testing.assert_allclose(found.bce, [[right, (2 * wrong + right) / 3]], rtol=1e-7)
    np.testing.assert_allclose(found.dice, [[1 - 2.5 / 3, 1 - 1 / 2.75]], rtol=1e-7)


def test_values_above_one_are_inside():
    logits, truth = draw(9, 2, 3)
    twice = np.where(truth == 1, 2, truth).astype(np.uint8)
    np.testing.assert_array_equal(costs(logits, twice), costs(logits, truth))


def test_costs_are_those_of_the_loop():
    for found, wanted in zip(costs(*draw(0, 3, 5)), by_loop(*draw(0, 3, 5)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=TOLERANCE)


@pytest.mark.parametrize(("predictions", "targets"), [(4, 4), (2, 5), (5, 2)])
def test_no_assignment_is_cheaper(predictions, targets):
    total = sum(costs(*draw(1, predictions, targets)))
    pairs = match(*draw(1, predictions, targets))
    matched = pairs[(pairs != UNMATCHED).all(axis=1)]
    assert len(matched) == min(predictions, targets)
    table = total if predictions <= targets else total.T
    rows = np.arange(len(table))
    cheapest = min(
        table[rows, list(columns)].sum()
        for columns in permutations(range(table.shape[1]), len(table))
    )
    assert total[tuple(matched.T)].sum() == pytest.approx(cheapest, rel=TOLERANCE)


def test_leftovers_come_last():
    total = np.asarray([[9.0, 1.0], [9.0, 9.0], [2.0, 9.0]])
    pairs = assign(Costs(total, 0 * total))
    np.testing.assert_array_equal(pairs, [[0, 1], [2, 0], [1, UNMATCHED]])
    pairs = assign(Costs(total.T, 0 * total.T))
    np.testing.assert_array_equal(pairs, [[0, 2], [1, 0], [UNMATCHED, 1]])


@pytest.mark.parametrize(("predictions", "targets"), [(0, 0), (3, 0), (0, 2)])
def test_one_side_may_be_empty(predictions, targets):
    logits, truth = draw(2, predictions, targets)
    pairs = match(logits, truth)
    wanted = [[UNMATCHED, j] for j in range(targets)] + [[m, UNMATCHED] for m in range(predictions)]
    np.testing.assert_array_equal(pairs, np.asarray(wanted, np.int64).reshape(-1, 2))
    found = tally_question(logits, truth)
    inside, outside = (logits > 0).sum(), (truth == 1).sum()
    assert found == Sums(masks=predictions + targets, union=int(inside + outside), targets=targets)


def test_logits_that_are_not_finite_are_refused():
    logits, truth = draw(3, 2, 2)
    logits[1, 5, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        match(logits, truth)


# Scores


def test_perfect_predictions_in_any_order_score_exactly_one():
    _, truth = draw(4, 0, 5)
    order = np.random.default_rng(4).permutation(5)
    found = tally_question(logits_of(truth)[order], truth)
    assert scores(found)[:3] == (1.0, 1.0, 1.0)
    pairs = match(logits_of(truth)[order], truth)
    np.testing.assert_array_equal(order[pairs[:, 0]], pairs[:, 1])


@pytest.mark.parametrize(("predictions", "targets"), [(5, 5), (3, 5), (5, 3)])
def test_order_of_predictions_and_targets_changes_no_bit(predictions, targets):
    rng = np.random.default_rng(5)
    logits, truth = draw(5, predictions, targets)
    wanted = tally_question(logits, truth)
    for _ in range(5):
        shuffled = rng.permutation(logits), rng.permutation(truth)
        assert tally_question(*shuffled) == wanted


def test_missed_and_extra_on_paper():
    truth = np.zeros((1, Y, X), np.uint8)
    truth[0, :2] = 1
    perfect = logits_of(truth)
    other = np.full((1, Y, X), -9, np.float32)
    other[0, 5, :3] = 1
    extra = tally_question(np.concatenate([other, perfect]), truth)
    assert extra == Sums(2, IOU_UNIT, 2 * X, 2 * X + 3, targets=1, targets_found=1)
    both = np.concatenate([truth, (other > 0).astype(np.uint8)])
    missed = tally_question(perfect, both)
    assert missed == Sums(2, IOU_UNIT, 2 * X, 2 * X + 3, targets=2, targets_found=1)


def test_silence_about_nothing_is_right_and_empty_extra_masks_are_not():
    nothing = np.zeros((1, Y, X), np.uint8)
    silent = tally_question(np.zeros((0, Y, X), np.float32), nothing)
    assert silent == Sums(1, IOU_UNIT, no_targets=1, no_targets_found=1)
    chatty = tally_question(np.full((3, Y, X), -1, np.float32), nothing)
    assert chatty == Sums(3, IOU_UNIT, no_targets=1, no_targets_found=1)


def test_areas_of_pairs():
    logits, truth = draw(6, 2, 2)
    pairs = np.asarray([[1, 0], [UNMATCHED, 1], [0, UNMATCHED]])
    found = measure_pairs(logits > 0, truth, pairs)
    inside, known = logits > 0, truth != VOID
    np.testing.assert_array_equal(
        found,
        [
            [(inside[1] & (truth[0] == 1)).sum(), 0, 0],
            [(inside[1] & known[0]).sum(), 0, inside[0].sum()],
            [(truth[0] == 1).sum(), (truth[1] == 1).sum(), 0],
        ],
    )


# The grid


def test_small_pictures_are_taken_whole():
    rng = np.random.default_rng(7)
    masks = rng.random((2, GRID, 5))
    np.testing.assert_array_equal(sample(masks), masks)


def test_large_pictures_are_sampled_at_the_centres_of_cells():
    rows, columns = np.meshgrid(np.arange(20), np.arange(35), indexing="ij")
    grid = sample(np.stack([rows, columns]), side=10)
    assert grid.shape == (2, 10, 10)
    np.testing.assert_array_equal(grid[0, :, 0], np.arange(10) * 2 + 1)
    # Cells of 3.5 pixels: centres at 1.75, 5.25, 8.75, ...
    np.testing.assert_array_equal(grid[1, 0], [1, 5, 8, 12, 15, 19, 22, 26, 29, 33])


def test_the_grid_finds_the_pairs_of_all_pixels():
    rng = np.random.default_rng(8)
    truth = np.zeros((4, 3 * GRID, 4 * GRID), np.uint8)
    for j in range(4):
        y, x = rng.integers(0, 2 * GRID, 2)
        truth[j, y : y + 60 + 9 * j, x : x + 80] = 1
    logits = logits_of(truth, 2.0) + rng.standard_normal(truth.shape).astype(np.float32)
    logits = logits[[2, 0, 3, 1]]
    np.testing.assert_array_equal(match(logits, truth), assign(costs(logits, truth)))
