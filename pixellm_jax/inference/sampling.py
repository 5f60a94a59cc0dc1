"""Choosing the next token: the most likely one, or a draw that depends on its own row alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32, UInt32

Array = Any
"""On the host a numpy array, on the device a jax array."""


class Sampling(NamedTuple):
    """How each row chooses. `temperature` 0: the most likely token.

    Above 0, tokens are drawn from softmax(logits / temperature), cut to the fewest most likely
    tokens whose probabilities add up to `top_p` at least. The draw of a row's i-th token depends on
    its `seed` and i, so on no other row and on no earlier call.
    """

    seed: UInt32[Array, "b"]
    temperature: Float32[Array, "b"]
    top_p: Float32[Array, "b"]


def choose(
    logits: Float32[Array, "b v"], sampling: Sampling, number: Int32[Array, "b"]
) -> Int32[Array, "b"]:
    """A token per row; `number` counts the row's tokens so far. Nothing is drawn if none draws."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Int32[Array, "b"]:
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
        likely = jnp.where(nucleus(scaled, sampling.top_p), scaled, -jnp.inf)
        noise = jax.vmap(lambda seed, i: _gumbel(seed, i, logits.shape[1]))(sampling.seed, number)
        drawn = jnp.argmax(likely + noise, axis=-1).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    return jax.lax.cond((sampling.temperature > 0).any(), draw, lambda: greedy)


def nucleus(logits: Float32[Array, "b v"], top_p: Float32[Array, "b"]) -> Bool[Array, "b v"]:
    """The most likely tokens, as few as add up to `top_p`; equally likely ones go together."""
    chance = jax.nn.softmax(logits, axis=-1)
    falling = -jnp.sort(-chance, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    least = jnp.min(jnp.where(before < top_p[:, None], falling, falling[:, :1]), axis=-1)
    return chance >= least[:, None]


def _gumbel(seed: UInt32[Array, ""], number: Int32[Array, ""], size: int) -> Float[Array, "v"]:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), number), (size,))
