"""Attention: the same numbers as JAX's own, and what would go to cuDNN on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from pixellm_jax.model.layers import attend

# Float32 with sums in another order, relative to the largest value.
TOLERANCE = 1e-5

GOOD = (2, 64, 130, 6, 2, 40)  # b t u n g h


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def inputs(b: int, t: int, u: int, n: int, g: int, h: int) -> tuple[jax.Array, ...]:
    visible = np.random.default_rng(3).random((b, t, u)) < 0.5
    visible[..., 0] = True
    return draw(0, b, t, n, h), draw(1, b, u, g, h), draw(2, b, u, g, h), jnp.asarray(visible)


@pytest.mark.parametrize("seen", ["all", "some"])
@pytest.mark.parametrize("shape", [GOOD, (3, 1, 17, 4, 4, 10), (1, 7, 7, 6, 1, 8)])
def test_attention_is_that_of_jax(shape, seen):
    query, key, value, visible = inputs(*shape)
    mask = visible if seen == "some" else None
    found = attend(query, key, value, mask)
    wanted = jax.nn.dot_product_attention(
        query, key, value, mask=None if mask is None else mask[:, None], implementation="xla"
    )
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()


@pytest.fixture
def on_gpu(monkeypatch):
    """Programs for CUDA, as if a GPU and cuDNN were there; nothing is run."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)

    def calls(shape, dtype, function) -> int:
        arrays = [x.astype(dtype) if x.dtype == jnp.float32 else x for x in inputs(*shape)]
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("@__cudnn$fmha")

    return calls


@pytest.mark.parametrize(
    ("shape", "dtype", "calls"),
    [
        (GOOD, "bfloat16", 1),
        (GOOD, "float16", 1),
        (GOOD, "float32", 0),
        ((2, 1, 130, 6, 2, 40), "bfloat16", 0),  # decoding
        ((2, 65, 130, 6, 2, 40), "bfloat16", 0),  # its gradient does not take odd lengths
        ((2, 64, 131, 6, 2, 40), "bfloat16", 0),
        ((2, 64, 130, 6, 2, 36), "bfloat16", 0),
        ((2, 64, 130, 6, 2, 136), "bfloat16", 0),
    ],
)
def test_what_goes_to_cudnn(on_gpu, shape, dtype, calls):
    assert on_gpu(shape, jnp.dtype(dtype), attend) == calls


def test_gradients_go_to_cudnn_too(on_gpu):
    def slope(query, key, value, visible):
        def total(*arrays):
            return attend(*arrays, visible).astype(jnp.float32).sum()

        return jax.grad(total, argnums=(0, 1, 2))(query, key, value)

    assert on_gpu(GOOD, jnp.dtype("bfloat16"), slope) == 2


def test_here_nothing_goes_to_cudnn():
    arrays = [x.astype(jnp.bfloat16) for x in inputs(*GOOD)[:3]]
    assert "cudnn" not in jax.jit(attend).lower(*arrays).as_text()
