"""Targets of answers: their codebook states found, and their masks decoded, many at a time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from pixellm_jax.inference import decoding
from pixellm_jax.inference.compilation import Programs, bucket
from pixellm_jax.inference.request import Targets
from pixellm_jax.model.pixellm import PixelLM


class Found(NamedTuple):
    """A target: its row, where its codebook tokens stand in the answer, its picture's features."""

    row: int
    codebook_index: Int32[np.ndarray, "s k"]
    maps: tuple[jax.Array, ...]


def decode_targets(
    model: PixelLM,
    programs: Programs,
    states: Float[Array, "b t d"],
    found: list[Found],
    *,
    together: int,
) -> dict[int, Targets]:
    """Decodes targets of any rows, `together` at once, in buckets of 1, 4, 16, ...; by row."""
    parts = dict[int, list[Targets]]()
    for start in range(0, len(found), together):
        part = found[start : start + together]
        padded = part + part[-1:] * (min(bucket(len(part)), together) - len(part))
        owners = np.asarray([target.row for target in padded], np.int32)
        index = np.stack([target.codebook_index for target in padded])
        chosen = programs(decoding.states_at, states, owners, index)
        maps = tuple(target.maps for target in padded)
        logits = programs(decoding.decode_masks, model, chosen, maps)
        chosen, logits = jax.device_get((chosen, logits))
        for row in dict.fromkeys(target.row for target in part):
            own = np.flatnonzero(owners[: len(part)] == row)
            parts.setdefault(row, []).append(Targets(index[own], chosen[own], logits[own]))
    return {row: join(targets) for row, targets in parts.items()}


def join(parts: list[Targets]) -> Targets:
    """One after the other."""
    return Targets(*map(np.concatenate, zip(*parts, strict=True)))


def no_targets(model: PixelLM) -> Targets:
    """Those of an answer without any."""
    config = model.config
    shape = 0, config.codebook.scales, config.codebook.tokens_per_scale
    return Targets(
        np.zeros(shape, np.int32),
        np.zeros((*shape, config.language.width), config.dtype),
        np.zeros((0, config.mask_grid, config.mask_grid), np.float32),
    )
