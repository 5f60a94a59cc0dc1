"""Model FLOPs of a forward pass and of a training step, and the peak of this device.

A multiplication and an addition are two operations. The count includes the matrix products of the
model (convolutions among them) and attention over whole sequences. It excludes elementwise
operations, the resizing of masks and recomputation to save memory. LoRA pairs are left out: at rank
8 they are a thousandth of the projections they are added to.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pixellm_jax.config import ModelConfig

OTHER_TOKENS = 2
"""Tokens of the pixel decoder besides its mask tokens: the score token and the query."""

SOURCES: dict[str, tuple[str, ...]] = {
    "taps": ("vision_encoder",),
    "image tokens": ("taps", "image_projector"),
    "states": (
        "image tokens",
        "language_model.embedding",
        "language_model.layers",
        "language_model.norm",
    ),
    "projected": ("taps", "mask_projector"),
    "features": ("projected", "pixel_decoder.neck", "pixel_decoder.upsamples"),
    "queries": ("states", "codebook"),
    "decoded": ("features", "queries", "pixel_decoder"),
}
"""Activations in order of computation, with the modules and activations they depend on."""


class Parts(NamedTuple):
    """Operations by part of the model.

    Attributes:
        vision_encoder: CLIP.
        image_features: projectors, neck and upsampling, which also depend on the image only.
        language_model: the layers.
        head: logits of the next token.
        pixel_decoder: including the projection of its queries.
    """

    vision_encoder: float
    image_features: float
    language_model: float
    head: float
    pixel_decoder: float


class Product(NamedTuple):
    """Matrix products of an activation (`left`) with a module's weights or another activation."""

    operations: float
    left: str
    right: str


def forward_flops(config: ModelConfig, *, images: int, length: int, targets: int) -> Parts:
    """Return the operations of a forward pass; `length`, `targets`: per image, with padding."""
    return _count(config, frozenset(), images, length, targets)


def train_flops_of_parts(
    config: ModelConfig, trainable: frozenset[str], *, images: int, length: int, targets: int
) -> Parts:
    """Return the operations of forward and backward passes, by part.

    A product costs its forward operations once more for each of its two factors that needs a
    gradient. So a frozen weight costs only the gradient of the activation it is multiplied with,
    and only if something before it is trained. `trainable`: dotted names of parameters.
    """
    return _count(config, _needs_grad(trainable), images, length, targets)


def train_flops(
    config: ModelConfig, trainable: frozenset[str], *, images: int, length: int, targets: int
) -> float:
    """Return the sum of `train_flops_of_parts`."""
    return sum(_count(config, _needs_grad(trainable), images, length, targets))


def _count(
    config: ModelConfig, needs_grad: frozenset[str], images: int, length: int, targets: int
) -> Parts:
    def total(products: Iterator[Product]) -> float:
        return images * float(
            sum(
                p.operations * (1 + (p.left in needs_grad) + (p.right in needs_grad))
                for p in products
            )
        )

    return Parts(
        vision_encoder=total(_vision_encoder(config)),
        image_features=total(_image_features(config)),
        language_model=total(_language_model(config, length)),
        head=total(_head(config, length)),
        pixel_decoder=total(_pixel_decoder(config, targets)),
    )


def _needs_grad(trainable: frozenset[str]) -> frozenset[str]:
    """Return what needs a gradient: modules trained at least in part, and activations."""
    needs_grad = set[str]()
    for name in trainable:
        parts = name.split(".")
        if "lora" in parts:  # the states need a gradient, the weights do not
            needs_grad.add("states")
        else:
            needs_grad.update(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    for activation, sources in SOURCES.items():
        if any(source in needs_grad for source in sources):
            needs_grad.add(activation)
    return frozenset(needs_grad)


def _vision_encoder(config: ModelConfig) -> Iterator[Product]:
    vision, e = config.vision, config.vision.width
    patches, seen = vision.grid**2, vision.grid**2 + 1
    yield Product(2 * patches * 3 * vision.patch**2 * e, "", "vision_encoder.patch")
    weights = vision.layers_used * (4 * e * e + 2 * e * vision.mlp)
    yield Product(2 * seen * weights, "taps", "vision_encoder.layers")
    yield Product(vision.layers_used * 4 * seen * seen * e, "taps", "taps")


def _image_features(config: ModelConfig) -> Iterator[Product]:
    d, e = config.language.width, config.vision.width
    rows = config.codebook.scales * config.vision.grid**2
    for name, out, count in (
        ("image_projector", "image tokens", config.image_tokens),
        ("mask_projector", "projected", rows),
    ):
        yield Product(2 * count * e * 2 * d, "taps", name)
        yield Product(2 * count * 2 * d * d, out, name)
    c = config.decoder.width
    yield Product(2 * rows * d * c, "projected", "pixel_decoder.neck")
    yield Product(2 * rows * 9 * c * c, "features", "pixel_decoder.neck")
    upsampled = rows - config.vision.grid**2  # scale 0 is not upsampled
    yield Product(2 * upsampled * 4 * c * c, "features", "pixel_decoder.upsamples")


def _language_model(config: ModelConfig, length: int) -> Iterator[Product]:
    language, d = config.language, config.language.width
    heads, kv_heads = language.heads * language.head, language.kv_heads * language.head
    weights = language.layers * d * (2 * heads + 2 * kv_heads + 3 * language.mlp)
    yield Product(2 * length * weights, "states", "language_model.layers")
    yield Product(language.layers * 4 * length * length * heads, "states", "states")


def _head(config: ModelConfig, length: int) -> Iterator[Product]:
    language = config.language
    yield Product(
        2 * length * language.width * language.vocabulary, "states", "language_model.head"
    )


def _pixel_decoder(config: ModelConfig, targets: int) -> Iterator[Product]:
    decoder, d, c = config.decoder, config.language.width, config.decoder.width
    scales, patches = config.codebook.scales, config.vision.grid**2
    codes = targets * scales * config.codebook.tokens_per_scale
    yield Product(2 * codes * d * d, "states", "codebook.projection")
    yield Product(2 * codes * d * c, "queries", "codebook.projection")

    tokens = decoder.mask_tokens + OTHER_TOKENS
    pixels = patches * (1 + 4 * (scales - 1))  # summed over scales
    crossings = 2 * decoder.depth + 1  # cross-attentions: four products of tokens, two of pixels
    weights = decoder.depth * (4 * c * c + 2 * c * decoder.mlp) + crossings * 4 * c * decoder.inner
    count = targets * scales * tokens
    yield Product(2 * count * weights, "decoded", "pixel_decoder.transformers")
    yield Product(decoder.depth * 4 * count * tokens * c, "decoded", "decoded")
    reading = targets * pixels * decoder.heads * tokens * c
    yield Product(crossings * 4 * reading, "decoded", "decoded")

    out = 4 * decoder.upscaled
    yield Product(2 * targets * pixels * c * out, "decoded", "pixel_decoder.output")
    hyper = 2 * c * c + c * decoder.upscaled
    # Only one of the tokens is turned into a mask.
    yield Product(2 * targets * scales * hyper, "decoded", "pixel_decoder.hypernetwork")
    yield Product(2 * targets * pixels * out, "decoded", "decoded")


@functools.cache
def matmul_peak(dtype: str) -> float:
    """Measure the operations per second of one device in large matrix products (about 0.3 s).

    JAX's default precision: on an accelerator, float32 products may be less precise and faster.
    """
    side, products = (1024, 1) if jax.default_backend() == "cpu" else (8192, 4)
    values = np.random.default_rng(0).uniform(-1, 1, (256, 256)) * (3 / side) ** 0.5
    x = jnp.asarray(np.tile(values, (side // 256, side // 256)), dtype)

    def multiply(x: Array) -> Array:
        y = x
        for _ in range(products):
            y = y @ x
        return y

    return products * 2 * side**3 / _fastest(jax.jit(multiply), x)


@functools.cache
def copy_bandwidth() -> float:
    """Measure the bytes per second that one device reads and writes (about 0.3 s).

    In place, in a buffer larger than any cache: every byte is read once and written once.
    """
    count = (64 << 20) if jax.default_backend() == "cpu" else (256 << 20)
    x = jnp.zeros(count, jnp.float32)
    return 2 * x.nbytes / _fastest(jax.jit(lambda x: x + 1, donate_argnums=0), x, chain=True)


def _fastest(function: Callable[[Array], Array], x: Array, *, chain: bool = False) -> float:
    """Return the seconds of the fastest of many calls; `chain` passes each result to the next."""
    y = jax.block_until_ready(function(x))  # compiles
    best = float("inf")
    end = time.perf_counter() + 0.3
    while best == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        y = jax.block_until_ready(function(y if chain else x))
        best = min(best, time.perf_counter() - begin)
    return best
