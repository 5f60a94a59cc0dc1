"""Losses: on paper, against a loop in float64, and what takes no part."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixellm_jax.batch import Batch, Prediction
from pixellm_jax.geometry import VOID
from pixellm_jax.losses import Losses, losses, mask_losses, text_loss
from pixellm_jax.model.layers import resize_bilinear

# Float32 means over a few hundred terms of order one, against float64.
TOLERANCE = 1e-5
# Central differences of the float64 loop with a step of 1e-5: the slope's own error is 1e-9.
SLOPE = 1e-5

B, T, V, M, Y = 3, 11, 17, 5, 7


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def batch_of(**fields: np.ndarray) -> Batch:
    """The losses read five fields; the others are absent, so that a use of them is an error."""
    if "tokens" in fields:
        fields = {"segment": np.zeros_like(fields["tokens"]), **fields}
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
    batch = batch_of(tokens=tokens, loss_mask=loss_mask, masks=masks, target_valid=valid)
    return Case(draw(1, B, T, V), 3 * draw(2, B, M, Y, Y), batch)


@jax.jit
def evaluate(text: jax.Array, masks: jax.Array, batch: Batch) -> tuple[Losses, tuple]:
    def total(text: jax.Array, masks: jax.Array) -> tuple[jax.Array, Losses]:
        terms = losses(prediction_of(text, masks), batch)
        return terms.total, terms

    gradient, terms = jax.grad(total, argnums=(0, 1), has_aux=True)(text, masks)
    return terms, gradient


def run(text: np.ndarray, masks: np.ndarray, batch: Batch) -> tuple[Losses, tuple]:
    return jax.tree.map(np.asarray, evaluate(jnp.asarray(text), jnp.asarray(masks), batch))


@pytest.fixture(scope="module")
def result(case) -> tuple[Losses, tuple]:
    return run(*case)


def by_loop(text: np.ndarray, masks: np.ndarray, batch: Batch) -> Losses:
    """The formulas of reference.md 4.2 in float64, one token and one pixel at a time."""
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
        bces.append(-(t * np.log(p) + (1 - t) * np.log(1 - p)).mean())
        both = 2 * (p * t).sum() / 1000 + 1e-6
        dices.append(1 - both / (p.sum() / 1000 + t.sum() / 1000 + 1e-6))
    terms = np.mean(entropies), 2 * np.mean(bces), 0.5 * np.mean(dices)
    return Losses(sum(terms), *terms)


# By hand


def test_masks_on_paper():
    # sigmoid(ln 3) = 3/4. BCE: ln 4/3, ln 4, ln 2; the fourth pixel is void.
    logits = np.asarray([[np.log(3), np.log(3)], [0, 77]], np.float32)[None, None]
    masks = np.asarray([[1, 0], [1, VOID]], np.uint8)[None, None]
    batch = batch_of(masks=masks, target_valid=np.ones((1, 1), bool))
    bce, dice = mask_losses(jnp.asarray(logits), batch)
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
    other = losses(
        prediction_of(text, masks), batch, text_weight=3.0, bce_weight=5.0, dice_weight=7.0
    )
    for found, default, factor in zip(other[1:], result[0][1:], (3, 5 / 2, 14), strict=True):
        assert found == pytest.approx(default * factor, rel=TOLERANCE)
    assert other.total == pytest.approx(sum(map(float, other[1:])), rel=TOLERANCE)


def test_logits_are_resized_to_the_masks(case):
    batch = case.batch
    low = jnp.asarray(case.masks[:, :, :4, :4])
    high = resize_bilinear(low[..., None], Y, Y)[..., 0]
    for found, wanted in zip(mask_losses(low, batch), mask_losses(high, batch), strict=True):
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
    terms, _ = run(text, np.where(void, 1e4 * draw(7, *masks.shape), masks), batch)
    assert terms == result[0]
    assert not result[1][1][void].any()
    assert result[1][1][~void & batch.target_valid[..., None, None]].all()


def test_empty_slots_take_no_part(case, result):
    text, masks, batch = case
    filled = batch.target_valid[..., None, None]
    rng = np.random.default_rng(8)
    garbage = batch._replace(
        masks=np.where(filled, batch.masks, rng.integers(0, 256, masks.shape)).astype(np.uint8)
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
    terms, slopes = run(text, masks, batch._replace(masks=empty))
    assert not slopes[1][0, 1].any()
    others = batch.target_valid.copy()
    others[0, 1] = False
    fewer, _ = run(text, masks, batch._replace(target_valid=others))
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


def test_parts_weighted_by_their_counts_are_the_whole(case, result):
    text, masks, batch = case
    whole, parts, tokens, targets = result[0], [], [], []
    for part in ([True, True, False], [False, False, True]):
        rows = np.asarray(part)[:, None]
        kept = batch._replace(
            loss_mask=batch.loss_mask & rows, target_valid=batch.target_valid & rows
        )
        parts.append(run(text, masks, kept)[0])
        tokens.append(kept.loss_mask.sum())
        targets.append(kept.target_valid.sum())
    assert tokens[0] != tokens[1] and targets[0] != targets[1]
    for name, counts in (("text", tokens), ("mask_bce", targets), ("mask_dice", targets)):
        each = [getattr(part, name) for part in parts]
        assert getattr(whole, name) == pytest.approx(
            np.average(each, weights=counts), rel=TOLERANCE
        )
        assert abs(getattr(whole, name) - np.mean(each)) > 100 * TOLERANCE


def test_first_token_of_a_conversation_follows_the_prefix():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, 7, 5)).astype(np.float32)
    batch = batch_of(
        tokens=np.array([[1, 2, 3, 4, 0, 1, 2]]),
        segment=np.array([[0, 0, 1, 1, 2, 2, -1]]),
        loss_mask=np.array([[0, 0, 1, 0, 1, 1, 0]], bool),
    )
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(log[0, 1, 3] + log[0, 1, 0] + log[0, 4, 1]) / 3
    np.testing.assert_allclose(text_loss(jnp.asarray(logits), batch), expected, rtol=1e-6)
