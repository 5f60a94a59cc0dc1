"""Batched mask decoding: the targets of many answers go through the pixel decoder together."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from pixellm_jax.inference import decoding
from pixellm_jax.inference.compilation import CompileCounter, bucket
from pixellm_jax.inference.request import Targets
from pixellm_jax.model.pixellm import PixelLM


class PendingTarget(NamedTuple):
    """A target whose mask is still to be decoded.

    Attributes:
        row: row of its answer in the running batch.
        codebook_index: index in the answer's tokens of each of its codebook tokens.
        maps: feature maps of its image.
    """

    row: int
    codebook_index: Int32[np.ndarray, "s k"]
    maps: tuple[jax.Array, ...]


def decode_targets(
    model: PixelLM,
    counter: CompileCounter,
    states: Float[Array, "b t d"],
    pending: list[PendingTarget],
    *,
    batch_size: int,
) -> dict[int, Targets]:
    """Decode the masks of targets, up to `batch_size` in one call, and group them by row.

    `states` are the hidden states of all rows. Calls are padded to a bucket of 1, 4, 16, ...
    targets.
    """
    parts = dict[int, list[Targets]]()
    for start in range(0, len(pending), batch_size):
        part = pending[start : start + batch_size]
        padded = part + part[-1:] * (min(bucket(len(part)), batch_size) - len(part))
        rows = np.asarray([target.row for target in padded], np.int32)
        index = np.stack([target.codebook_index for target in padded])
        maps = tuple(target.maps for target in padded)
        on_device = counter.call(decoding.states_at, states, rows, index)
        logits = counter.call(decoding.decode_masks, model, on_device, maps)
        target_states, logits = jax.device_get((on_device, logits))
        for row in dict.fromkeys(target.row for target in part):
            at = np.flatnonzero(rows[: len(part)] == row)
            parts.setdefault(row, []).append(Targets(index[at], target_states[at], logits[at]))
    return {row: concatenate_targets(targets) for row, targets in parts.items()}


def concatenate_targets(parts: list[Targets]) -> Targets:
    """Concatenate the targets of one answer."""
    return Targets(*map(np.concatenate, zip(*parts, strict=True)))


def no_targets(model: PixelLM) -> Targets:
    """Return the targets of an answer that names none."""
    config = model.config
    shape = 0, config.codebook.scales, config.codebook.tokens_per_scale
    return Targets(
        np.zeros(shape, np.int32),
        np.zeros((*shape, config.language.width), config.dtype),
        np.zeros((0, config.mask_grid, config.mask_grid), np.float32),
    )
