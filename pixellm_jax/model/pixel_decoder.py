"""Pixel decoder: neck, Fourier positions, one two-way transformer per scale, hypernetwork masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from pixellm_jax.config import DecoderConfig, ModelConfig
from pixellm_jax.model.layers import (
    MLP,
    Constant,
    LayerNorm,
    Projection,
    UpConvolution,
    attend,
    gelu,
    normal,
    resize_bilinear,
)

PIXEL_EPS = 1e-6
TOKEN_EPS = 1e-5
"""Epsilon of the norms over channels of a feature map, and over tokens."""


class Neck(nnx.Module):
    """1x1 convolution, norm, 3x3 convolution (zero padding 1), norm; no biases."""

    def __init__(self, key: Key[Array, ""], inputs: int, width: int) -> None:
        first, second = jax.random.split(key)
        self.reduce = Projection(first, (inputs, width), "embed decoder", bias=False)
        self.reduce_norm = LayerNorm(width, "decoder", PIXEL_EPS)
        self.mix = normal(
            second,
            (3, 3, width, width),
            "kernel_rows kernel_columns decoder decoder",
            scale=(9 * width) ** -0.5,
        )
        self.mix_norm = LayerNorm(width, "decoder", PIXEL_EPS)

    def __call__(self, x: Float[Array, "b y x d"]) -> Float[Array, "b y x c"]:
        x = self.reduce_norm(self.reduce(x))
        x = jax.lax.conv_general_dilated(
            x,
            self.mix[...].astype(x.dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return self.mix_norm(x)


class FourierPositions(nnx.Module):
    """Random Fourier features of pixel centres; the matrix is imported, never redrawn."""

    def __init__(self, key: Key[Array, ""], width: int) -> None:
        self.matrix = Constant(jax.random.normal(key, (2, width // 2)), axes="coordinate frequency")

    def __call__(self, rows: int, columns: int) -> Float[Array, "p c"]:
        """Codes of a grid, row by row: sin, cos of 2 pi (x, y) M, centres in [-1, 1], float32."""
        y, x = ((2 * jnp.arange(size) + 1) / size - 1 for size in (rows, columns))
        centres = jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None]), axis=-1)
        turns = jnp.matmul(centres.reshape(-1, 2), self.matrix[...], precision="highest")
        angle = 2 * jnp.pi * turns
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class DecoderAttention(nnx.Module):
    """Multi-head attention with its own inner width."""

    def __init__(self, key: Key[Array, ""], config: DecoderConfig, inner: int) -> None:
        keys = iter(jax.random.split(key, 4))
        c, n, h = config.width, config.heads, inner // config.heads
        self.query = Projection(next(keys), (c, n, h), "decoder heads head")
        self.key = Projection(next(keys), (c, n, h), "decoder heads head")
        self.value = Projection(next(keys), (c, n, h), "decoder heads head")
        self.out = Projection(next(keys), (n, h, c), "heads head decoder", inputs=2)

    def __call__(
        self,
        query: Float[Array, "... t c"],
        key: Float[Array, "... u c"],
        value: Float[Array, "... u c"],
    ) -> Float[Array, "... t c"]:
        return self.out(attend(self.query(query), self.key(key), self.value(value)))


class TwoWayLayer(nnx.Module):
    """Tokens attend to themselves, then to the image, then the image to the tokens (post-norm)."""

    def __init__(self, key: Key[Array, ""], config: DecoderConfig, *, first: bool) -> None:
        self.first = first
        keys = iter(jax.random.split(key, 4))
        c = config.width
        self.token_attention = DecoderAttention(next(keys), config, c)
        self.token_norm = LayerNorm(c, "decoder", TOKEN_EPS)
        self.token_to_image = DecoderAttention(next(keys), config, config.inner)
        self.image_read_norm = LayerNorm(c, "decoder", TOKEN_EPS)
        self.mlp = MLP(next(keys), (c, config.mlp, c), "decoder mlp decoder", jax.nn.relu)
        self.mlp_norm = LayerNorm(c, "decoder", TOKEN_EPS)
        self.image_to_token = DecoderAttention(next(keys), config, config.inner)
        self.image_norm = LayerNorm(c, "decoder", TOKEN_EPS)

    def __call__(
        self,
        tokens: Float[Array, "b m t c"],
        image: Float[Array, "b m p c"],
        token_code: Float[Array, "b m t c"],
        image_code: Float[Array, "p c"],
    ) -> tuple[Float[Array, "b m t c"], Float[Array, "b m p c"]]:
        if self.first:  # the first layer adds neither codes nor a residual
            tokens = self.token_attention(tokens, tokens, tokens)
        else:
            coded = tokens + token_code
            tokens = tokens + self.token_attention(coded, coded, tokens)
        tokens = self.token_norm(tokens)
        read = self.token_to_image(tokens + token_code, image + image_code, image)
        tokens = self.image_read_norm(tokens + read)
        tokens = self.mlp_norm(tokens + self.mlp(tokens))
        image = image + self.image_to_token(image + image_code, tokens + token_code, tokens)
        return tokens, self.image_norm(image)


class TwoWayTransformer(nnx.Module):
    """The layers and a last reading of the image by the tokens."""

    def __init__(self, key: Key[Array, ""], config: DecoderConfig) -> None:
        *keys, last = jax.random.split(key, config.depth + 1)
        self.layers = nnx.List([TwoWayLayer(k, config, first=i == 0) for i, k in enumerate(keys)])
        self.token_to_image = DecoderAttention(last, config, config.inner)
        self.norm = LayerNorm(config.width, "decoder", TOKEN_EPS)

    def __call__(
        self,
        tokens: Float[Array, "b m t c"],
        image: Float[Array, "b m p c"],
        image_code: Float[Array, "p c"],
    ) -> tuple[Float[Array, "b m t c"], Float[Array, "b m p c"]]:
        token_code = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_code, image_code)
        read = self.token_to_image(tokens + token_code, image + image_code, image)
        return self.norm(tokens + read), image


class Upsample(nnx.Module):
    """Transposed convolution, norm over channels, GELU: twice the grid."""

    def __init__(self, key: Key[Array, ""], inputs: int, outputs: int) -> None:
        self.convolution = UpConvolution(key, inputs, outputs)
        self.norm = LayerNorm(outputs, "out", PIXEL_EPS)

    def __call__(self, x: Float[Array, "... y x c"]) -> Float[Array, "... Y X o"]:
        return gelu(self.norm(self.convolution(x)))


class PixelDecoder(nnx.Module):
    """Image features and one query per target and scale -> mask logits, scale after scale.

    Scale 0 works on the patch grid. Every further scale works on the grid upsampled 2x by its own
    transposed convolution, each pixel multiplied by 1 + sigmoid of the mask before it.
    """

    def __init__(self, key: Key[Array, ""], config: ModelConfig) -> None:
        self.config = decoder = config.decoder
        scales, c = config.codebook.scales, decoder.width
        keys = iter(jax.random.split(key, 7 + 3 * scales))
        self.neck = Neck(next(keys), config.language.width, c)
        self.dense = normal(next(keys), (c,), "decoder", scale=1.0)
        self.score_token = normal(next(keys), (c,), "decoder", scale=1.0)
        self.mask_tokens = normal(next(keys), (decoder.mask_tokens, c), "query decoder", scale=1.0)
        self.level = normal(next(keys), (scales, c), "scale decoder", scale=1.0)
        self.positions = nnx.List([FourierPositions(next(keys), c) for _ in range(scales)])
        self.transformers = nnx.List(
            [TwoWayTransformer(next(keys), decoder) for _ in range(scales)]
        )
        self.upsamples = nnx.List([Upsample(next(keys), c, c) for _ in range(scales - 1)])
        self.output = Upsample(next(keys), c, decoder.upscaled)
        self.hypernetwork = MLP(
            next(keys), (c, c, c, decoder.upscaled), "decoder decoder decoder out", jax.nn.relu
        )

    def features(self, projected: Float[Array, "b s y x d"]) -> tuple[Array, ...]:
        """What depends on the image alone: [b y x c] per scale, further scales upsampled."""
        first, *rest = (self.neck(projected[:, s]) for s in range(projected.shape[1]))
        return (first, *(up(x) for up, x in zip(self.upsamples, rest, strict=True)))

    def __call__(
        self, features: tuple[Array, ...], queries: Float[Array, "b m s c"]
    ) -> Float[Array, "s b m Y X"]:
        """Float32 mask logits of all targets at once, each scale at 4x the patch grid."""
        grid = 4 * features[0].shape[1]
        masks: list[Array] = []
        previous = None
        for scale, image in enumerate(features):
            previous = self._decode(scale, image, queries[:, :, scale], previous)
            masks.append(_resize_masks(previous, grid))
        return jnp.stack(masks)

    def _decode(
        self,
        scale: int,
        image: Float[Array, "b y x c"],
        query: Float[Array, "b m c"],
        previous: Float[Array, "b m Y X"] | None,
    ) -> Float[Array, "b m 2*y 2*x"]:
        b, m, c = query.shape
        y, x = image.shape[1:3]
        dtype = image.dtype
        learned = jnp.concatenate([self.score_token[...][None], self.mask_tokens[...]])
        learned = jnp.broadcast_to(learned.astype(dtype), (b, m, *learned.shape))
        tokens = jnp.concatenate([learned, query[:, :, None]], axis=2)
        tokens = tokens + self.level[...][scale].astype(dtype)

        pixels = jnp.broadcast_to(image[:, None], (b, m, y, x, c))
        if previous is not None:
            gain = 1 + jax.nn.sigmoid(_resize_masks(previous, y))
            pixels = pixels * gain[..., None].astype(dtype)
        pixels = (pixels + self.dense[...].astype(dtype)).reshape(b, m, y * x, c)
        code = self.positions[scale](y, x).astype(dtype)
        tokens, pixels = self.transformers[scale](tokens, pixels, code)

        upscaled = self.output(pixels.reshape(b, m, y, x, c))
        weights = self.hypernetwork(tokens[:, :, 1])
        return jnp.einsum("bmYXo,bmo->bmYX", upscaled, weights, preferred_element_type=jnp.float32)


def _resize_masks(masks: Float[Array, "b m Y X"], side: int) -> Array:
    return resize_bilinear(masks[..., None], side, side)[..., 0]
