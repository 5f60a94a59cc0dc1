"""Token sampling: greedy, or temperature with top-p (nucleus), reproducible for each row."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32, UInt32

Array = Any
"""A numpy array on the host, a jax array on the device."""


class Sampling(NamedTuple):
    """Sampling parameters of each row.

    The i-th token of a row depends on the row's `seed` and on i only: neither the other rows of the
    batch nor earlier calls change it.

    Attributes:
        seed: seed of the row's random numbers.
        temperature: 0 selects the most likely token; above 0, tokens are sampled from
            softmax(logits / temperature).
        top_p: probability mass to sample from: the smallest set of most likely tokens whose
            probabilities sum to at least `top_p`.
    """

    seed: UInt32[Array, "b"]
    temperature: Float32[Array, "b"]
    top_p: Float32[Array, "b"]


def sample_tokens(
    logits: Float32[Array, "b v"], sampling: Sampling, index: Int32[Array, "b"]
) -> Int32[Array, "b"]:
    """Select one token per row, whose index in its row's answer is `index`.

    If all rows are greedy, the sampling branch is skipped.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample() -> Int32[Array, "b"]:
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
        likely = jnp.where(nucleus(scaled, sampling.top_p), scaled, -jnp.inf)
        noise = jax.vmap(lambda seed, i: _gumbel(seed, i, logits.shape[1]))(sampling.seed, index)
        sampled = jnp.argmax(likely + noise, axis=-1).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, sampled, greedy)

    return jax.lax.cond((sampling.temperature > 0).any(), sample, lambda: greedy)


def nucleus(logits: Float32[Array, "b v"], top_p: Float32[Array, "b"]) -> Bool[Array, "b v"]:
    """Select the most likely tokens whose probabilities sum to `top_p`; ties stay together."""
    probs = jax.nn.softmax(logits, axis=-1)
    descending = -jnp.sort(-probs, axis=-1)
    mass_before = jnp.cumsum(descending, axis=-1) - descending
    in_nucleus = mass_before < top_p[:, None]
    threshold = jnp.min(jnp.where(in_nucleus, descending, descending[:, :1]), axis=-1)
    return probs >= threshold[:, None]


def _gumbel(seed: UInt32[Array, ""], index: Int32[Array, ""], size: int) -> Float[Array, "v"]:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), (size,))
