"""Scores: by hand, in any order and any parts, and what is void or not valid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixellm_jax.evaluation import metrics
from pixellm_jax.evaluation.metrics import (
    IOU_UNIT,
    Areas,
    Scores,
    Sums,
    measure,
    merge,
    merge_hosts,
    scores,
    tally,
)
from pixellm_jax.images.geometry import VOID

# Each IoU is rounded once to 2^-40; float64 beside it.
TOLERANCE = 1e-12

M, Y, X = 29, 7, 5


@pytest.fixture(scope="module")
def masks() -> tuple[np.ndarray, np.ndarray]:
    """Predictions and truths; some of either are empty, some pixels void, some values above 1."""
    rng = np.random.default_rng(0)
    inside = rng.random((M, Y, X)) < rng.choice([0, 0.3, 0.8], (M, 1, 1))
    truth = rng.choice([0, 1, 2, VOID], (M, Y, X), p=[0.5, 0.2, 0.1, 0.2]).astype(np.uint8)
    truth[rng.random(M) < 0.3] = 0
    return inside, truth


def by_loop(inside: np.ndarray, truth: np.ndarray) -> Scores:
    ious, both, either, present, absent = [], 0, 0, [], []
    for p, t in zip(inside, truth, strict=True):
        p, t = p[t != VOID], t[t != VOID] > 0
        both, either = both + (p & t).sum(), either + (p | t).sum()
        ious.append((p & t).sum() / (p | t).sum() if (p | t).any() else 1.0)
        (present if t.any() else absent).append(p.any() == t.any())
    return Scores(np.mean(ious), both / either, np.mean(present), np.mean(absent))


def test_on_paper():
    inside = np.asarray([[[1, 1, 0, 1]], [[0, 0, 0, 0]], [[0, 1, 0, 0]], [[0, 0, 0, 0]]], bool)
    truth = np.asarray(
        [[[1, 0, 2, VOID]], [[0, 0, 0, 0]], [[0, 0, 0, VOID]], [[0, 1, 1, 0]]], np.uint8
    )
    areas = measure(inside, truth)
    np.testing.assert_array_equal(areas, [[1, 0, 0, 0], [2, 0, 1, 0], [2, 0, 0, 2]])
    found = tally(areas)
    assert found.iou == pytest.approx((1 / 3 + 1) * IOU_UNIT, abs=1)
    assert found == (4, found.iou, 1, 6, 2, 1, 2, 1)
    assert scores(found) == pytest.approx(((1 / 3 + 1) / 4, 1 / 6, 1 / 2, 1 / 2), abs=TOLERANCE)


def test_scores_are_those_of_the_loop(masks):
    wanted = by_loop(*masks)
    assert min(wanted) > 0 and max(wanted) < 1
    assert scores(tally(measure(*masks))) == pytest.approx(wanted, abs=TOLERANCE)


def test_perfect_predictions_score_exactly_one(masks):
    _, truth = masks
    found = tally(measure((truth != 0) & (truth != VOID), truth))
    assert found.no_targets and found.targets
    assert scores(found) == (1.0, 1.0, 1.0, 1.0)


def test_nothing_has_no_score():
    for nothing in (
        Sums(),
        merge(),
        tally(measure(np.zeros((0, Y, X), bool), np.zeros((0, Y, X), np.uint8))),
    ):
        assert nothing == Sums(*[0] * 8)
        assert np.isnan(scores(nothing)).all()


def test_right_silence_alone_has_no_ciou():
    found = scores(tally(measure(np.zeros((2, Y, X), bool), np.zeros((2, Y, X), np.uint8))))
    assert (found.giou, found.n_acc) == (1.0, 1.0)
    assert np.isnan((found.ciou, found.t_acc)).all()


def test_an_extra_prediction_scores_zero_even_if_empty():
    inside = np.stack([np.zeros((Y, X), bool), np.ones((Y, X), bool)])
    extra = np.ones(2, bool)
    found = tally(measure(inside, np.zeros((2, Y, X), np.uint8)), extra=extra)
    assert found == Sums(masks=2, union=Y * X)


def test_order_changes_no_bit(masks):
    areas = measure(*masks)
    order = np.random.default_rng(1).permutation(M)
    assert tally(Areas(*(area[order] for area in areas))) == tally(areas)


@pytest.mark.parametrize("parts", [1, 2, 8, M + 3])
def test_parts_in_any_order_are_the_whole(masks, parts):
    cuts = np.array_split(np.random.default_rng(2).permutation(M), parts)
    sums = [tally(measure(*(side[cut] for side in masks))) for cut in cuts]
    assert merge(*sums) == tally(measure(*masks))
    assert merge(merge(*sums[::2]), merge(*sums[1::2])) == merge(*sums)


def test_invalid_slots_take_no_part(masks):
    inside, truth = masks
    valid = np.random.default_rng(3).random(M) < 0.5
    areas = measure(inside, truth)
    wanted = tally(measure(inside[valid], truth[valid]))
    garbage = Areas(*(np.where(valid, area, -77 - row) for row, area in enumerate(areas)))
    assert tally(garbage, valid=valid) == wanted
    table = Areas(*(area.reshape(1, M, 1) for area in garbage))
    assert tally(table, valid=valid.reshape(1, M, 1)) == wanted


def test_void_pixels_take_no_part(masks):
    inside, truth = masks
    changed = np.where(truth == VOID, ~inside, inside)
    assert (changed != inside).any()
    np.testing.assert_array_equal(measure(changed, truth), measure(inside, truth))


def test_the_device_counts_the_same(masks):
    inside, truth = masks
    found = jax.jit(measure)(jnp.asarray(inside), jnp.asarray(truth))
    assert tally(found) == tally(measure(inside, truth))


def test_sums_are_exact_beyond_the_integers_of_floats():
    side = 2**30 + 1  # pixels
    areas = Areas(*(np.full(3, side) for _ in range(3)))
    many = tally(areas)
    for _ in range(23):
        many = merge(many, many)
    many = merge(many, Sums(1, 1, 1, 1))
    assert many.union == 3 * side * 2**23 + 1 > 2**53
    assert many.iou == 3 * 2**63 + 1


# Hosts


def test_one_host_is_all_hosts():
    own = Sums(3, 2**41 + 5, 7, 2**33 + 11, 13, 0, 17, 2**62)
    assert merge_hosts(own) == own


def test_hosts_add_up(monkeypatch):
    own, other = Sums(3, 2**41 + 5, 2**32 - 1, 11, 13, 0, 17, 19), Sums(*range(2**40, 2**40 + 8))
    there = np.asarray(other, np.int64).view(np.uint32)

    def gather(words: np.ndarray) -> np.ndarray:
        assert words.dtype == np.uint32  # a jax array would cut 64 bits
        return np.stack([words, there])

    monkeypatch.setattr(metrics.multihost_utils, "process_allgather", gather)
    assert merge_hosts(own) == merge(own, other)
