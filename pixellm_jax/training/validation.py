"""Validation during training, teacher-forced: the model reads the true answers.

Its scores cannot be compared with scores of free-running evaluation, where the model writes its
answers itself.
"""

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
from pixellm_jax.training.log import LogImage
from pixellm_jax.training.losses import Losses, count, losses

MAX_IMAGES = 4
"""Rows of the first batch to render, among those on the first device of this process."""


class Validation(NamedTuple):
    """Result of a validation.

    Attributes:
        scores: scores by name; "giou" chooses the best checkpoint.
        images: truth and prediction side by side.
    """

    scores: dict[str, float]
    images: tuple[LogImage, ...] = ()


class _Measured(NamedTuple):
    areas: Areas
    losses: Losses
    inside: Bool[Array, "b m Y X"]


def validate(model: PixelLM, batches: Iterable[Batch], mesh: Mesh, loss: LossConfig) -> Validation:
    """Return gIoU, cIoU and losses on the canvas, at the resolution of the batches' masks.

    Args:
        model: model on the devices of `mesh`.
        batches: this process's share of each batch; the scores cover all processes.
        mesh: mesh of devices.
        loss: weights of the loss terms.
    """
    put = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    sums = list[Sums]()
    terms = list[Losses]()
    weights = list[Losses]()
    images: tuple[LogImage, ...] = ()
    for batch in batches:
        global_batch = jax.tree.map(put, batch)
        measured = _measure(model, global_batch, mesh, loss)
        areas, batch_terms, valid, counts = jax.device_get(
            (
                measured.areas,
                measured.losses,
                _replicate(global_batch.target_valid, mesh),
                count(global_batch),
            )
        )
        sums.append(tally(areas, valid=valid))
        terms.append(batch_terms)
        weights.append(Losses(counts.tokens, counts.tokens, counts.targets, counts.targets))
        if not images:
            shard = measured.inside.addressable_shards[0].data  # the first rows of this process
            rows = min(MAX_IMAGES, len(shard))
            images = tuple(_render(batch, shard, row) for row in range(rows))
    result = scores(merge(*sums))
    shares = np.maximum(np.asarray(weights, float), 1e-9)
    means = (np.asarray(terms, float) * shares).sum(0) / shares.sum(0)
    _, text, bce, dice = map(float, means)
    values = {"giou": result.giou, "ciou": result.ciou, "loss": text + bce + dice}
    values |= {"text": text, "mask_bce": bce, "mask_dice": dice}
    return Validation(values, images)


@partial(jax.jit, static_argnames=("mesh", "loss"))
def _measure(model: PixelLM, batch: Batch, mesh: Mesh, loss: LossConfig) -> _Measured:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        prediction = model(batch)
        side = batch.masks.shape[-2:]
        logits = resize_bilinear(prediction.mask_logits[..., None], *side)[..., 0]
        areas = measure(logits > 0, batch.masks)
        terms = losses(prediction, batch, loss)
    areas, terms = jax.lax.with_sharding_constraint((areas, terms), replicated(mesh))
    inside = jax.lax.with_sharding_constraint(logits > 0, batch_sharding(mesh))
    return _Measured(areas, terms, inside)


@partial(jax.jit, static_argnames="mesh")
def _replicate(array: Array, mesh: Mesh) -> Array:
    return jax.lax.with_sharding_constraint(array, replicated(mesh))


def _render(batch: Batch, inside: Array, row: int) -> LogImage:
    """Render the truth on the left, the prediction on the right."""
    y, x = (int(size) for size in batch.image_hw[row])
    canvas = np.asarray(batch.image[row])
    valid = np.asarray(batch.target_valid[row])
    halves = []
    for masks in (np.asarray(batch.masks[row]) == 1, np.asarray(inside[row])):
        resized = [
            np.asarray(Image.fromarray(mask).resize(canvas.shape[1::-1], Image.Resampling.NEAREST))
            for mask in masks[valid]
        ]
        stack = np.asarray(resized, bool).reshape(-1, *canvas.shape[:2])
        names = [str(number + 1) for number in range(len(stack))]
        halves.append(np.asarray(draw_overlay(canvas[:y, :x], stack[:, :y, :x], names)))
    return LogImage(f"validation/{row}", np.concatenate(halves, axis=1))
