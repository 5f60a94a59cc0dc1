"""Losses in float32 over the valid part of a batch (reference.md 4.2).

Sums and counts are taken over the whole batch before dividing: text by supervised tokens, masks by
valid targets. Void pixels (255) take no part.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pixellm_jax.batch import Batch, Prediction
from pixellm_jax.geometry import VOID
from pixellm_jax.model.layers import resize_bilinear

DICE_SCALE = 1000.0
DICE_EPS = 1e-6


class Losses(NamedTuple):
    """The weighted terms and their sum, float32 scalars."""

    total: Float[Array, ""]
    text: Float[Array, ""]
    mask_bce: Float[Array, ""]
    mask_dice: Float[Array, ""]


def losses(
    prediction: Prediction,
    batch: Batch,
    *,
    text_weight: float = 1.0,
    bce_weight: float = 2.0,
    dice_weight: float = 0.5,
) -> Losses:
    """Text cross-entropy, mask BCE and Dice with the weights of the released script.

    Mask logits are resized (bilinear) to the resolution of `batch.masks`.
    """
    text = text_weight * text_loss(prediction.text_logits, batch)
    bce, dice = mask_losses(prediction.mask_logits, batch)
    bce, dice = bce_weight * bce, dice_weight * dice
    return Losses(text + bce + dice, text, bce, dice)


def text_loss(logits: Float[Array, "b t v"], batch: Batch) -> Float[Array, ""]:
    """Mean cross-entropy of supervised tokens, each predicted from the state before it.

    "Before" is the previous position of the row; before the first token of a conversation it is the
    end of the prefix.
    """
    logits = logits.astype(jnp.float32)
    tokens = jnp.maximum(batch.tokens, 0)
    picked = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = jax.nn.logsumexp(logits[:, :-1], axis=-1) - picked

    end = jnp.maximum((batch.segment == 0).sum(1) - 1, 0)
    at_end = jnp.take_along_axis(logits, end[:, None, None], axis=1)[:, 0]
    entropy_at_end = jax.nn.logsumexp(at_end, axis=-1, keepdims=True) - jnp.take_along_axis(
        at_end, tokens[:, 1:], axis=1
    )
    first = batch.segment[:, 1:] != batch.segment[:, :-1]
    counted = batch.loss_mask[:, 1:]
    entropy = jnp.where(counted, jnp.where(first, entropy_at_end, entropy), 0)
    return entropy.sum() / jnp.maximum(counted.sum(), 1)


def mask_losses(
    logits: Float[Array, "b m Y X"], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean over valid targets of BCE (mean over valid pixels) and of Dice.

    Dice = 1 - (2 sum(p t)/1000 + 1e-6) / (sum(p)/1000 + sum(t)/1000 + 1e-6), p = sigmoid(logit).
    """
    x = resize_bilinear(logits[..., None], *batch.masks.shape[-2:])[..., 0]
    pixels = (batch.masks != VOID) & batch.target_valid[..., None, None]
    truth = jnp.where(pixels, batch.masks, 0).astype(jnp.float32)

    bce = jnp.where(pixels, jax.nn.softplus(x) - x * truth, 0).sum((-2, -1))
    bce = bce / jnp.maximum(pixels.sum((-2, -1)), 1)

    p = jnp.where(pixels, jax.nn.sigmoid(x), 0)
    both = 2 * (p * truth).sum((-2, -1)) / DICE_SCALE
    each = (p.sum((-2, -1)) + truth.sum((-2, -1))) / DICE_SCALE
    dice = 1 - (both + DICE_EPS) / (each + DICE_EPS)

    count = jnp.maximum(batch.target_valid.sum(), 1)
    return bce.sum() / count, jnp.where(batch.target_valid, dice, 0).sum() / count
