"""Training losses in float32 over the valid part of a batch, with target refinement.

See docs/reference_notes.md 4.2. A term is a sum over a batch divided by a count: supervised tokens
for the text, valid targets for the masks. A step of several micro-batches divides each of them by
the counts of the full batch, so that the terms of the micro-batches add up to the term of the
batch. Void pixels (255) are ignored.
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
    """Weighted loss terms and their sum, float32 scalars."""

    total: Float[Array, ""]
    text: Float[Array, ""]
    mask_bce: Float[Array, ""]
    mask_dice: Float[Array, ""]


class Counts(NamedTuple):
    """Divisors of the sums, float32 scalars: supervised tokens and valid targets."""

    tokens: Float[Array, ""]
    targets: Float[Array, ""]


def count(batch: Batch) -> Counts:
    """Count a batch, or a stack of batches with any leading axes.

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
    """Return text cross-entropy, mask BCE with target refinement, and Dice.

    Args:
        prediction: output of the model; mask logits are resized (bilinear) to the resolution of
            `batch.masks`.
        batch: the batch, or a micro-batch.
        config: weights of the terms.
        counts: counts of the full batch, where `batch` is one of its micro-batches; by default the
            counts of `batch`.
    """
    tokens, targets = count(batch) if counts is None else counts
    text = config.text * text_sum(prediction.text_logits, batch) / jnp.maximum(tokens, 1)
    bce, dice = mask_sums(prediction.mask_logits, batch, config.alpha)
    bce = config.bce * bce / jnp.maximum(targets, 1)
    dice = config.dice * dice / jnp.maximum(targets, 1)
    return Losses(text + bce + dice, text, bce, dice)


def text_sum(logits: Float[Array, "b t v"], batch: Batch) -> Float[Array, ""]:
    """Return the summed cross-entropy of supervised tokens, predicted from the state before each.

    That state is at the previous position of the row; for the first token of a conversation it is
    the end of the prefix, which may predict several tokens. The sum therefore runs over the states:
    each contributes `predictions` logsumexps minus the logits of the tokens that it predicts. The
    vocabulary is only compared and summed over, never indexed, so that sharded logits stay sharded.
    """
    logits = logits.astype(jnp.float32)
    position = jnp.arange(logits.shape[1])
    vocabulary = jnp.arange(logits.shape[2])
    counted = batch.loss_mask & (position > 0)
    begins = counted & (batch.segment != jnp.roll(batch.segment, 1, axis=1))
    follows = jnp.roll(counted & ~begins, -1, axis=1)
    next_token = jnp.roll(batch.tokens, -1, axis=1)
    end = position == jnp.maximum((batch.segment == 0).sum(1, keepdims=True) - 1, 0)

    predictions = follows + jnp.where(end, begins.sum(1, keepdims=True), 0)
    beginnings = (begins[..., None] & (batch.tokens[..., None] == vocabulary)).sum(1)
    times = follows[..., None] & (next_token[..., None] == vocabulary)
    times = times + jnp.where(end[..., None], beginnings[:, None], 0)

    picked = jnp.where(times > 0, times * logits, 0).sum(-1)
    return (predictions * jax.nn.logsumexp(logits, axis=-1) - picked).sum()


def mask_sums(
    logits: Float[Array, "b m Y X"], batch: Batch, alpha: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sums over valid targets of the BCE (mean over valid pixels) and of Dice.

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
    intersection = 2 * (p * truth).sum((-2, -1)) / DICE_SCALE
    areas = (p.sum((-2, -1)) + truth.sum((-2, -1))) / DICE_SCALE
    dice = 1 - (intersection + DICE_EPS) / (areas + DICE_EPS)
    return bce.sum(), jnp.where(batch.target_valid, dice, 0).sum()


def overlap(positive: Bool[Array, "b m Y X"], batch: Batch) -> Bool[Array, "b m Y X"]:
    """Return the pixels where at least two predicted masks of the target's question are positive.

    Predictions are packed eight to a byte, so that no intermediate of the size of the masks is
    kept.
    """
    owner = batch.target_conversation
    rivals = (owner[:, :, None] == owner[:, None, :]) & batch.target_valid[:, None, :]
    rivals = jnp.packbits(rivals, axis=2)[..., None, None]
    claims = jnp.packbits(positive, axis=1)[:, None]
    return jax.lax.population_count(rivals & claims).sum(2, dtype=jnp.uint16) >= 2
