"""Language model: LLaMA, stacked and scanned, with its key/value cache as a value."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from pixellm_jax.config import LanguageConfig
from pixellm_jax.model.layers import Projection, RMSNorm, attend, normal, rotary, stack


class Cache(NamedTuple):
    """Keys (rotated) and values of every layer at every position of a fixed-length sequence."""

    key: Float[Array, "l b u g h"]
    value: Float[Array, "l b u g h"]


class LanguageBlock(nnx.Module):
    """RMSNorm, rotary attention with grouped key/value heads, SwiGLU."""

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

    def qkv(self, x: Float[Array, "b t d"], position: Int[Array, "b t"]) -> tuple[Array, ...]:
        """Rotated queries and keys, and values, of the normed input."""
        y = self.attention_norm(x)
        query = rotary(self.query(y), position, self.theta)
        return query, rotary(self.key(y), position, self.theta), self.value(y)

    def finish(
        self, x: Float[Array, "b t d"], attended: Float[Array, "b t n h"]
    ) -> Float[Array, "b t d"]:
        """Adds what attention found, then the MLP."""
        x = x + self.out(attended)
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class LanguageModel(nnx.Module):
    """Token embeddings, the layers, the final norm and the head (untied)."""

    def __init__(self, key: Key[Array, ""], config: LanguageConfig) -> None:
        self.config = config
        keys = iter(jax.random.split(key, 3))
        v, d = config.vocabulary, config.width
        self.embedding = normal(next(keys), (v, d), "vocab embed", scale=0.02)
        self.layers = stack(lambda k: LanguageBlock(k, config), next(keys), config.layers)
        self.norm = RMSNorm(d, "embed", config.eps)
        self.head = normal(next(keys), (v, d), "vocab embed", scale=0.02)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Embeddings of ids in the parameter's dtype; negative ids (image positions) give row 0."""
        return self.embedding[...][jnp.maximum(tokens, 0)]

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Float32 logits of the next token."""
        head = self.head[...].astype(hidden.dtype)
        return jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        position: Int[Array, "b t"],
        visible: Bool[Array, "b t u"],
    ) -> Float[Array, "b t d"]:
        """Final-norm states of a whole sequence (u = t). Layers are rematerialised."""

        def run(x: Array, layer: LanguageBlock) -> tuple[Array, None]:
            query, key, value = layer.qkv(x, position)
            return layer.finish(x, attend(query, key, value, visible)), None

        return self.norm(jax.lax.scan(jax.checkpoint(run), x, self.layers)[0])

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """A cache of zeros for sequences of up to `length` positions."""
        config = self.config
        shape = (config.layers, batch, length, config.kv_heads, config.head)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def extend(
        self,
        x: Float[Array, "b t d"],
        position: Int[Array, "b t"],
        visible: Bool[Array, "b t u"],
        cache: Cache,
        start: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Final-norm states of t new positions, and the cache with them written from `start` on.

        `visible` covers the whole cache, the new positions included. Equal to the same rows of the
        full forward pass. The cache is carried through the layers so that it is updated in place.
        """

        def run(carry: tuple[Array, Cache], step: tuple[Array, LanguageBlock]) -> tuple:
            (x, cache), (index, layer) = carry, step
            query, key, value = layer.qkv(x, position)
            cache = Cache(
                *(
                    jax.lax.dynamic_update_slice(old, new[None], (index, 0, start, 0, 0))
                    for old, new in zip(cache, (key, value), strict=True)
                )
            )
            key, value = (jax.lax.dynamic_index_in_dim(a, index, 0, False) for a in cache)
            return (layer.finish(x, attend(query, key, value, visible)), cache), None

        layers = jnp.arange(self.config.layers)
        (x, cache), _ = jax.lax.scan(run, (x, cache), (layers, self.layers))
        return self.norm(x), cache
