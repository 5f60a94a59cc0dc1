"""What the boxes are made of: parameters with named axes, projections, norms, rotary, attention.

Activations carry the compute dtype; weights are cast to it where they are used. Norms, softmax and
positional codes are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from pixellm_jax.axes import logical_axes

Module = TypeVar("Module", bound=nnx.Module)


class Constant(nnx.Variable):
    """A stored array that is never trained, such as the matrix of random Fourier features."""


def normal(
    key: Key[Array, ""], shape: tuple[int, ...], axes: str, *, scale: float | None = None
) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution; one axis name per axis.

    `scale` is the standard deviation; without it, 1 / sqrt(product of all axes but the last).
    """
    if scale is None:
        scale = float(np.prod(shape[:-1])) ** -0.5
    return _param(scale * jax.random.normal(key, shape), axes)


def constant(value: float, shape: tuple[int, ...], axes: str) -> nnx.Param:
    """A float32 parameter that starts with every entry equal to `value`."""
    return _param(jnp.full(shape, value, jnp.float32), axes)


def _param(value: Array, axes: str) -> nnx.Param:
    if len(logical_axes(axes)) != value.ndim:
        raise ValueError(f"axes {axes!r} do not name the {value.ndim} axes of {value.shape}")
    return nnx.Param(value, axes=axes)


def stack(
    build: Callable[[Key[Array, ""]], Module], key: Key[Array, ""], count: int, axis: str = "layer"
) -> Module:
    """`count` modules as one, with a leading axis on every parameter, for `jax.lax.scan`."""
    stacked = jax.vmap(build)(jax.random.split(key, count))
    for _, variable in nnx.to_flat_state(nnx.state(stacked)):
        variable.set_metadata(axes=f"{axis} {variable.get_metadata()['axes']}")
    return stacked


class Projection(nnx.Module):
    """y = x w + b over the last `inputs` axes of x.

    `shape` and `axes` list the input axes, then the output axes, so that heads keep an axis of
    their own: ("embed", "heads", "head") takes d to n h, ("heads", "head", "embed") with `inputs=2`
    takes n h to d.
    """

    def __init__(
        self,
        key: Key[Array, ""],
        shape: tuple[int, ...],
        axes: str,
        *,
        inputs: int = 1,
        bias: bool = True,
    ) -> None:
        self.inputs = inputs
        fan_in = float(np.prod(shape[:inputs]))
        self.weight = normal(key, shape, axes, scale=fan_in**-0.5)
        names = " ".join(axes.split()[inputs:])
        self.bias = constant(0.0, shape[inputs:], names) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = jnp.tensordot(x, self.weight[...].astype(x.dtype), self.inputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in float32."""

    def __init__(self, width: int, axis: str, eps: float) -> None:
        self.eps = eps
        self.weight = constant(1.0, (width,), axis)
        self.bias = constant(0.0, (width,), axis)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (LLaMA)."""

    def __init__(self, width: int, axis: str, eps: float) -> None:
        self.eps = eps
        self.weight = constant(1.0, (width,), axis)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.weight[...]).astype(x.dtype)


class MLP(nnx.Module):
    """Projections with an activation between them (none after the last).

    `widths` and `axes` run from input to output, e.g. (1024, 8192, 4096), "vision mlp embed".
    """

    def __init__(
        self,
        key: Key[Array, ""],
        widths: tuple[int, ...],
        axes: str,
        activation: Callable[[Array], Array],
    ) -> None:
        self.activation = activation
        names = axes.split()
        keys = jax.random.split(key, len(widths) - 1)
        self.layers = nnx.List(
            [
                Projection(keys[i], widths[i : i + 2], f"{names[i]} {names[i + 1]}")
                for i in range(len(widths) - 1)
            ]
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class UpConvolution(nnx.Module):
    """Transposed convolution with kernel 2 and stride 2: every pixel becomes its own 2x2 block.

    Kernels do not overlap, so it is one matrix product. `weight` is [in, row, column, out].
    """

    def __init__(self, key: Key[Array, ""], inputs: int, outputs: int) -> None:
        self.weight = normal(
            key,
            (inputs, 2, 2, outputs),
            "decoder kernel_rows kernel_columns out",
            scale=inputs**-0.5,
        )
        self.bias = constant(0.0, (outputs,), "out")

    def __call__(self, x: Float[Array, "... y x c"]) -> Float[Array, "... Y X o"]:
        *lead, y, x_, _ = x.shape
        blocks = jnp.einsum("...yxc,cwzo->...ywxzo", x, self.weight[...].astype(x.dtype))
        return blocks.reshape(*lead, 2 * y, 2 * x_, blocks.shape[-1]) + self.bias[...].astype(
            x.dtype
        )


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


def rotary(
    x: Float[Array, "b t n h"], position: Int[Array, "b t"], theta: float
) -> Float[Array, "b t n h"]:
    """Rotates the two halves of each head by position * theta^(-2i/h) (LLaMA, half-split pairs)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[..., None, None] * frequency
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attend(
    query: Float[Array, "... t n h"],
    key: Float[Array, "... u g h"],
    value: Float[Array, "... u g h"],
    visible: Bool[Array, "... t u"] | None = None,
) -> Float[Array, "... t n h"]:
    """softmax(q k^T / sqrt(h)) v with grouped key/value heads (n a multiple of g), softmax float32.

    `visible[t, u]`: position t sees position u. A row that sees nothing gets finite nonsense.
    """
    *lead, t, n, h = query.shape
    grouped = query.reshape(*lead, t, key.shape[-2], n // key.shape[-2], h)
    scores = jnp.einsum("...tgah,...ugh->...gatu", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * h**-0.5
    if visible is not None:
        scores = jnp.where(visible[..., None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("...gatu,...ugh->...tgah", weights, value).reshape(*lead, t, n, h)


def resize_bilinear(x: Float[Array, "... y x c"], rows: int, columns: int) -> Array:
    """Bilinear resize with half-pixel centres and no antialias (torch align_corners=False)."""
    shape = (*x.shape[:-3], rows, columns, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False)
