"""Losses: on paper, against a loop in float64, and what takes no part."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pixellm_jax.batch import Batch, Prediction
from pixellm_jax.images.geometry import VOID
from pixellm_jax.model.layers import resize_bilinear
from pixellm_jax.training.config import LossConfig
from pixellm_jax.training.losses import Counts, Losses, count, losses, mask_sums, overlap, text_sum

# Float32 means over a few hundred terms of order one, against float64.
TOLERANCE = 1e-5
# Central differences of the float64 loop with a step of 1e-5: the slope's own error is 1e-9.
SLOPE = 1e-5

B, T, V, M, Y = 3, 11, 17, 5, 7

RELEASED = LossConfig(alpha=1.0)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def batch_of(**fields: np.ndarray) -> Batch:
    """The losses read six fields; the others are absent, so that a use of them is an error."""
    if "tokens" in fields:
        fields = {"segment": np.zeros_like(fields["tokens"]), **fields}
    if "target_valid" in fields:
        one = np.ones(fields["target_valid"].shape, np.int32)
        fields = {"target_conversation": one, **fields}
    return Batch(**{name: fields.get(name) for name in Batch._fields})


def prediction_of(text: np.ndarray, masks: np.ndarray) -> Prediction:
    hidden = jnp.zeros((*text.shape[:2], 1))
    return Prediction(hidden, jnp.asarray(text), jnp.asarray(masks))


class Case(NamedTuple):
    text: np.ndarray
    masks: np.ndarray
    batch: Batch


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    tokens[:, 1:4] = -200
    loss_mask = rng.random((B, T)) < 0.4
    loss_mask[:, :5] = False
    loss_mask[2, 5:] = True
    masks = rng.choice([0, 1, VOID], (B, M, Y, Y), p=[0.5, 0.3, 0.2]).astype(np.uint8)
    valid = np.asarray([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
    batch = batch_of(
        tokens=tokens,
        loss_mask=loss_mask,
        masks=masks,
        target_valid=valid,
        target_conversation=np.asarray([[1, 1, 0, 0, 0], [0] * M, [1, 2, 1, 1, 2]], np.int32),
    )
    return Case(draw(1, B, T, V), 3 * draw(2, B, M, Y, Y), batch)


@partial(jax.jit, static_argnames="config")
def evaluate(
    text: jax.Array, masks: jax.Array, batch: Batch, counts: Counts, config: LossConfig
) -> tuple[Losses, tuple]:
    def total(text: jax.Array, masks: jax.Array) -> tuple[jax.Array, Losses]:
        terms = losses(prediction_of(text, masks), batch, config, counts)
        return terms.total, terms

    gradient, terms = jax.grad(total, argnums=(0, 1), has_aux=True)(text, masks)
    return terms, gradient


def run(
    text: np.ndarray,
    masks: np.ndarray,
    batch: Batch,
    config: LossConfig = LossConfig(),  # noqa: B008
    counts: Counts | None = None,
) -> tuple[Losses, tuple]:
    counts = count(batch) if counts is None else counts
    found = evaluate(jnp.asarray(text), jnp.asarray(masks), batch, counts, config)
    return jax.tree.map(np.asarray, found)


@pytest.fixture(scope="module")
def result(case) -> tuple[Losses, tuple]:
    return run(*case)


def by_loop(text: np.ndarray, masks: np.ndarray, batch: Batch, alpha: float = 2.0) -> Losses:
    """The formulas of the paper and of docs/reference_notes.md 4.2 in float64, one by one."""
    text, masks = text.astype(np.float64), masks.astype(np.float64)
    entropies = []
    for row, at in zip(*np.nonzero(batch.loss_mask), strict=True):
        before = text[row, at - 1]
        entropies.append(np.log(np.exp(before).sum()) - before[batch.tokens[row, at]])
    bces, dices = [], []
    for row, slot in zip(*np.nonzero(batch.target_valid), strict=True):
        known = batch.masks[row, slot] != VOID
        t = batch.masks[row, slot][known].astype(np.float64)
        p = 1 / (1 + np.exp(-masks[row, slot][known]))
        weight = np.where(crowded(masks, batch, row, slot)[known], alpha, 1)
        bces.append(-(weight * (t * np.log(p) + (1 - t) * np.log(1 - p))).mean())
        both = 2 * (p * t).sum() / 1000 + 1e-6
        dices.append(1 - both / (p.sum() / 1000 + t.sum() / 1000 + 1e-6))
    terms = np.mean(entropies), 2 * np.mean(bces), 0.5 * np.mean(dices)
    return Losses(sum(terms), *terms)


def crowded(masks: np.ndarray, batch: Batch, row: int, slot: int) -> np.ndarray:
    """Pixels that at least two predictions of the slot's question claim."""
    claims = np.zeros(masks.shape[2:], int)
    for other in range(masks.shape[1]):
        same = batch.target_conversation[row, other] == batch.target_conversation[row, slot]
        if same and batch.target_valid[row, other]:
            claims += masks[row, other] > 0
    return claims >= 2


# By hand


def test_masks_on_paper():
    # sigmoid(ln 3) = 3/4. BCE: ln 4/3, ln 4, ln 2; the fourth pixel is void.
    logits = np.asarray([[np.log(3), np.log(3)], [0, 77]], np.float32)[None, None]
    masks = np.asarray([[1, 0], [1, VOID]], np.uint8)[None, None]
    batch = batch_of(masks=masks, target_valid=np.ones((1, 1), bool))
    bce, dice = mask_sums(jnp.asarray(logits), batch, 2.0)
    assert bce == pytest.approx(np.log(4 / 3 * 4 * 2) / 3, rel=TOLERANCE)
    # p: 3/4, 3/4, 1/2; t: 1, 0, 1.
    wanted = 1 - (2 * 1.25 / 1000 + 1e-6) / (2 / 1000 + 2 / 1000 + 1e-6)
    assert dice == pytest.approx(wanted, rel=TOLERANCE)


def test_text_on_paper():
    # Three ids; the state before gives the right one the odds 2 : 1 : 1, and 1 : 1 : 1.
    logits = np.zeros((1, 4, 3), np.float32)
    logits[0, 1, 2] = np.log(2)
    logits[0, 3] = 77, -77, 0  # nothing comes after the last position
    tokens, loss_mask = np.asarray([[0, 1, 2, 1]], np.int32), np.asarray([[0, 0, 1, 1]], bool)
    masks, valid = np.zeros((1, 1, 2, 2), np.uint8), np.zeros((1, 1), bool)
    batch = batch_of(tokens=tokens, loss_mask=loss_mask, masks=masks, target_valid=valid)
    found = losses(prediction_of(logits, np.zeros((1, 1, 2, 2), np.float32)), batch)
    assert found.text == pytest.approx((np.log(2) + np.log(3)) / 2, rel=TOLERANCE)
    assert found.total == found.text


def test_every_term_is_that_of_the_loop(case, result):
    for found, wanted in zip(result[0], by_loop(*case), strict=True):
        assert found.dtype == np.float32
        assert found == pytest.approx(wanted, rel=TOLERANCE)


def test_weights_are_those_given(case, result):
    text, masks, batch = case
    other = losses(prediction_of(text, masks), batch, LossConfig(text=3.0, bce=5.0, dice=7.0))
    for found, default, factor in zip(other[1:], result[0][1:], (3, 5 / 2, 14), strict=True):
        assert found == pytest.approx(default * factor, rel=TOLERANCE)
    assert other.total == pytest.approx(sum(map(float, other[1:])), rel=TOLERANCE)


def test_logits_are_resized_to_the_masks(case):
    batch = case.batch
    low = jnp.asarray(case.masks[:, :, :4, :4])
    high = resize_bilinear(low[..., None], Y, Y)[..., 0]
    at_low, at_high = (mask_sums(logits, batch, 2.0) for logits in (low, high))
    for found, wanted in zip(at_low, at_high, strict=True):
        assert found == pytest.approx(float(wanted), rel=TOLERANCE)


def test_half_precision_logits_are_taken_in_float32(case):
    text, masks, batch = case
    short = text.astype(jnp.bfloat16)
    found = losses(prediction_of(short, masks), batch)
    assert {term.dtype for term in found} == {jnp.dtype("float32")}
    assert found.text == pytest.approx(by_loop(np.float32(short), masks, batch).text, rel=TOLERANCE)


# Gradients


def test_gradient_is_that_of_finite_differences(case, result):
    text, masks, batch = (a.astype(np.float64) if i < 2 else a for i, a in enumerate(case))
    rng = np.random.default_rng(5)
    for array, slopes in ((text, result[1][0]), (masks, result[1][1])):
        for _ in range(3):
            step = 1e-5 * rng.standard_normal(array.shape)
            ends = [
                by_loop(*(a + sign * step if a is array else a for a in (text, masks)), batch).total
                for sign in (1, -1)
            ]
            assert (slopes * step).sum() == pytest.approx(
                (ends[0] - ends[1]) / 2, rel=1e-3, abs=SLOPE * 1e-5
            )


def test_large_logits_have_finite_losses_and_gradients(case):
    text, masks, batch = case
    terms, slopes = run(1e4 * text, 1e4 * masks, batch)
    for array in (*terms, *slopes):
        assert np.isfinite(array).all()


# What takes no part


def test_void_pixels_take_no_part(case, result):
    text, masks, batch = case
    void = batch.masks == VOID
    assert not result[1][1][void].any()
    assert result[1][1][~void & batch.target_valid[..., None, None]].all()
    garbage = 1e4 * draw(7, *masks.shape)
    plain = run(text, masks, batch, RELEASED)
    found = run(text, np.where(void, garbage, masks), batch, RELEASED)
    jax.tree.map(np.testing.assert_array_equal, found, plain)

    # A prediction claims a pixel also where its own truth is void; outside the picture all are.
    outside = np.arange(Y) >= 5
    padded = batch._replace(masks=np.where(outside, VOID, batch.masks).astype(np.uint8))
    found = run(text, np.where(outside, garbage, masks), padded)
    jax.tree.map(np.testing.assert_array_equal, found, run(text, masks, padded))


def test_empty_slots_take_no_part(case, result):
    text, masks, batch = case
    filled = batch.target_valid[..., None, None]
    rng = np.random.default_rng(8)
    owner = rng.integers(-9, 9, batch.target_valid.shape)
    owner[2, 4] = 1  # as that of three filled slots
    garbage = batch._replace(
        masks=np.where(filled, batch.masks, rng.integers(0, 256, masks.shape)).astype(np.uint8),
        target_conversation=np.where(batch.target_valid, batch.target_conversation, owner).astype(
            np.int32
        ),
    )
    terms, slopes = run(text, np.where(filled, masks, 1e4 * draw(7, *masks.shape)), garbage)
    assert terms == result[0]
    assert not slopes[1][~batch.target_valid].any()
    np.testing.assert_array_equal(slopes[1], result[1][1])


def test_tokens_that_are_not_supervised_take_no_part(case, result):
    text, masks, batch = case
    before = np.roll(batch.loss_mask, -1, axis=1)  # the state before a supervised token
    before[:, -1] = False
    changed = np.where(before[..., None], text, 1e4 * draw(7, *text.shape))
    other = batch._replace(tokens=np.where(batch.loss_mask, batch.tokens, 16).astype(np.int32))
    terms, slopes = run(changed, masks, other)
    assert terms == result[0]
    np.testing.assert_array_equal(slopes[0].any(axis=-1), before)


def test_a_mask_that_is_all_void_costs_nothing_but_counts(case):
    text, masks, batch = case
    empty = batch.masks.copy()
    empty[0, 1] = VOID
    terms, slopes = run(text, masks, batch._replace(masks=empty), RELEASED)
    assert not slopes[1][0, 1].any()
    others = batch.target_valid.copy()
    others[0, 1] = False
    fewer, _ = run(text, masks, batch._replace(target_valid=others), RELEASED)
    for name in ("mask_bce", "mask_dice"):
        assert getattr(terms, name) == pytest.approx(getattr(fewer, name) * 5 / 6, rel=TOLERANCE)


def test_a_batch_without_targets_or_answers_costs_exactly_nothing(case):
    text, masks, batch = case
    nothing = batch._replace(
        loss_mask=np.zeros_like(batch.loss_mask), target_valid=np.zeros_like(batch.target_valid)
    )
    terms, slopes = run(text, masks, nothing)
    assert terms == Losses(0, 0, 0, 0)
    assert not slopes[0].any() and not slopes[1].any()
    all_void = batch._replace(masks=np.full_like(batch.masks, VOID))
    terms, slopes = run(text, masks, all_void)
    assert (terms.mask_bce, terms.mask_dice) == (0, 0)
    assert not slopes[1].any()


# Counting


def parts_of(case: Case) -> list[Case]:
    """The rows one by one: unequal numbers of tokens and targets, one without any target."""
    return [jax.tree.map(itemgetter(slice(row, row + 1)), case) for row in range(B)]


@pytest.mark.parametrize("config", [LossConfig(), RELEASED], ids=["refined", "released"])
def test_micro_batches_add_up_to_the_whole(case, config):
    counts = count(case.batch)
    whole, slopes = run(*case, config, counts)
    parts = [run(*part, config, counts) for part in parts_of(case)]
    for name in Losses._fields:
        each = [getattr(terms, name) for terms, _ in parts]
        assert sum(each) == pytest.approx(float(getattr(whole, name)), rel=TOLERANCE)
    for index in (0, 1):
        found = np.concatenate([part[index] for _, part in parts])
        np.testing.assert_allclose(found, slopes[index], rtol=TOLERANCE, atol=1e-8)


def test_default_counts_are_those_of_the_batch(case, result):
    terms = losses(prediction_of(case.text, case.masks), case.batch)
    for found, wanted in zip(terms, result[0], strict=True):
        assert found == pytest.approx(float(wanted), rel=TOLERANCE)


def test_count_takes_any_leading_axes(case):
    batch = case.batch._replace(loss_mask=np.ones((B, T), bool))  # first tokens included
    stack = jax.tree.map(lambda array: np.stack([array, array[::-1]]), batch)
    one, two = count(batch), count(stack)
    assert one == (B * (T - 1), batch.target_valid.sum())
    assert two == (2 * one.tokens, 2 * one.targets)
    assert {term.dtype for term in (*one, *two)} == {jnp.dtype("float32")}


def test_first_token_of_a_conversation_follows_the_prefix():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, 9, 5)).astype(np.float32)
    batch = batch_of(
        tokens=np.array([[1, 2, 3, 4, 0, 1, 2, 3, 0]]),  # two of the conversations begin with 3
        segment=np.array([[0, 0, 1, 1, 2, 2, 2, 3, -1]]),
        loss_mask=np.array([[0, 0, 1, 0, 1, 1, 0, 1, 0]], bool),
    )
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(2 * log[0, 1, 3] + log[0, 1, 0] + log[0, 4, 1])
    np.testing.assert_allclose(text_sum(jnp.asarray(logits), batch), expected, rtol=1e-6)


@pytest.mark.parametrize("segment", [0, 1], ids=["prefix", "conversation"])
def test_first_token_of_a_row_is_not_supervised(segment):
    batch = batch_of(
        tokens=np.zeros((1, 4), np.int32),
        segment=np.full((1, 4), segment),
        loss_mask=np.asarray([[1, 0, 0, 1]], bool),
        target_valid=np.zeros((1, 1), bool),
    )
    logits = jnp.asarray(draw(9, 1, 4, 5))
    only = batch._replace(loss_mask=np.asarray([[0, 0, 0, 1]], bool))
    assert text_sum(logits, batch) == text_sum(logits, only) > 0
    assert count(batch).tokens == 1


# Target refinement


def test_refinement_on_paper():
    # Two masks of one question; both claim the first pixel. All logits are 0 or ln 3 in size.
    logits = np.log(3) * np.asarray([[[1, 1, -1]], [[1, -1, -1]]], np.float32)[None]
    masks = np.asarray([[[1, 0, 0]], [[0, 0, VOID]]], np.uint8)[None]
    batch = batch_of(masks=masks, target_valid=np.ones((1, 2), bool))
    right, wrong = np.log(4 / 3), np.log(4)
    first, second = (right * 3 + wrong + right) / 3, (wrong * 3 + right) / 2
    bce, _ = mask_sums(jnp.asarray(logits), batch, 3.0)
    assert bce == pytest.approx(first + second, rel=TOLERANCE)
    apart = batch._replace(target_conversation=np.asarray([[1, 2]], np.int32))
    bce, _ = mask_sums(jnp.asarray(logits), apart, 3.0)
    assert bce == pytest.approx((2 * right + wrong) / 3 + (wrong + right) / 2, rel=TOLERANCE)


def test_released_bce_is_that_of_the_loop(case, result):
    terms, _ = run(*case, RELEASED)
    for found, wanted in zip(terms, by_loop(*case, alpha=1.0), strict=True):
        assert found == pytest.approx(wanted, rel=TOLERANCE)
    assert terms.text == result[0].text and terms.mask_dice == result[0].mask_dice
    assert result[0].mask_bce > 1.1 * terms.mask_bce


def test_alpha_one_is_the_released_bce_bit_for_bit(case):
    """Masks that no two predictions of a question share cost the same with any alpha."""
    text, masks, batch = case
    alone = batch._replace(target_conversation=np.tile(np.arange(M, dtype=np.int32), (B, 1)))
    found, wanted = run(text, masks, alone), run(text, masks, alone, RELEASED)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("slots", [1, 8, 37, 300])
def test_overlap_is_that_of_the_loop_for_any_number_of_slots(slots):
    rng = np.random.default_rng(slots)
    positive = rng.random((2, slots, 5, 3)) < rng.random((2, 1, 5, 3)) ** 3
    positive[:, :, 0, 0] = True
    batch = batch_of(
        target_valid=rng.random((2, slots)) < 0.8,
        target_conversation=rng.integers(1, 4, (2, slots)).astype(np.int32),
    )
    found = np.asarray(overlap(jnp.asarray(positive), batch))
    claims = np.where(positive, 1.0, -1.0)
    for row, slot in np.ndindex(2, slots):
        np.testing.assert_array_equal(found[row, slot], crowded(claims, batch, row, slot))


def test_overlap_counts_every_claim():
    everybody = jnp.ones((1, 256, 1, 1), bool)
    assert overlap(everybody, batch_of(target_valid=np.ones((1, 256), bool))).all()


# Over devices


def test_logits_of_a_spread_vocabulary_are_not_gathered():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows, length, vocabulary = 4, 11, 64
    spread = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    logits = jax.device_put(draw(3, rows, length, vocabulary), spread)
    rng = np.random.default_rng(4)
    batch = batch_of(
        tokens=rng.integers(0, vocabulary, (rows, length)).astype(np.int32),
        segment=np.tile([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, -1], (rows, 1)),
        loss_mask=np.tile(np.arange(length) > 2, (rows, 1)),
    )
    run = jax.jit(jax.value_and_grad(text_sum))
    text = run.lower(logits, batch).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    value, slope = run(logits, batch)
    wanted, wanted_slope = jax.value_and_grad(text_sum)(jnp.asarray(np.asarray(logits)), batch)
    assert slope.sharding.is_equivalent_to(spread, slope.ndim)
    assert value == pytest.approx(float(wanted), rel=TOLERANCE)
    np.testing.assert_allclose(slope, wanted_slope, rtol=TOLERANCE, atol=1e-7)
