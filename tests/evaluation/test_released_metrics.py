"""The released scores by hand: each fault that they are kept for."""

from __future__ import annotations

import numpy as np
import pytest

from pixellm_jax.evaluation.released_metrics import (
    ReleasedSums,
    TargetMasks,
    merge,
    released_scores,
    tally_generated,
    tally_teacher_forced,
)
from pixellm_jax.images.geometry import VOID


def test_denominators_are_a_little_larger():
    logits = np.asarray([[[1, 1, -1, 0, 1]]], np.float32)
    truth = np.asarray([[[1, 0, 1, 0, VOID]]], np.uint8)
    found = tally_teacher_forced(logits, truth)
    assert found == (1 / (3 + 1e-5), 1, 3, 1)
    assert released_scores(found) == (found.iou / (1 + 1e-5), 1 / (3 + 1e-10))


def test_values_above_one_are_lost():
    found = tally_teacher_forced(
        np.ones((1, 1, 3), np.float32), np.asarray([[[1, 2, 2]]], np.uint8)
    )
    assert found[1:] == (1, 3, 1)
    found = tally_teacher_forced(-np.ones((1, 1, 3), np.float32), np.full((1, 1, 3), 2, np.uint8))
    assert found == (1.0, 0, 0, 1)


@pytest.mark.parametrize(("logit", "union"), [(9, 0), (1, 4), (0.5, 4), (0.4, 0), (-9, 0)])
def test_extra_predictions_are_compared_by_their_logits(logit, union):
    question = TargetMasks(np.full((1, 2, 2), logit, np.float32), np.zeros((0, 2, 2), np.uint8))
    assert tally_generated([question]) == (float(union == 0), 0, union, 1)


def test_weight_is_less_than_the_number_of_pairs():
    mask = np.ones((1, 2, 2), np.uint8)
    extra = TargetMasks(np.full((1, 2, 2), 9, np.float32), mask[:0])
    missed = TargetMasks(np.zeros((0, 2, 2), np.float32), mask)
    assert tally_generated([extra, missed]) == (1.0, 0, 4, 1)
    assert tally_generated([]) == merge() == ReleasedSums()
