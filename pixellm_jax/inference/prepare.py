"""Model preparation for inference: unstacked layers, merged LoRA, cast or quantised weights."""

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
"""Weight-only quantisation schemes of the language model's projections: name -> bits."""


def prepare_for_inference(
    model: PixelLM,
    *,
    weights: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    consume: bool = False,
) -> PixelLM:
    """Return a copy whose language model has unstacked layers and matrices in the compute dtype.

    Unstacked layers are read in place; slices of stacked layers would be copied at every step.
    Arrays that need no change are shared with `model`, which stays as it is.

    Args:
        model: the model to copy.
        weights: "int8" or "int4" to quantise the projections of the language model's layers (see
            `quantize`). The vision encoder, projectors, codebook, pixel decoder, embeddings, head
            and norms stay as they are.
        mesh: mesh over which all weights are sharded by the rules of `sharding`.
        consume: use up `model`, so that it and its copy need not both fit in memory: peak memory is
            the layers once and the largest of their stacked arrays.

    Raises:
        InputError: `weights` is not a known scheme.
    """
    if weights is not None and weights not in WEIGHTS:
        raise InputError(f"weights={weights!r}: choose from {', '.join(WEIGHTS)}")
    prepared = jax.tree.map(lambda leaf: leaf, model)
    language = prepared.language_model
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
        for _, variable in nnx.to_flat_state(nnx.state(prepared)):
            sharding = weight_sharding(variable.get_metadata()["axes"], variable.shape, mesh)
            variable.set_value(jax.device_put(variable[...], sharding))
    return prepared
