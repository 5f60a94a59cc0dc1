"""Vision encoder: CLIP ViT with one tapped hidden state per scale and a key mask for padding."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from pixellm_jax.config import VisionConfig
from pixellm_jax.model.layers import (
    LayerNorm,
    Projection,
    attend,
    normal,
    parameter,
    resize_bilinear,
    stack,
)
from pixellm_jax.sharding import constrain

WIDTH = "batch sequence vision"


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x * sigmoid(1.702 x), CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


def patch_valid(image_hw: Int[Array, "b 2"], config: VisionConfig) -> Bool[Array, "b y x"]:
    """Return which patches are valid: those whose top left pixel is inside the fitted image."""
    corner = config.patch * jnp.arange(config.grid)
    rows, columns = (corner < image_hw[:, axis, None] for axis in (0, 1))
    return rows[:, :, None] & columns[:, None, :]


def image_token_valid(valid: Bool[Array, "b y x"], side: int) -> Bool[Array, "b i"]:
    """Return the validity of the language model's image tokens: the nearest patch of the grid."""
    nearest = jnp.arange(side) * valid.shape[1] // side
    return valid[:, nearest][:, :, nearest].reshape(len(valid), -1)


def resize_positions(table: Float[Array, "position e"], config: VisionConfig) -> Array:
    """Resize the stored position table (side^2 + 1 rows) to the grid of the canvas.

    "correct": row 0 is the class position, the rest is the grid. "released": the last row counts
    as the class position and the rows before it as the grid, and the class position stays at the
    end, although the class token is row 0 of the sequence: everything is off by one row. The
    released weights were trained that way and need it.
    """
    at_end = config.position_resize == "released"
    grid, class_row = (table[:-1], table[-1:]) if at_end else (table[1:], table[:1])
    grid = grid.reshape(config.table, config.table, -1)
    if config.grid != config.table:
        grid = resize_bilinear(grid, config.grid, config.grid)
    grid = grid.reshape(config.grid**2, -1)
    return jnp.concatenate([grid, class_row] if at_end else [class_row, grid])


def initial_positions(config: VisionConfig) -> Float[Array, "position e"]:
    """Initialise the position table: 2-D sine-cosine codes, zero for the class token.

    They are as large as the patch features, so that a model trained from scratch learns positions
    early: with CLIP's initialisation, normal with 1/sqrt(e), it did not learn to locate
    shapes in the same time.
    """
    count = config.width // 4
    frequency = 100.0 ** (-jnp.arange(count) / count)
    angle = jnp.arange(config.table)[:, None] * frequency
    code = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    rows, columns = jnp.broadcast_arrays(code[:, None], code[None, :])
    grid = jnp.concatenate([rows, columns], axis=-1).reshape(config.table**2, 4 * count)
    return jnp.pad(grid, ((1, 0), (0, config.width - 4 * count)))


class VisionBlock(nnx.Module):
    """Pre-norm transformer layer: x += attention(norm(x)); x += MLP(norm(x))."""

    def __init__(self, key: Key[Array, ""], config: VisionConfig) -> None:
        keys = iter(jax.random.split(key, 6))
        e, n, h = config.width, config.heads, config.width // config.heads
        self.attention_norm = LayerNorm(e, "vision", config.eps)
        self.query = Projection(next(keys), (e, n, h), "vision heads head")
        self.key = Projection(next(keys), (e, n, h), "vision heads head")
        self.value = Projection(next(keys), (e, n, h), "vision heads head")
        self.out = Projection(next(keys), (n, h, e), "heads head vision", inputs=2)
        self.mlp_norm = LayerNorm(e, "vision", config.eps)
        self.up = Projection(next(keys), (e, config.mlp), "vision mlp")
        self.down = Projection(next(keys), (config.mlp, e), "mlp vision")

    def __call__(
        self, x: Float[Array, "b t e"], visible: Bool[Array, "b t u"]
    ) -> Float[Array, "b t e"]:
        y = self.attention_norm(x)
        query, key, value = (
            constrain(projection(y), "batch sequence heads head")
            for projection in (self.query, self.key, self.value)
        )
        x = constrain(x + self.out(attend(query, key, value, visible)), WIDTH)
        inner = constrain(quick_gelu(self.up(self.mlp_norm(x))), "batch sequence mlp")
        return constrain(x + self.down(inner), WIDTH)


class VisionEncoder(nnx.Module):
    """CLIP ViT: patches and a class token, run through the layers up to the deepest tap."""

    def __init__(self, key: Key[Array, ""], config: VisionConfig, *, remat: bool = True) -> None:
        self.config, self.remat = config, remat
        keys = iter(jax.random.split(key, 3))
        e, patch = config.width, config.patch
        self.patch = normal(
            next(keys),
            (patch, patch, 3, e),
            "kernel_rows kernel_columns colour vision",
            scale=(3 * patch**2) ** -0.5,
        )
        self.class_token = normal(next(keys), (e,), "vision", scale=e**-0.5)
        self.position = parameter(initial_positions(config), "position vision")
        self.embedding_norm = LayerNorm(e, "vision", config.eps)
        self.layers = stack(lambda k: VisionBlock(k, config), next(keys), config.layers_used)

    def __call__(
        self, pixels: Float[Array, "b Y X 3"], valid: Bool[Array, "b y x"]
    ) -> tuple[Float[Array, "b p e"], ...]:
        """Encode normalised pixels of the canvas; return the patches of the tapped states by scale.

        `valid`: patches of the fitted image; the others are never attended to
        (docs/reference_notes.md 6.5). The class token is dropped.
        """
        config = self.config
        b, grid, patch = pixels.shape[0], config.grid, config.patch
        blocks = pixels.reshape(b, grid, patch, grid, patch, 3)
        x = jnp.einsum("bywxzo,wzoe->byxe", blocks, self.patch[...].astype(pixels.dtype))
        class_token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (b, 1, x.shape[-1]))
        x = jnp.concatenate([class_token, x.reshape(b, grid**2, -1)], axis=1)
        x = x + resize_positions(self.position[...], config).astype(x.dtype)
        x = constrain(self.embedding_norm(x), WIDTH)

        visible = jnp.concatenate([jnp.ones((b, 1), bool), valid.reshape(b, -1)], axis=1)
        visible = jnp.broadcast_to(visible[:, None, :], (b, x.shape[1], x.shape[1]))

        def run(x: Array, layer: VisionBlock) -> tuple[Array, None]:
            return layer(x, visible), None

        run = jax.checkpoint(run) if self.remat else run
        states = {0: x}
        for start, stop in pairwise([0, *sorted({*config.tap_layers} - {0})]):
            part = jax.tree.map(lambda leaf: leaf[start:stop], self.layers)  # noqa: B023
            states[stop] = jax.lax.scan(run, states[start], part, unroll=not self.remat)[0]
        return tuple(states[layer][:, 1:] for layer in config.tap_layers)
