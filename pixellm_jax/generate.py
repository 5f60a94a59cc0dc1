"""Greedy decoding with a key/value cache; the states before each new token are kept on the way."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pixellm_jax.model.pixellm import ImageFeatures, PixelLM


class Generation(NamedTuple):
    """New ids per row, how many of them count (the stop token included), and their states.

    `states[:, i]` is the final-norm state that predicted `tokens[:, i]`: what the codebook reads.
    """

    tokens: Int[Array, "b t"]
    length: Int[Array, "b"]
    states: Float[Array, "b t d"]


@partial(jax.jit, static_argnames=("budget", "stop"))
def generate(
    model: PixelLM,
    image: ImageFeatures,
    tokens: Int[Array, "b t"],
    length: Int[Array, "b"],
    *,
    budget: int,
    stop: int,
) -> Generation:
    """Up to `budget` new tokens per row, ending at the id `stop`.

    `tokens`: prompts, padded on the right; `length`: their true lengths. The prompt runs once;
    every further token costs one pass over one position. Compiles once per shape and budget.
    """
    language = model.language_model
    b, t = tokens.shape
    at = jnp.arange(t)
    prompt = (at < length[:, None]) & model.token_valid(tokens, image.token_valid)
    x = model.embed(tokens, image.tokens)
    cache = language.empty_cache(b, t + budget, x.dtype)
    causal = jnp.tril(jnp.ones((t, t), bool)) & prompt[:, None, :]
    visible = jnp.concatenate([causal, jnp.zeros((b, t, budget), bool)], axis=2)
    position = jnp.broadcast_to(at, (b, t))
    hidden, cache = language.extend(x, position, visible, cache, 0)
    state = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
    token = _choose(model, state)

    def unfinished(carry: tuple) -> Array:
        step, _, _, _, _, done = carry
        return (step < budget) & ~done.all()

    def advance(carry: tuple) -> tuple:
        step, cache, token, out, states, done = carry
        written = jnp.broadcast_to(jnp.arange(budget) < step, (b, budget))
        visible = jnp.concatenate([prompt, written], axis=1)[:, None]
        x = model.embed(token, image.tokens)
        position = (length + step - 1)[:, None]
        state, cache = language.extend(x, position, visible, cache, t + step - 1)
        token = _choose(model, state)
        out = jax.lax.dynamic_update_slice(out, token, (0, step))
        states = jax.lax.dynamic_update_slice(states, state, (0, step, 0))
        return step + 1, cache, token, out, states, done | (token[:, 0] == stop)

    out = jnp.full((b, budget), stop, jnp.int32).at[:, :1].set(token)
    states = jnp.zeros((b, budget, state.shape[-1]), state.dtype).at[:, :1].set(state)
    carry = (jnp.int32(1), cache, token, out, states, token[:, 0] == stop)
    step, _, _, out, states, _ = jax.lax.while_loop(unfinished, advance, carry)
    ended = jnp.argmax(out == stop, axis=1) + 1
    stopped = (out == stop).any(axis=1) & (ended <= step)
    return Generation(out, jnp.where(stopped, ended, step), states)


def _choose(model: PixelLM, state: Float[Array, "b 1 d"]) -> Int[Array, "b 1"]:
    return jnp.argmax(model.language_model.logits(state), axis=-1).astype(jnp.int32)
