"""Segmentation codebook: N learnable tokens at each of L scales per target, and their fusion.

The tokens themselves are rows of the language model's vocabulary. This module turns the states that
predict them into one query per scale, and the masks of the scales into one mask. With h[s k] the
state before codebook token k of scale s, and D_s the pixel decoder at scale s:

    query[s] = sum over k of alpha[s k] projection(h[s k])        alpha: token_fusion
    mask     = sum over s of beta[s] D_s(query[s])                beta: mask_fusion
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from pixellm_jax.config import ModelConfig
from pixellm_jax.model.layers import MLP, constant


class Codebook(nnx.Module):
    """Text projection, token fusion (over k) and mask fusion (over s).

    The fusion weights are trainable parameters that start at 1/(N L) and 1/L, the constants of the
    released model, which never trained them (docs/reference_notes.md T3).
    """

    def __init__(self, key: Key[Array, ""], config: ModelConfig) -> None:
        d, c = config.language.width, config.decoder.width
        s, k = config.codebook.scales, config.codebook.tokens_per_scale
        self.projection = MLP(key, (d, d, c), "embed embed decoder", jax.nn.relu)
        self.token_fusion = constant(1 / (s * k), (s, k), "scale codebook")
        self.mask_fusion = constant(1 / s, (s,), "scale")

    def fuse_tokens(self, states: Float[Array, "b m s k d"]) -> Float[Array, "b m s c"]:
        """Return one query per target and scale: the weighted sum of its projected token states."""
        return jnp.einsum(
            "bmskc,sk->bmsc", self.projection(states), self.token_fusion[...].astype(states.dtype)
        )

    def fuse_masks(self, logits: Float[Array, "s b m Y X"]) -> Float[Array, "b m Y X"]:
        """Return the weighted sum of the scales' mask logits, in float32."""
        weights = self.mask_fusion[...]
        return jnp.einsum("sbmYX,s->bmYX", logits, weights, precision="highest")
