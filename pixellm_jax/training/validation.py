"""Scores of a model while it trains: the answer is given, its codebook tokens included."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool
from PIL import Image

from pixellm_jax.batch import Batch
from pixellm_jax.evaluation.metrics import Areas, Sums, measure, merge, scores, tally
from pixellm_jax.images.overlay import draw_overlay
from pixellm_jax.model.layers import resize_bilinear
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import batch_sharding, replicated
from pixellm_jax.training.config import LossConfig
from pixellm_jax.training.log import Picture
from pixellm_jax.training.losses import Losses, count, losses

PICTURES = 4
"""Rows of the first batch that are drawn, at most: those of one device."""


class Evaluation(NamedTuple):
    """What a validation found: scores by name ("giou" chooses the best checkpoint), pictures."""

    scores: dict[str, float]
    pictures: tuple[Picture, ...] = ()


class _Found(NamedTuple):
    areas: Areas
    losses: Losses
    inside: Bool[Array, "b m Y X"]


def evaluate_given(
    model: PixelLM, batches: Iterable[Batch], mesh: Mesh, loss: LossConfig
) -> Evaluation:
    """gIoU, cIoU and losses on the canvas, at the resolution of the batches' masks.

    `batches`: this host's share of each; scores are those of all hosts together. Mode `given`: not
    to be compared with numbers where the model writes its answers itself.
    """
    place = batch_sharding(mesh)
    put = partial(jax.make_array_from_process_local_data, place)
    sums, terms, weights = list[Sums](), list[Losses](), list[Losses]()
    pictures: tuple[Picture, ...] = ()
    for batch in batches:
        whole = jax.tree.map(put, batch)
        measured = _measure(model, whole, mesh, loss)
        areas, parts, valid, counts = jax.device_get(
            (measured.areas, measured.losses, _whole(whole.target_valid, mesh), count(whole))
        )
        sums.append(tally(areas, valid=valid))
        terms.append(parts)
        weights.append(Losses(counts.tokens, counts.tokens, counts.targets, counts.targets))
        if not pictures:
            shard = measured.inside.addressable_shards[0].data  # the first of this host's rows
            rows = min(PICTURES, len(shard))
            pictures = tuple(_draw(batch, shard, row) for row in range(rows))
    result = scores(merge(*sums))
    found, shares = np.asarray(terms, float), np.maximum(np.asarray(weights, float), 1e-9)
    _, text, bce, dice = map(float, (found * shares).sum(0) / shares.sum(0))
    values = {"giou": result.giou, "ciou": result.ciou, "loss": text + bce + dice}
    values |= {"text": text, "mask_bce": bce, "mask_dice": dice}
    return Evaluation(values, pictures)


@partial(jax.jit, static_argnames=("mesh", "loss"))
def _measure(model: PixelLM, batch: Batch, mesh: Mesh, loss: LossConfig) -> _Found:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        prediction = model(batch)
        side = batch.masks.shape[-2:]
        logits = resize_bilinear(prediction.mask_logits[..., None], *side)[..., 0]
        areas = measure(logits > 0, batch.masks)
        terms = losses(prediction, batch, loss)
    whole = replicated(mesh)
    areas, terms = jax.lax.with_sharding_constraint((areas, terms), whole)
    return _Found(areas, terms, jax.lax.with_sharding_constraint(logits > 0, batch_sharding(mesh)))


@partial(jax.jit, static_argnames="mesh")
def _whole(array: Array, mesh: Mesh) -> Array:
    return jax.lax.with_sharding_constraint(array, replicated(mesh))


def _draw(batch: Batch, inside: Array, row: int) -> Picture:
    """Truth on the left, prediction on the right."""
    y, x = (int(size) for size in batch.image_hw[row])
    picture = np.asarray(batch.image[row])
    valid = np.asarray(batch.target_valid[row])
    halves = []
    for masks in (np.asarray(batch.masks[row]) == 1, np.asarray(inside[row])):
        large = [
            np.asarray(Image.fromarray(mask).resize(picture.shape[1::-1], Image.Resampling.NEAREST))
            for mask in masks[valid]
        ]
        stack = np.asarray(large, bool).reshape(-1, *picture.shape[:2])
        names = [str(number + 1) for number in range(len(stack))]
        halves.append(np.asarray(draw_overlay(picture[:y, :x], stack[:, :y, :x], names)))
    return Picture(f"validation/{row}", np.concatenate(halves, axis=1))
