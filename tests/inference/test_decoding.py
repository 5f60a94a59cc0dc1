"""Device functions: decoding updates the cache in place and writes only new positions."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixellm_jax.inference import decoding
from pixellm_jax.inference.decoding import FREE, RUNNING, DecodeState
from pixellm_jax.inference.prepare import prepare_for_inference
from pixellm_jax.inference.sampling import Sampling

ROWS, CAPACITY, ROOM = 3, 256, 8


@pytest.fixture(scope="module")
def model(varied):
    return prepare_for_inference(varied.model)


def drawn(model, seed: int) -> DecodeState:
    """A state in the middle of decoding, with noise in the cache."""
    draw, config = np.random.default_rng(seed), model.config.language
    cache = jax.tree.map(
        lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape, np.float32)),
        model.language_model.empty_cache(ROWS, CAPACITY, jnp.dtype("float32")),
    )
    said = jnp.asarray([2, 3, 1])
    return DecodeState(
        cache=cache,
        valid=jnp.ones((ROWS, CAPACITY), bool),
        prompt_length=jnp.asarray([90, 17, 101]),
        max_new_tokens=jnp.full(ROWS, ROOM),
        sampling=Sampling(
            jnp.zeros(ROWS, jnp.uint32), jnp.zeros(ROWS, jnp.float32), jnp.ones(ROWS, jnp.float32)
        ),
        tokens=jnp.asarray(draw.integers(3, 400, (ROWS, ROOM)), jnp.int32),
        states=jnp.zeros((ROWS, ROOM, config.width)),
        token_prob=jnp.ones((ROWS, ROOM)),
        num_generated=said,
        num_cached=said - 1,
        num_steps=jnp.ones(ROWS, jnp.int32),
        status=jnp.asarray([RUNNING, RUNNING, FREE]),
    )


def copied(rows: DecodeState) -> DecodeState:
    return jax.tree.map(jnp.array, rows)


@pytest.mark.parametrize("jump_forward", [False, True])
def test_a_step_copies_neither_cache_nor_weights(model, varied, jump_forward):
    """The cache is updated in place: a step needs far less extra memory than a copy of it."""
    group = varied.vocabulary.group if jump_forward else ()
    rows = drawn(model, 0)
    compiled = decoding.decode.lower(
        model.language_model,
        rows,
        np.int32(4),
        np.int32(1),
        stop=varied.vocabulary.eos,
        group=group,
    ).compile()
    memory = compiled.memory_analysis()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(rows.cache))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 2
    # Nor is a weight copied, which slices of stacked layers would be.
    shapes = {leaf.shape for leaf in jax.tree.leaves(model.language_model.layers) if leaf.ndim > 1}
    made = re.findall(r"= f32\[([\d,]+)\]\S* (\S+)\(", compiled.as_text())
    moved = [
        (shape, operation)
        for shape, operation in made
        if tuple(map(int, shape.split(","))) in shapes
        and operation in ("copy", "transpose", "dynamic-slice", "slice", "fusion")
    ]
    assert moved == []
    assert any(operation in ("dot", "fusion", "custom-call") for _, operation in made)


def test_a_step_writes_only_new_positions_of_running_rows(model, varied):
    before = drawn(model, 1)
    after, passes = decoding.decode(
        model.language_model, copied(before), np.int32(1), stop=-1, group=()
    )
    assert int(passes) == 1
    assert after.num_generated.tolist() == [3, 4, 1] and after.num_cached.tolist() == [2, 3, 0]
    assert after.num_steps.tolist() == [2, 2, 1]
    for old, new in zip(jax.tree.leaves(before.cache), jax.tree.leaves(after.cache), strict=True):
        changed = (np.asarray(old) != np.asarray(new)).any(axis=(1, 3))
        assert [np.flatnonzero(row).tolist() for row in changed] == [[91], [19], []]
    for name in ("tokens", "states", "token_prob"):
        old, new = (np.asarray(getattr(rows, name)) for rows in (before, after))
        changed = (old != new).reshape(ROWS, ROOM, -1).any(axis=2)
        assert [np.flatnonzero(row).tolist() for row in changed] in ([[2], [3], []], [[], [3], []])


def test_insert_overwrites_the_whole_row(model):
    """Nothing of the old row, which may be NaN, is left behind the new one."""
    old = drawn(model, 2)
    old = old._replace(cache=jax.tree.map(lambda leaf: leaf * jnp.nan, old.cache))
    fresh = decoding.resize(drawn(model, 3), np.asarray([1, 0]), capacity=128)
    found = decoding.insert(copied(old), fresh, np.asarray([2, ROWS]))  # the second goes nowhere
    for leaf, new in zip(jax.tree.leaves(found.cache), jax.tree.leaves(fresh.cache), strict=True):
        np.testing.assert_array_equal(leaf[2, :, :128], new[0])
        assert not np.asarray(leaf)[2, :, 128:].any()
        assert np.isnan(np.asarray(leaf)[:2]).all()
    assert found.status.tolist() == [RUNNING, RUNNING, RUNNING]
    assert found.prompt_length.tolist() == [90, 17, 17]


def test_resize_keeps_chosen_rows_and_frees_the_others(model):
    rows = drawn(model, 4)
    found = decoding.resize(rows, np.asarray([1, 7, 0]), capacity=384)
    assert found.status.tolist() == [RUNNING, FREE, RUNNING]
    assert found.valid.shape == (3, 384) and np.asarray(found.valid).all()
    for leaf, old in zip(jax.tree.leaves(found.cache), jax.tree.leaves(rows.cache), strict=True):
        np.testing.assert_array_equal(leaf[0, :, :CAPACITY], old[1])
        np.testing.assert_array_equal(leaf[2, :, :CAPACITY], old[0])
        assert not np.asarray(leaf)[:, :, CAPACITY:].any()
    assert decoding.resize(rows, np.asarray([0]), capacity=128).valid.shape == (1, 128)


def test_decoding_returns_when_a_cache_is_full_or_too_few_rows_run(model, varied):
    rows = drawn(model, 5)._replace(max_new_tokens=jnp.asarray([8, 4, 8]))
    stop = {"stop": -1, "group": ()}
    full = copied(rows)._replace(prompt_length=jnp.asarray([CAPACITY - 3, 17, 101]))
    found, passes = decoding.decode(model.language_model, full, np.int32(9), **stop)
    assert int(passes) == 2 and found.num_cached.tolist() == [3, 3, 0]
    assert found.status[0] == RUNNING
    found, passes = decoding.decode(
        model.language_model, copied(rows), np.int32(9), np.int32(2), **stop
    )
    assert int(passes) == 1  # the second row is at its budget
    found, passes = decoding.decode(model.language_model, copied(rows), np.int32(9), **stop)
    assert int(passes) == 6 and found.num_generated.tolist() == [8, 4, 1]
    found, passes = decoding.decode(model.language_model, found, np.int32(9), **stop)
    assert int(passes) == 0
