"""Real photos with real masks can be learned by heart: nothing between file and mask is lost."""

from __future__ import annotations

import json

import pytest

from pixellm_jax.training.log import METRICS
from tests.support.photo_training import answer_photos, learn_photos


def curve(run, name):
    records = [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]
    return [record[name] for record in records if name in record]


@pytest.mark.slow
def test_four_photos_are_begun(data_root, tmp_path):
    """The short form of the next: the losses fall, and masks begin to fit."""
    learn_photos(data_root, tmp_path, photos=4, steps=24, evaluate_every=24)
    losses = curve(tmp_path, "loss/total")
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.long
def test_sixteen_photos_are_learned_by_heart(data_root, tmp_path):
    learn_photos(data_root, tmp_path, photos=16, steps=800, evaluate_every=50)
    assert curve(tmp_path, "validation/giou")[-1] >= 0.9
    assert answer_photos(data_root, tmp_path, photos=16).giou >= 0.8
