"""Pixel decoder: a mask decoder as in Segment Anything, one two-way transformer per scale.

Neck and upsampling depend on the image only; Fourier positions, transformers and the hypernetwork
that turns a token into mask weights run per target.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    interleave,
    normal,
    resize_bilinear,
)
from pixellm_jax.sharding import constrain

MAP, PIXELS = "batch rows columns decoder", "batch target patch decoder"
TOKENS, MASKS = "batch target query decoder", "batch target mask_rows mask_columns"

PIXEL_EPS = 1e-6
TOKEN_EPS = 1e-5
"""Epsilon of the norms over channels of a feature map, and over tokens."""

TOKEN_SCALE = 0.02
"""Initial standard deviation of the tokens that all targets share. (The reference uses 1, which
leaves little of the query after the first attention and its norm.)"""


class Neck(nnx.Module):
    """Feature neck: 1x1 convolution, norm, 3x3 convolution (zero padding 1), norm; no biases."""

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
        x = constrain(self.reduce_norm(self.reduce(x)), MAP)
        x = jax.lax.conv_general_dilated(
            x,
            self.mix[...].astype(x.dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return constrain(self.mix_norm(x), MAP)


class FourierPositions(nnx.Module):
    """Random Fourier features of pixel centres; the matrix is stored with the weights."""

    def __init__(self, key: Key[Array, ""], width: int) -> None:
        self.matrix = Constant(jax.random.normal(key, (2, width // 2)), axes="coordinate frequency")

    def __call__(self, rows: int, columns: int) -> Float[Array, "p c"]:
        """Return the float32 codes of a grid, row-major: sin, cos of 2 pi (x, y) M in [-1, 1]^2."""
        y, x = ((2 * jnp.arange(size) + 1) / size - 1 for size in (rows, columns))
        centres = jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None]), axis=-1)
        turns = jnp.matmul(centres.reshape(-1, 2), self.matrix[...], precision="highest")
        angle = 2 * jnp.pi * turns
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class DecoderAttention(nnx.Module):
    """Multi-head attention with its own inner width.

    Cross-attention has a few tokens and thousands of pixels, so `read` and `write` move the
    projections of the pixels to the tokens: q . (W x) = (W^T q) . x, and the sum of w (W x) =
    W (sum of w x). Pixels are never projected.
    """

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

    def read(
        self,
        tokens: Float[Array, "b m t c"],
        coded: Float[Array, "b m p c"],
        pixels: Float[Array, "b m p c"],
    ) -> Float[Array, "b m t c"]:
        """Attend from tokens (queries) to pixels: `coded` are the keys, `pixels` the values.

        The bias of the keys adds a constant to all scores of a token, which a softmax ignores.
        """
        query = self.query(tokens)
        projected = jnp.einsum("bmtnh,cnh->bmntc", query, self.key.weight[...].astype(query.dtype))
        weights = jax.nn.softmax(_scores(projected, coded, query.shape[-1]), axis=-1)
        mean = jnp.einsum("bmntp,bmpc->bmntc", weights.astype(pixels.dtype), pixels)
        value = jnp.einsum("bmntc,cnh->bmtnh", mean, self.value.weight[...].astype(mean.dtype))
        return self.out(value + _bias(self.value, value.dtype))

    def write(
        self,
        coded: Float[Array, "b m p c"],
        keys: Float[Array, "b m t c"],
        tokens: Float[Array, "b m t c"],
    ) -> Float[Array, "b m p c"]:
        """Attend from pixels (`coded` are the queries) to tokens: `keys` and `tokens` as values."""
        key, value = self.key(keys), self.value(tokens)
        projected = jnp.einsum("bmtnh,cnh->bmntc", key, self.query.weight[...].astype(key.dtype))
        bias = jnp.einsum("bmtnh,nh->bmnt", key, _bias(self.query, key.dtype))
        scores = _scores(projected, coded, key.shape[-1], bias)
        output = jnp.einsum("bmtnh,nhc->bmntc", value, self.out.weight[...].astype(value.dtype))
        weights = jax.nn.softmax(scores, axis=-2).astype(output.dtype)
        attended = jnp.einsum("bmntp,bmntc->bmpc", weights, output)
        return attended + _bias(self.out, attended.dtype)


def _bias(projection: Projection, dtype: jnp.dtype) -> Float[Array, "..."]:
    assert projection.bias is not None  # all projections of the decoder's attention have one
    return projection.bias[...].astype(dtype)


def _scores(
    projected: Float[Array, "b m n t c"],
    coded: Float[Array, "b m p c"],
    head: int,
    bias: Float[Array, "b m n t"] | None = None,
) -> Float[Array, "b m n t p"]:
    """Return float32 scores of every token at every pixel; `bias` is added per token."""
    scores = jnp.einsum("bmntc,bmpc->bmntp", projected, coded, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias[..., None]
    return scores * head**-0.5


class TwoWayLayer(nnx.Module):
    """Two-way layer (post-norm): tokens to tokens, tokens to image, MLP, image to tokens."""

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
        if self.first:  # the first layer has neither codes nor a residual
            tokens = self.token_attention(tokens, tokens, tokens)
        else:
            coded = tokens + token_code
            tokens = tokens + self.token_attention(coded, coded, tokens)
        tokens = self.token_norm(tokens)
        read = self.token_to_image.read(tokens + token_code, image + image_code, image)
        tokens = self.image_read_norm(tokens + read)
        tokens = self.mlp_norm(tokens + self.mlp(tokens))
        coded = image + image_code
        image = image + self.image_to_token.write(coded, tokens + token_code, tokens)
        return constrain(tokens, TOKENS), constrain(self.image_norm(image), PIXELS)


class TwoWayTransformer(nnx.Module):
    """Two-way layers, then a last attention of the tokens to the image."""

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
        read = self.token_to_image.read(tokens + token_code, image + image_code, image)
        return self.norm(tokens + read), image


class Upsample(nnx.Module):
    """Upsampling by 2: transposed convolution, norm over channels, GELU."""

    def __init__(self, key: Key[Array, ""], inputs: int, outputs: int) -> None:
        self.convolution = UpConvolution(key, inputs, outputs)
        self.norm = LayerNorm(outputs, "out", PIXEL_EPS)

    def __call__(self, x: Float[Array, "... y x c"]) -> Float[Array, "... Y X o"]:
        return interleave(self.blocks(x))

    def blocks(self, x: Float[Array, "... y x c"]) -> Float[Array, "... y x w z o"]:
        """Return the 2x2 block of every pixel on axes of its own."""
        return gelu(self.norm(self.convolution.blocks(x)))


class PixelDecoder(nnx.Module):
    """Decoder of image features and one query per target and scale to mask logits per scale.

    Scale 0 works on the patch grid. Every further scale works on the grid upsampled 2x by its own
    transposed convolution, each pixel multiplied by 1 + sigmoid(mask of the previous scale).
    """

    def __init__(self, key: Key[Array, ""], config: ModelConfig) -> None:
        self.config, self.remat = config.decoder, config.remat
        decoder = config.decoder
        scales, c = config.codebook.scales, decoder.width
        keys = iter(jax.random.split(key, 7 + 3 * scales))
        self.neck = Neck(next(keys), config.language.width, c)
        self.dense = normal(next(keys), (c,), "decoder", scale=TOKEN_SCALE)
        self.score_token = normal(next(keys), (c,), "decoder", scale=TOKEN_SCALE)
        self.mask_tokens = normal(
            next(keys), (decoder.mask_tokens, c), "query decoder", scale=TOKEN_SCALE
        )
        self.level = normal(next(keys), (scales, c), "scale decoder", scale=TOKEN_SCALE)
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
        """Return the features that depend on the image only: [b y x c] per scale, 1.. upsampled."""
        first, *rest = (self.neck(projected[:, s]) for s in range(projected.shape[1]))
        return (first, *(up(x) for up, x in zip(self.upsamples, rest, strict=True)))

    def __call__(
        self, features: tuple[Array, ...], queries: Float[Array, "b m s c"]
    ) -> Float[Array, "s b m Y X"]:
        """Return float32 mask logits of all targets, each scale at 4x the patch grid."""
        grid = 4 * features[0].shape[1]
        masks: list[Array] = []
        previous = None
        for scale, image in enumerate(features):
            decode: Callable[..., Array] = partial(self._decode, scale)
            decode = jax.checkpoint(decode) if self.remat else decode
            previous = decode(image, queries[:, :, scale], previous)
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
        tokens = constrain(tokens + self.level[...][scale].astype(dtype), TOKENS)

        gain = jnp.ones((b, m, y, x), dtype)
        if previous is not None:
            gain = 1 + jax.nn.sigmoid(_resize_masks(previous, y)).astype(dtype)
        # An einsum, because its gradient, a sum over targets, is then fast on a CPU too.
        pixels = jnp.einsum("bmyx,byxc->bmyxc", gain, image) + self.dense[...].astype(dtype)
        pixels = constrain(pixels.reshape(b, m, y * x, c), PIXELS)
        code = self.positions[scale](y, x).astype(dtype)
        tokens, pixels = self.transformers[scale](tokens, pixels, code)

        upscaled = self.output.blocks(pixels.reshape(b, m, y, x, c))
        weights = self.hypernetwork(tokens[:, :, 1])
        logits = jnp.einsum(
            "bmyxwzo,bmo->bmyxwz", upscaled, weights, preferred_element_type=jnp.float32
        )
        return constrain(interleave(logits[..., None])[..., 0], MASKS)


def _resize_masks(masks: Float[Array, "b m Y X"], side: int) -> Array:
    return resize_bilinear(masks[..., None], side, side)[..., 0]
