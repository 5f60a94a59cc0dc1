"""Token sampling: by hand, by frequency, and by row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixellm_jax.inference.sampling import Sampling, nucleus, sample_tokens

CHANCES = np.asarray([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)


def sampling(rows: int, temperature: float, top_p: float = 1.0) -> Sampling:
    return Sampling(
        np.arange(rows, dtype=np.uint32),
        np.full(rows, temperature, np.float32),
        np.full(rows, top_p, np.float32),
    )


def logits(rows: int) -> np.ndarray:
    return np.broadcast_to(np.log(CHANCES), (rows, len(CHANCES)))


def numbers(rows: int, number: int = 0) -> np.ndarray:
    return np.full(rows, number, np.int32)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.0, [1]),
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (1.0, range(5)),
    ],
)
def test_nucleus_by_hand(top_p, kept):
    found = nucleus(jnp.asarray(logits(1)), jnp.asarray([top_p], jnp.float32))
    assert np.flatnonzero(found[0]).tolist() == list(kept)


def test_equally_likely_tokens_stay_together():
    found = nucleus(jnp.zeros((1, 4)), jnp.asarray([0.3]))
    assert np.asarray(found).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.71)])
def test_frequencies_are_the_probabilities(temperature, top_p):
    rows = 4000
    found = jax.jit(sample_tokens)(logits(rows), sampling(rows, temperature, top_p), numbers(rows))
    wanted = CHANCES ** (1 / temperature)
    wanted = np.where(np.isin(np.arange(5), [1, 3, 4]) | (top_p == 1), wanted, 0)
    wanted /= wanted.sum()
    frequency = np.bincount(np.asarray(found), minlength=5) / rows
    # Four standard deviations of a frequency of at most one half.
    np.testing.assert_allclose(frequency, wanted, atol=4 * 0.5 / np.sqrt(rows))
    assert (frequency[wanted == 0] == 0).all()


def test_sampling_depends_on_seed_and_index_in_any_batch():
    rows = 200
    drawn = [
        jax.jit(sample_tokens)(logits(rows), sampling(rows, 1.0), numbers(rows, i)) for i in (0, 1)
    ]
    assert (np.asarray(drawn[0]) != np.asarray(drawn[1])).mean() > 0.3
    mixed = sampling(rows, 1.0)._replace(temperature=np.arange(rows) % 2 * np.float32(1))
    found = np.asarray(jax.jit(sample_tokens)(logits(rows)[::-1], mixed, numbers(rows)))
    np.testing.assert_array_equal(found[1::2], np.asarray(drawn[0])[1::2])
    assert (found[::2] == 1).all()  # temperature 0: the most likely
