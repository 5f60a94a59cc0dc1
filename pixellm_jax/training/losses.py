"""Losses in float32 over the valid part of a batch, with target refinement.

See docs/reference_notes.md 4.2.
A term is a sum over a batch divided by what counts: supervised tokens for the text, valid targets
for the masks. A step of several micro-batches divides each of them by the counts of all, so that
the terms of the micro-batches add up to the term of the whole. Void pixels (255) take no part.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pixellm_jax.batch import Batch, Prediction
from pixellm_jax.images.geometry import VOID
from pixellm_jax.model.layers import resize_bilinear
from pixellm_jax.training.config import LossConfig

DICE_SCALE = 1000.0
DICE_EPS = 1e-6


class Losses(NamedTuple):
    """The weighted terms and their sum, float32 scalars."""

    total: Float[Array, ""]
    text: Float[Array, ""]
    mask_bce: Float[Array, ""]
    mask_dice: Float[Array, ""]


class Counts(NamedTuple):
    """What the sums are divided by: supervised tokens and valid targets, float32 scalars."""

    tokens: Float[Array, ""]
    targets: Float[Array, ""]


def count(batch: Batch) -> Counts:
    """Counts of a batch, or of a stack of batches with any leading axes.

    The first token of a row has no state before it, so it is not supervised.
    """
    return Counts(
        jnp.sum(batch.loss_mask[..., 1:], dtype=jnp.float32),
        jnp.sum(batch.target_valid, dtype=jnp.float32),
    )


def losses(
    prediction: Prediction,
    batch: Batch,
    config: LossConfig = LossConfig(),  # noqa: B008 (frozen)
    counts: Counts | None = None,
) -> Losses:
    """Text cross-entropy, mask BCE with target refinement, and Dice.

    Mask logits are resized (bilinear) to the resolution of `batch.masks`. `counts`: of the whole
    batch of a step, where `batch` is one of its micro-batches; by default those of `batch`.
    """
    tokens, targets = count(batch) if counts is None else counts
    text = config.text * text_sum(prediction.text_logits, batch) / jnp.maximum(tokens, 1)
    bce, dice = mask_sums(prediction.mask_logits, batch, config.alpha)
    bce = config.bce * bce / jnp.maximum(targets, 1)
    dice = config.dice * dice / jnp.maximum(targets, 1)
    return Losses(text + bce + dice, text, bce, dice)


def text_sum(logits: Float[Array, "b t v"], batch: Batch) -> Float[Array, ""]:
    """Sum of the cross-entropy of supervised tokens, each predicted from the state before it.

    "Before" is the previous position of the row; before the first token of a conversation it is the
    end of the prefix, which may be asked several times. So the sum is taken over the states: each
    costs `asked` logsumexps less the logits of the tokens it is asked for. The vocabulary is only
    compared and summed over, never indexed: logits spread over devices stay where they are.
    """
    logits = logits.astype(jnp.float32)
    position, vocabulary = jnp.arange(logits.shape[1]), jnp.arange(logits.shape[2])
    counted = batch.loss_mask & (position > 0)
    begins = counted & (batch.segment != jnp.roll(batch.segment, 1, axis=1))
    follows, following = jnp.roll(counted & ~begins, -1, axis=1), jnp.roll(batch.tokens, -1, axis=1)
    end = position == jnp.maximum((batch.segment == 0).sum(1, keepdims=True) - 1, 0)

    asked = follows + jnp.where(end, begins.sum(1, keepdims=True), 0)
    beginnings = (begins[..., None] & (batch.tokens[..., None] == vocabulary)).sum(1)
    times = follows[..., None] & (following[..., None] == vocabulary)
    times = times + jnp.where(end[..., None], beginnings[:, None], 0)

    picked = jnp.where(times > 0, times * logits, 0).sum(-1)
    return (asked * jax.nn.logsumexp(logits, axis=-1) - picked).sum()


def mask_sums(
    logits: Float[Array, "b m Y X"], batch: Batch, alpha: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over valid targets of the BCE (mean over valid pixels) and of Dice.

    BCE counts `alpha` times where predictions overlap: the target refinement loss, 1 / (Y X) sum of
    A BCE over the pixels, A = alpha where at least two predicted masks of one question are positive
    and 1 elsewhere.

    Dice = 1 - (2 sum(p t)/1000 + 1e-6) / (sum(p)/1000 + sum(t)/1000 + 1e-6), p = sigmoid(logit).
    """
    x = resize_bilinear(logits.astype(jnp.float32)[..., None], *batch.masks.shape[-2:])[..., 0]
    pixels = (batch.masks != VOID) & batch.target_valid[..., None, None]
    truth = jnp.where(pixels, batch.masks, 0).astype(jnp.float32)

    bce = jnp.where(pixels, jax.nn.softplus(x) - x * truth, 0)
    if alpha != 1:
        bce = jnp.where(overlap(x > 0, batch), alpha * bce, bce)
    bce = bce.sum((-2, -1)) / jnp.maximum(pixels.sum((-2, -1)), 1)

    p = jnp.where(pixels, jax.nn.sigmoid(x), 0)
    both = 2 * (p * truth).sum((-2, -1)) / DICE_SCALE
    each = (p.sum((-2, -1)) + truth.sum((-2, -1))) / DICE_SCALE
    dice = 1 - (both + DICE_EPS) / (each + DICE_EPS)
    return bce.sum(), jnp.where(batch.target_valid, dice, 0).sum()


def overlap(positive: Bool[Array, "b m Y X"], batch: Batch) -> Bool[Array, "b m Y X"]:
    """Pixels where at least two predicted masks of the target's own question are positive.

    Predictions are packed eight to a byte, so that nothing of the size of the masks is kept.
    """
    owner = batch.target_conversation
    rivals = (owner[:, :, None] == owner[:, None, :]) & batch.target_valid[:, None, :]
    rivals = jnp.packbits(rivals, axis=2)[..., None, None]
    claims = jnp.packbits(positive, axis=1)[:, None]
    return jax.lax.population_count(rivals & claims).sum(2, dtype=jnp.uint16) >= 2
