"""Prepared models: equal outputs, small quantisation error, the same on a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixellm_jax.config import LoraConfig, MeshConfig
from pixellm_jax.errors import InputError
from pixellm_jax.inference.prepare import prepare_for_inference
from pixellm_jax.model.language_model import LanguageModel
from pixellm_jax.model.layers import Projection
from pixellm_jax.model.lora import add_lora
from pixellm_jax.model.quantize import GROUP, QuantizedProjection
from pixellm_jax.sharding import make_mesh

# Float32 with sums in another order, relative to the largest value.
TOLERANCE = 2e-5


def error(found, wanted) -> float:
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def flat(module: nnx.Module) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


def run(language: LanguageModel, tokens: np.ndarray) -> jax.Array:
    """Logits of whole sequences."""
    b, t = tokens.shape
    position = jnp.broadcast_to(jnp.arange(t), (b, t))
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
    x = language.embed(tokens).astype(language.head.dtype)
    cache = language.empty_cache(b, t, x.dtype)
    return language.logits(language.extend(x, position, visible, cache, position)[0])


@pytest.fixture(scope="module")
def tokens(varied) -> np.ndarray:
    size = varied.model.config.language.vocabulary
    return np.random.default_rng(0).integers(0, size, (3, 17)).astype(np.int32)


@pytest.fixture(scope="module")
def logits(varied, tokens) -> np.ndarray:
    return np.asarray(jax.jit(run)(prepare_for_inference(varied.model).language_model, tokens))


def test_the_original_model_is_not_changed(varied):
    before = flat(varied.model)
    config = dataclasses.replace(varied.model.config, dtype="bfloat16")
    half = jax.tree.map(lambda leaf: leaf, varied.model)
    half.config = config
    served = prepare_for_inference(half, weights="int8")
    assert served.language_model.head.dtype == jnp.bfloat16
    after = flat(varied.model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_consuming_a_model_gives_equal_results_in_less_memory(varied, tokens, logits, monkeypatch):
    model = jax.tree.map(jnp.copy, varied.model)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    most = max(leaf.nbytes for leaf in jax.tree.leaves(model.language_model.layers))
    before, seen = live_bytes(), list[int]()
    split = nnx.merge
    monkeypatch.setattr(nnx, "merge", lambda *a: (seen.append(live_bytes()), split(*a))[1])
    served = prepare_for_inference(model, consume=True)
    monkeypatch.undo()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(model.language_model.layers))
    assert seen and max(seen) < before + most < before + size / 2
    np.testing.assert_array_equal(jax.jit(run)(served.language_model, tokens), logits)


def live_bytes() -> int:
    """Bytes of all arrays on the devices."""
    return sum(array.nbytes for array in jax.live_arrays())


def test_only_the_matrices_of_the_language_model_take_the_compute_dtype(varied):
    half = jax.tree.map(lambda leaf: leaf, varied.model)
    half.config = dataclasses.replace(varied.model.config, dtype="bfloat16")
    for name, value in flat(prepare_for_inference(half)).items():
        matrix = name.startswith("language_model.") and "norm" not in name
        assert value.dtype == (jnp.bfloat16 if matrix else jnp.float32), name


def test_lora_is_merged(varied, tokens, logits):
    adapted = jax.tree.map(lambda leaf: leaf, varied.model)
    adapted.language_model.layers = jax.tree.map(
        lambda leaf: leaf, varied.model.language_model.layers
    )
    layers = adapted.language_model.layers
    add_lora(layers, LoraConfig(), jax.random.key(0))
    up = layers.query.lora.up
    up.set_value(jax.random.normal(jax.random.key(1), up.shape) / 30)
    served = prepare_for_inference(adapted)
    assert layers.query.lora is not None  # still to be trained
    assert served.language_model.layers[0].query.lora is None
    whole = jax.jit(run)(adapted.language_model, tokens)
    found = jax.jit(run)(served.language_model, tokens)
    assert error(found, whole) < TOLERANCE
    assert error(found, logits) > 100 * TOLERANCE


# Few bits


@pytest.mark.parametrize(
    ("shape", "axes", "inputs"),
    [((192, 5, 7), "embed heads head", 1), ((3, 64, 11), "heads head embed", 2)],
)
@pytest.mark.parametrize("bits", [8, 4])
def test_values_are_the_nearest_of_their_group(shape, axes, inputs, bits):
    projection = Projection(jax.random.key(0), shape, axes, inputs=inputs, bias=False)
    quantized = QuantizedProjection(projection, bits)
    values = np.asarray(quantized.values[...]).astype(np.float32).reshape(192, -1)
    weight = np.asarray(projection.weight[...]).reshape(192, -1)
    most = {8: 127, 4: 7}[bits]
    size = {8: 192, 4: GROUP}[bits]
    for start in range(0, 192, size):
        part = slice(start, start + size)
        scale = np.abs(weight[part]).max(axis=0) / most
        np.testing.assert_allclose(values[part], np.round(weight[part] / scale), atol=1e-3)
        assert np.abs(values[part]).max() == most
        np.testing.assert_allclose(values[part] * scale, weight[part], atol=scale.max() * 0.501)
        own = np.asarray(quantized.scale[...]).reshape(192 // size, -1)[start // size]
        np.testing.assert_allclose(own, scale, rtol=1e-6)
    x = np.random.default_rng(0).standard_normal((2, 3, *shape[:inputs])).astype(np.float32)
    rounded = values.reshape(192 // size, size, -1) * np.asarray(quantized.scale[...]).reshape(
        192 // size, 1, -1
    )
    wanted = x.reshape(2, 3, 192) @ rounded.reshape(192, -1)
    assert error(quantized(jnp.asarray(x)), wanted.reshape(2, 3, *shape[inputs:])) < TOLERANCE


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.03), ("int4", 0.4)])
def test_quantisation_changes_logits_little(varied, tokens, logits, weights, most):
    found = np.asarray(
        jax.jit(run)(prepare_for_inference(varied.model, weights=weights).language_model, tokens)
    )
    assert 1e-4 < error(found, logits) < most
    picked = found.argmax(-1) == logits.argmax(-1)
    assert picked.mean() > 1 - most


def test_bytes_of_the_layers(varied):
    """A quarter, and an eighth with a scale of 32 bits for 64 values; norms are few."""

    def size(**options) -> int:
        state = jax.eval_shape(
            lambda: nnx.state(prepare_for_inference(varied.model, **options).language_model)
        )
        layers = jax.tree.leaves(state["layers"])
        return sum(
            leaf.size * (4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize)
            for leaf in layers
        )

    assert size(weights="int8") / size() == pytest.approx(1 / 4, abs=0.02)
    assert size(weights="int4") / size() == pytest.approx(1 / 8 + 1 / 64, abs=0.02)


def test_unknown_weights_are_refused(varied):
    with pytest.raises(InputError, match="weights='int3': choose from int8, int4"):
        prepare_for_inference(varied.model, weights="int3")


def test_weights_of_zero_do_not_divide_by_zero():
    projection = Projection(jax.random.key(0), (4, 6), "embed mlp", bias=False)
    projection.weight.set_value(jnp.zeros((4, 6)))
    quantized = QuantizedProjection(projection, 8)
    assert np.isfinite(np.asarray(quantized.scale[...])).all()
    assert not np.asarray(quantized(jnp.ones((2, 4)))).any()


# A mesh


@pytest.mark.parametrize("weights", [None, "int8"])
def test_weights_are_spread_over_a_mesh(varied, tokens, weights):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    spread = prepare_for_inference(varied.model, weights=weights, mesh=mesh)
    up = spread.language_model.layers[0].up
    part = up.weight[...] if weights is None else up.values[...]
    assert part.addressable_shards[0].data.shape == (64, 48)
    with jax.set_mesh(mesh):
        found = jax.jit(run)(spread.language_model, tokens)
    wanted = jax.jit(run)(
        prepare_for_inference(varied.model, weights=weights).language_model, tokens
    )
    assert error(found, wanted) < TOLERANCE
