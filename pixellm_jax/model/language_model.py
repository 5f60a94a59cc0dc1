"""Language model: LLaMA with stacked, scanned layers and a functional key/value cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from pixellm_jax.config import LanguageConfig
from pixellm_jax.model.layers import Projection, RMSNorm, attend, normal, rotary, stack, unstack
from pixellm_jax.sharding import constrain

WIDTH = "batch sequence embed"


class Cache(NamedTuple):
    """Key/value cache: rotated keys and values of a fixed number of positions, per layer.

    Decoding writes a few positions of an array in place. Heads come before positions, so that
    attention reads each head's positions contiguously.
    """

    key: tuple[Float[Array, "b g u h"], ...]
    value: tuple[Float[Array, "b g u h"], ...]


class LanguageBlock(nnx.Module):
    """Transformer layer: RMSNorm, rotary grouped-query attention, SwiGLU."""

    def __init__(self, key: Key[Array, ""], config: LanguageConfig) -> None:
        self.theta = config.rope_theta
        keys = iter(jax.random.split(key, 7))
        d, n, g, h = config.width, config.heads, config.kv_heads, config.head
        self.attention_norm = RMSNorm(d, "embed", config.eps)
        self.query = Projection(next(keys), (d, n, h), "embed heads head", bias=False)
        self.key = Projection(next(keys), (d, g, h), "embed kv_heads head", bias=False)
        self.value = Projection(next(keys), (d, g, h), "embed kv_heads head", bias=False)
        self.out = Projection(next(keys), (n, h, d), "heads head embed", inputs=2, bias=False)
        self.mlp_norm = RMSNorm(d, "embed", config.eps)
        self.gate = Projection(next(keys), (d, config.mlp), "embed mlp", bias=False)
        self.up = Projection(next(keys), (d, config.mlp), "embed mlp", bias=False)
        self.down = Projection(next(keys), (config.mlp, d), "mlp embed", bias=False)

    def qkv(
        self,
        x: Float[Array, "b t d"],
        position: Int[Array, "b t"],
        dropout: Key[Array, ""] | None = None,
    ) -> tuple[Array, ...]:
        """Return rotated queries, rotated keys and values of the normalised input."""
        y = self.attention_norm(x)
        keys = _keys(dropout, 0, 3)
        query, key, value = (
            constrain(projection(y, keys[i]), "batch sequence heads head")
            for i, projection in enumerate((self.query, self.key, self.value))
        )
        return rotary(query, position, self.theta), rotary(key, position, self.theta), value

    def finish(
        self,
        x: Float[Array, "b t d"],
        attended: Float[Array, "b t n h"],
        dropout: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Add the projected output of attention, then the MLP."""
        keys = _keys(dropout, 3, 4)
        x = constrain(x + self.out(attended, keys[0]), WIDTH)
        y = self.mlp_norm(x)
        inner = jax.nn.silu(self.gate(y, keys[1])) * self.up(y, keys[2])
        return constrain(x + self.down(constrain(inner, "batch sequence mlp"), keys[3]), WIDTH)


class LanguageModel(nnx.Module):
    """LLaMA: token embeddings, layers, final norm and untied head."""

    def __init__(self, key: Key[Array, ""], config: LanguageConfig, *, remat: bool = True) -> None:
        self.config, self.remat = config, remat
        keys = iter(jax.random.split(key, 3))
        v, d = config.vocabulary, config.width
        self.embedding = normal(next(keys), (v, d), "vocab embed", scale=1.0)
        self.layers = stack(lambda k: LanguageBlock(k, config), next(keys), config.layers)
        self.norm = RMSNorm(d, "embed", config.eps)
        self.head = normal(next(keys), (v, d), "vocab embed", scale=d**-0.5)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Look up embeddings, in the stored dtype; negative ids (image positions) get row 0."""
        return self.embedding[...][jnp.maximum(tokens, 0)]

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Return float32 logits of the next token."""
        head = self.head[...].astype(hidden.dtype)
        logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
        return constrain(logits, "batch sequence vocab")

    def __call__(
        self,
        x: Float[Array, "b t d"],
        position: Int[Array, "b t"],
        visible: Bool[Array, "b t u"],
        dropout: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Return the states after the final norm of whole sequences (u = t).

        `visible[t, u]`: position t attends to u. `dropout` samples that of LoRA pairs, in training.
        """

        def run(x: Array, step: tuple[LanguageBlock, Array | None]) -> tuple[Array, None]:
            layer, layer_key = step
            query, key, value = layer.qkv(x, position, layer_key)
            return layer.finish(x, attend(query, key, value, visible), layer_key), None

        keys = None if dropout is None else jax.random.split(dropout, self.config.layers)
        run = jax.checkpoint(run) if self.remat else run
        steps = (self.layers, keys)
        # A scan copies what the backward pass needs; small models, without remat, are unrolled.
        x, _ = jax.lax.scan(run, constrain(x, WIDTH), steps, unroll=not self.remat)
        return self.norm(x)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """Return a cache of zeros for sequences of up to `length` positions."""
        config = self.config
        shape = (batch, config.kv_heads, length, config.head)
        key, value = (
            tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for _ in Cache._fields
        )
        return Cache(key, value)

    def extend(
        self,
        x: Float[Array, "b t d"],
        position: Int[Array, "b t"],
        visible: Bool[Array, "b t u"],
        cache: Cache,
        place: Int[Array, "b t"],
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Run t new positions per row; return their states after the final norm, and the cache.

        The states equal the full forward pass. Layers are unrolled and each has its own
        cache arrays, so that only the new positions are copied.

        Args:
            x: embeddings of the new positions.
            position: rotary positions.
            visible: which positions of the whole cache, including new ones, each may attend to.
            cache: keys and values so far.
            place: index in the cache of each new position; one out of range is not written.
        """
        keys: list[Array] = []
        values: list[Array] = []
        for layer, old_key, old_value in zip(self.blocks(), cache.key, cache.value, strict=True):
            query, key, value = layer.qkv(x, position)
            keys.append(_write(old_key, key, place))
            values.append(_write(old_value, value, place))
            key, value = (jnp.swapaxes(arrays[-1], 1, 2) for arrays in (keys, values))
            x = layer.finish(x, attend(query, key, value, visible))
        return self.norm(x), Cache(tuple(keys), tuple(values))

    def blocks(self, *, consume: bool = False) -> list[LanguageBlock]:
        """Return the layers one by one. Slices of stacked layers are copies: `unstack` once.

        `consume`: delete the stacked layers (see `unstack`).
        """
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        return unstack(self.layers, self.config.layers, consume=consume)


def _write(
    cached: Float[Array, "b g u h"], new: Float[Array, "b t g h"], place: Int[Array, "b t"]
) -> Float[Array, "b g u h"]:
    """Return `cached` with `new` written at `place`; places out of range are dropped."""
    rows, heads = jnp.arange(new.shape[0])[:, None, None], jnp.arange(new.shape[2])[:, None]
    written = cached.at[rows, heads, place[:, None]].set(jnp.swapaxes(new, 1, 2), mode="drop")
    return constrain(written, "batch kv_heads keys head")


def _keys(key: Key[Array, ""] | None, start: int, count: int) -> list[Array | None]:
    """Return the keys number `start` to `start + count` - 1 of one layer."""
    numbers = range(start, start + count)
    return [None if key is None else jax.random.fold_in(key, number) for number in numbers]
