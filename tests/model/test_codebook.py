"""Segmentation codebook: projection and both fusions by hand, for any N and L."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixellm_jax.config import (
    CodebookConfig,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from pixellm_jax.model.codebook import Codebook

# Float32 sums of a few dozen products of order one, against float64.
TOLERANCE = 1e-5

B, M, D, C = 2, 5, 13, 24


def config_of(scales: int, tokens: int) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(taps=(-2, -11, -17)[:scales]),
        language=LanguageConfig(width=D),
        codebook=CodebookConfig(scales=scales, tokens_per_scale=tokens),
        decoder=DecoderConfig(width=C, heads=3),
    )


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def drawn(scales: int, tokens: int) -> Codebook:
    """A codebook whose parameters, biases too, are drawn by numpy: there is nothing to compile."""
    build = partial(Codebook, config=config_of(scales, tokens))
    graph, state = nnx.split(jax.eval_shape(build, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.asarray(draw(i, *leaf.shape) / 2) for i, leaf in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


@jax.jit
def fuse_tokens(codebook: Codebook, states: jax.Array) -> jax.Array:
    return codebook.fuse_tokens(states)


@pytest.mark.parametrize(("scales", "tokens"), [(1, 3), (2, 1), (3, 2)])
def test_a_query_is_the_weighted_sum_of_its_own_projected_states(scales, tokens):
    codebook = drawn(scales, tokens)
    states = draw(9, B, M, scales, tokens, D)
    found = fuse_tokens(codebook, jnp.asarray(states))
    assert found.shape == (B, M, scales, C)
    first, second = codebook.projection.layers
    weight = np.asarray(codebook.token_fusion[...], np.float64)
    for s in range(scales):
        wanted = np.zeros((B, M, C))
        for k in range(tokens):
            y = states[:, :, s, k] @ np.asarray(first.weight[...]) + np.asarray(first.bias[...])
            y = np.maximum(y, 0) @ np.asarray(second.weight[...]) + np.asarray(second.bias[...])
            wanted += weight[s, k] * y
        np.testing.assert_allclose(found[:, :, s], wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_mask_fusion_by_hand():
    codebook = drawn(3, 2)
    codebook.mask_fusion.set_value(jnp.asarray([2.0, -1.0, 0.5]))
    logits = draw(4, 3, B, M, 7, 11)
    found = codebook.fuse_masks(jnp.asarray(logits))
    wanted = 2 * logits[0] - logits[1] + logits[2] / 2
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


@pytest.mark.parametrize(("scales", "tokens"), [(1, 1), (2, 3), (3, 2)])
def test_fusions_start_at_the_constants_of_the_released_model(scales, tokens):
    build = jax.jit(partial(Codebook, config=config_of(scales, tokens)))
    codebook = build(jax.random.key(0))
    each = np.float32(1 / (scales * tokens))
    np.testing.assert_array_equal(codebook.token_fusion[...], np.full((scales, tokens), each))
    np.testing.assert_array_equal(
        codebook.mask_fusion[...], np.full(scales, np.float32(1 / scales))
    )
    for weights in (codebook.token_fusion, codebook.mask_fusion):
        # Real parameters, unlike the reference's (docs/reference_notes.md T3).
        assert isinstance(weights, nnx.Param)


def test_masks_are_fused_in_float32_whatever_the_states_are():
    codebook = drawn(2, 3)
    states = jnp.asarray(draw(9, B, M, 2, 3, D).astype(jnp.bfloat16))
    assert fuse_tokens(codebook, states).dtype == jnp.bfloat16
    assert codebook.fuse_masks(jnp.asarray(draw(4, 2, B, M, 7, 11))).dtype == jnp.float32
