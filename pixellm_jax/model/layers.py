"""Building blocks: parameters with named axes, projections, norms, rotary embedding, attention.

Activations have the compute dtype; weights are cast to it where they are used. Norms, softmax and
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
    """Initialise a float32 parameter from a normal distribution; one axis name per axis.

    `scale` is the standard deviation; the default is 1 / sqrt(product of all axes but the last).
    """
    if scale is None:
        scale = float(np.prod(shape[:-1])) ** -0.5
    return parameter(scale * jax.random.normal(key, shape), axes)


def constant(value: float, shape: tuple[int, ...], axes: str) -> nnx.Param:
    """Initialise a float32 parameter with every entry equal to `value`."""
    return parameter(jnp.full(shape, value, jnp.float32), axes)


def parameter(value: Array, axes: str) -> nnx.Param:
    """Initialise a parameter at `value`; one axis name per axis.

    Raises:
        ValueError: the number of names differs, or a name is not in the legend.
    """
    if len(logical_axes(axes)) != value.ndim:
        raise ValueError(f"axes {axes!r} do not name the {value.ndim} axes of {value.shape}")
    return nnx.Param(value, axes=axes)


def stack(
    build: Callable[[Key[Array, ""]], Module], key: Key[Array, ""], count: int, axis: str = "layer"
) -> Module:
    """Build `count` modules as one, with a leading axis on every parameter, for `jax.lax.scan`."""
    stacked = jax.vmap(build)(jax.random.split(key, count))
    for _, variable in nnx.to_flat_state(nnx.state(stacked)):
        variable.set_metadata(axes=f"{axis} {variable.get_metadata()['axes']}")
    return stacked


def unstack(stacked: Module, count: int, *, consume: bool = False) -> list[Module]:
    """Split a module built by `stack` into its `count` modules.

    `consume`: delete each stacked array after it has been sliced, so that memory never holds all of
    them twice.
    """
    graph, state = nnx.split(stacked)
    leaves, tree = jax.tree.flatten(state)
    slices: list[list[Array]] = []
    for leaf in leaves:
        slices.append([leaf[i] for i in range(count)])
        if consume:
            jax.block_until_ready(slices[-1])
            leaf.delete()
    modules = [
        nnx.merge(graph, jax.tree.unflatten(tree, layer)) for layer in zip(*slices, strict=True)
    ]
    for module in modules:
        for _, variable in nnx.to_flat_state(nnx.state(module)):
            axes = variable.get_metadata()["axes"].split()
            variable.set_metadata(axes=" ".join(axes[1:]))
    return modules


class Projection(nnx.Module):
    """Linear layer y = x w + b over the last `inputs` axes of x.

    Heads keep an axis of their own: axes ("embed", "heads", "head") map d to n h, and ("heads",
    "head", "embed") with `inputs=2` map n h to d.

    Args:
        key: of the initial weights.
        shape: sizes of the input axes, then of the output axes.
        axes: their names.
        inputs: number of input axes.
        bias: add b, initialised to zero.
        gain: standard deviation of y for inputs of standard deviation 1, at initialisation.

    Attributes:
        lora: a LoRA pair whose output is added (see `lora.add_lora`), or None.
    """

    def __init__(
        self,
        key: Key[Array, ""],
        shape: tuple[int, ...],
        axes: str,
        *,
        inputs: int = 1,
        bias: bool = True,
        gain: float = 1.0,
    ) -> None:
        self.inputs = inputs
        fan_in = float(np.prod(shape[:inputs]))
        self.weight = normal(key, shape, axes, scale=gain * fan_in**-0.5)
        names = " ".join(axes.split()[inputs:])
        self.bias = constant(0.0, shape[inputs:], names) if bias else None
        self.lora: nnx.Module | None = nnx.data(None)

    def __call__(
        self, x: Float[Array, "..."], key: Key[Array, ""] | None = None
    ) -> Float[Array, "..."]:
        """Project x; `key` samples the dropout of the LoRA pair, in training."""
        y = jnp.tensordot(x, self.weight[...].astype(x.dtype), self.inputs)
        if self.lora is not None:
            y = y + self.lora(x, key)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm (x - mean) / sqrt(var + eps) * weight + bias over the last axis, in float32."""

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
    """RMS norm x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (LLaMA)."""

    def __init__(self, width: int, axis: str, eps: float) -> None:
        self.eps = eps
        self.weight = constant(1.0, (width,), axis)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.weight[...]).astype(x.dtype)


class MLP(nnx.Module):
    """Projections with an activation between them (none after the last).

    `widths` and `axes` run from input to output, e.g. (1024, 8192, 4096), "vision mlp embed". The
    initial weights compensate for the half of the variance that ReLU-like activations remove.
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
                Projection(
                    keys[i],
                    widths[i : i + 2],
                    f"{names[i]} {names[i + 1]}",
                    gain=2**0.5 if i < len(widths) - 2 else 1.0,
                )
                for i in range(len(widths) - 1)
            ]
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class UpConvolution(nnx.Module):
    """Transposed convolution with kernel 2 and stride 2: every pixel becomes a 2x2 block.

    Kernels do not overlap, so this is one matrix product. `weight` is [in, row, column, out].
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
        return interleave(self.blocks(x))

    def blocks(self, x: Float[Array, "... y x c"]) -> Float[Array, "... y x w z o"]:
        """Return the block of every pixel on axes of its own: the matrix product itself."""
        blocks = jnp.tensordot(x, self.weight[...].astype(x.dtype), 1)
        return blocks + self.bias[...].astype(x.dtype)


def interleave(blocks: Float[Array, "... y x w z o"]) -> Float[Array, "... Y X o"]:
    """Arrange the blocks of all pixels in one grid: Y = y w, X = x z."""
    *lead, y, x, w, z, o = blocks.shape
    return jnp.swapaxes(blocks, -4, -3).reshape(*lead, y * w, x * z, o)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


def rotary(
    x: Float[Array, "b t n h"], position: Int[Array, "b t"], theta: float
) -> Float[Array, "b t n h"]:
    """Rotary position embedding: rotate pairs (i, i + h/2) by position * theta^(-2i/h) (LLaMA)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[..., None, None] * frequency
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def attend(
    query: Float[Array, "... t n h"],
    key: Float[Array, "... u g h"],
    value: Float[Array, "... u g h"],
    visible: Bool[Array, "... t u"] | None = None,
) -> Float[Array, "... t n h"]:
    """Grouped-query attention softmax(q k^T / sqrt(h)) v, with a float32 softmax.

    n is a multiple of g. `visible[t, u]`: position t attends to position u; the result for a row
    without any is finite but meaningless. On a GPU, long sequences in half precision use cuDNN's
    fused attention, everything else XLA.
    """
    if _suits_cudnn(query, key):
        mask = None if visible is None else visible[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    *lead, t, n, h = query.shape
    g = key.shape[-2]
    # With heads before positions, each head is one matrix product.
    heads = jnp.swapaxes(query * h**-0.5, -2, -3).reshape(*lead, g, n // g, t, h)
    key, value = jnp.swapaxes(key, -2, -3), jnp.swapaxes(value, -2, -3)
    scores = jnp.einsum("...gath,...guh->...gatu", heads, key, preferred_element_type=jnp.float32)
    if visible is not None:
        scores = jnp.where(visible[..., None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    attended = jnp.einsum(
        "...gatu,...guh->...gath",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    attended = (attended / weights.sum(-1)[..., None]).astype(query.dtype)
    return jnp.swapaxes(attended.reshape(*lead, n, t, h), -2, -3)


def _suits_cudnn(query: Float[Array, "... t n h"], key: Float[Array, "... u g h"]) -> bool:
    """Return whether cuDNN supports the inputs (gradients included) and is faster than XLA."""
    *lead, t, _, h = query.shape
    return (
        jax.default_backend() == "gpu"
        and len(lead) == 1
        and query.dtype == key.dtype
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and (t >= 64 and t % 2 == 0 and key.shape[1] % 2 == 0)
        and (h <= 128 and h % 8 == 0)
    )


def resize_bilinear(x: Float[Array, "... y x c"], rows: int, columns: int) -> Array:
    """Resize bilinearly, with half-pixel centres and no antialias (torch align_corners=False)."""
    shape = (*x.shape[:-3], rows, columns, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False)
