"""A model made ready for answering: layers apart, weights in the form in which they are read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pixellm_jax.errors import InputError
from pixellm_jax.model.layers import Projection
from pixellm_jax.model.lora import merge_lora
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.model.quantize import Bits, quantize
from pixellm_jax.sharding import weight_sharding

WEIGHTS: dict[str, Bits] = {"int8": 8, "int4": 4}
"""Names of what `serve` can make of the language model's projections, and their bits."""


def serve(
    model: PixelLM,
    *,
    weights: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    consume: bool = False,
) -> PixelLM:
    """A copy whose language model has its layers apart and its matrices in the compute dtype.

    Layers apart are read where they are; slices of stacked ones would be copied at every pass.
    Arrays that need no change are shared with `model`, which stays as it is.

    weights: "int8" or "int4" for the projections of the layers (see `quantize`). The vision
        encoder, projectors, codebook, pixel decoder, embeddings, head and norms stay as they are.
    mesh: all weights are spread over it, by the rules of `sharding`.
    consume: `model` is used up, for it and its copy need not both fit: memory holds the layers once
        and, for a moment, the largest of their stacked arrays.

    Raises:
        InputError: `weights` is something else.
    """
    if weights is not None and weights not in WEIGHTS:
        raise InputError(f"weights={weights!r}: choose from {', '.join(WEIGHTS)}")
    served = jax.tree.map(lambda leaf: leaf, model)
    language = served.language_model
    merge_lora(language.layers)
    language.layers = nnx.List(language.blocks(consume=consume))
    dtype = jnp.dtype(model.config.dtype)
    for matrix in (language.embedding, language.head):
        matrix.set_value(matrix[...].astype(dtype))
    for layer in language.layers:
        if weights is not None:
            quantize(layer, WEIGHTS[weights])
        for projection in vars(layer).values():
            if isinstance(projection, Projection):
                projection.weight.set_value(projection.weight[...].astype(dtype))
    if mesh is not None:
        for _, variable in nnx.to_flat_state(nnx.state(served)):
            place = weight_sharding(variable.get_metadata()["axes"], variable.shape, mesh)
            variable.set_value(jax.device_put(variable[...], place))
    return served
