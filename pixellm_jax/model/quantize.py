"""Weight-only quantisation to 8 or 4 bits: integers with one scale per group of inputs.

Only weights are rounded; activations keep the compute dtype. Decoding reads every weight once per
step, so fewer bytes save time where memory bandwidth is the limit.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from pixellm_jax.errors import InputError
from pixellm_jax.model.language_model import LanguageBlock
from pixellm_jax.model.layers import Projection, parameter

Bits = Literal[8, 4]

GROUP = 64
"""Number of inputs that share a scale with 4 bits; with 8 bits all inputs of an output do."""


class QuantizedProjection(nnx.Module):
    """Projection without bias whose weight is `values * scale`, symmetric around zero.

    Attributes:
        values: integers, in the shape of the weight.
        scale: the largest magnitude of a group, over 127 (8 bits) or 7 (4 bits); its first axis
            counts groups of inputs, the others are the outputs.
    """

    def __init__(self, projection: Projection, bits: Bits) -> None:
        if projection.bias is not None or projection.lora is not None:
            raise InputError("only projections without bias, and with LoRA merged, are quantized")
        weight = projection.weight[...]
        names = projection.weight.get_metadata()["axes"].split()
        self.inputs = projection.inputs
        outputs = weight.shape[self.inputs :]
        size = weight[..., *([0] * len(outputs))].size
        groups = size // GROUP if bits == 4 and size % GROUP == 0 else 1
        flat = weight.astype(jnp.float32).reshape(groups, size // groups, *outputs)
        max_value = 2 ** (bits - 1) - 1
        scale = jnp.maximum(jnp.abs(flat).max(axis=1), 1e-30) / max_value
        values = jnp.round(flat / scale[:, None]).astype(jnp.int8 if bits == 8 else jnp.int4)
        self.values = parameter(values.reshape(weight.shape), " ".join(names))
        self.scale = parameter(scale, " ".join([names[0], *names[self.inputs :]]))

    def __call__(
        self, x: Float[Array, "..."], key: Key[Array, ""] | None = None
    ) -> Float[Array, "..."]:
        """Project x, like `Projection`; `key` is not used."""
        values, scale = self.values[...], self.scale[...]
        groups, outputs = scale.shape[0], scale.shape[1:]
        if groups == 1:
            y = jnp.tensordot(
                x, values.astype(x.dtype), self.inputs, preferred_element_type=jnp.float32
            )
            return (y * scale[0]).astype(x.dtype)
        flat = values.reshape(groups, -1, *outputs).astype(jnp.float32) * scale[:, None]
        return jnp.tensordot(x, flat.reshape(values.shape).astype(x.dtype), self.inputs)


def quantize(layer: LanguageBlock, bits: Bits) -> None:
    """Quantise the projections of a layer, in place."""
    for name, projection in list(vars(layer).items()):
        if isinstance(projection, Projection):
            setattr(layer, name, QuantizedProjection(projection, bits))
