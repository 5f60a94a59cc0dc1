"""LoRA: a trainable low-rank pair added to a frozen projection.

See Hu et al. (2021) and docs/reference_notes.md 4.3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from pixellm_jax.config import LoraConfig
from pixellm_jax.errors import InputError
from pixellm_jax.model.layers import Projection, parameter

LORA = "lora"
"""Attribute of a projection, and so a part of its parameters' dotted names."""


class LowRank(nnx.Module):
    """Low-rank pair: alpha / r * dropout(x) down up, which the projection adds to its output.

    `down` (A in the paper) has the input axes of the projection and then the rank, `up` (B) the
    rank and then the output axes; both have the axis of stacked layers in front. `up` is
    initialised to zero, so that the model is unchanged at first; `down` is uniform within
    1 / sqrt(inputs), as in the reference.
    """

    def __init__(self, key: Key[Array, ""], stacked: Projection, config: LoraConfig) -> None:
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.inputs = stacked.inputs
        axes = stacked.weight.get_metadata()["axes"].split()
        shape = stacked.weight.shape
        split = 1 + stacked.inputs
        bound = float(np.prod(shape[1:split])) ** -0.5
        down = jax.random.uniform(key, (*shape[:split], config.rank), minval=-bound, maxval=bound)
        self.down = parameter(down, " ".join([*axes[:split], "rank"]))
        up = jnp.zeros((shape[0], config.rank, *shape[split:]))
        self.up = parameter(up, " ".join([axes[0], "rank", *axes[split:]]))

    def __call__(self, x: Float[Array, "..."], key: Key[Array, ""] | None) -> Float[Array, "..."]:
        """Return the term to be added in one layer. `key` samples the dropout; None disables it."""
        if key is not None and self.dropout:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        inner = jnp.tensordot(x, self.down[...].astype(x.dtype), self.inputs)
        return self.scale * jnp.tensordot(inner, self.up[...].astype(x.dtype), 1)

    def product(self) -> Float[Array, "l ..."]:
        """Return the term that the pairs of all layers add to the stacked weights, in float32."""
        down, up = (array[...].astype(jnp.float32) for array in (self.down, self.up))
        return self.scale * jax.vmap(lambda down, up: jnp.tensordot(down, up, 1))(down, up)


def add_lora(layers: nnx.Module, config: LoraConfig, key: Key[Array, ""]) -> None:
    """Add a LoRA pair to each of the configured projections of stacked layers, in place.

    Raises:
        InputError: a name is not a projection of these layers.
    """
    for name in config.projections:
        projection = getattr(layers, name, None)
        if not isinstance(projection, Projection):
            known = sorted(n for n, v in vars(layers).items() if isinstance(v, Projection))
            raise InputError(
                f"train.lora.projections: {name!r} is not a projection of a layer; "
                f"choose from {known}"
            )
        key, pair_key = jax.random.split(key)
        projection.lora = LowRank(pair_key, projection, config)


def merge_lora(layers: nnx.Module) -> None:
    """Merge every pair into the weight of its projection, in place."""
    for projection in vars(layers).values():
        if isinstance(projection, Projection) and isinstance(projection.lora, LowRank):
            weight = projection.weight
            total = weight[...].astype(jnp.float32) + projection.lora.product()
            weight.set_value(total.astype(weight[...].dtype))
            projection.lora = None
