"""The building blocks, by hand and against explicit loops; axes are distinct primes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixellm_jax.axes import logical_axes
from pixellm_jax.model.layers import (
    MLP,
    Constant,
    LayerNorm,
    Projection,
    RMSNorm,
    UpConvolution,
    attend,
    constant,
    normal,
    resize_bilinear,
    rotary,
    stack,
)

# Float32 sums of at most a few dozen products of order one, against float64 loops.
TOLERANCE = 2e-6
# Angles reach 40 radians; their float32 rounding alone is 2e-6 of a turn.
ROTARY_TOLERANCE = 2e-5


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(found, wanted, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=tolerance, atol=tolerance)


def drawn(build: Callable[[jax.Array], nnx.Module]) -> nnx.Module:
    """A module whose parameters, biases too, are drawn by numpy: there is nothing to compile."""
    graph, state = nnx.split(jax.eval_shape(build, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.asarray(draw(100 + i, *leaf.shape)) for i, leaf in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


@jax.jit
def call(module: nnx.Module, *arguments: jax.Array) -> jax.Array:
    return module(*arguments)


attention = jax.jit(attend)
turn = jax.jit(rotary, static_argnums=2)
resize = jax.jit(resize_bilinear, static_argnums=(1, 2))


# Attention


def test_attention_on_paper():
    # Scores 2 ln 3 / sqrt(4) = ln 3 and 0: weights 3/4 and 1/4.
    query = jnp.asarray([2.0, 0, 0, 0])[None, None]
    key = jnp.asarray([[np.log(3), 5, 0, 0], [0, 0, 7, 0]], jnp.float32)[:, None]
    value = jnp.asarray([[4.0, 8, 0, 1], [0, 8, 4, 1]])[:, None]
    close(attention(query, key, value)[0, 0], [3, 8, 1, 1])


def test_attention_leaves_out_what_is_not_visible():
    query, key, value = (jnp.asarray(draw(i, 3, 2, 5)) for i in range(3))
    visible = jnp.asarray([[1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
    found = attention(query, key, value, visible)
    # Who sees one position gets its value, exactly.
    np.testing.assert_array_equal(np.asarray(found)[[0, 2]], np.asarray(value)[[0, 2]])
    scores = np.asarray(key)[:2, :, :] * np.asarray(query)[1] / np.sqrt(5)
    weights = np.exp(scores.sum(-1, keepdims=True))
    close(found[1], (weights * np.asarray(value)[:2]).sum(0) / weights.sum(0))
    nothing = attention(query, key, value, visible & False)
    assert np.isfinite(nothing).all()


def test_attention_against_a_loop_over_heads():
    t, u, n, h = 2, 5, 3, 7
    query, key, value = draw(1, t, n, h), draw(2, u, n, h), draw(3, u, n, h)
    found = attention(*map(jnp.asarray, (query, key, value)))
    for head in range(n):
        scores = query[:, head].astype(np.float64) @ key[:, head].T / np.sqrt(h)
        weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        close(found[:, head], weights @ value[:, head])


def test_grouped_heads_are_repeated_heads():
    b, t, u, g, r, h = 2, 3, 5, 2, 3, 7
    query = jnp.asarray(draw(1, b, t, g * r, h))
    key, value = (jnp.asarray(draw(i, b, u, g, h)) for i in (2, 3))
    visible = jnp.asarray(draw(4, b, t, u) > -0.5)
    found = np.asarray(attention(query, key, value, visible))
    every = [jnp.asarray(np.repeat(a, r, axis=2)) for a in (key, value)]
    close(found, attention(query, *every, visible))
    other = [jnp.asarray(np.tile(a, (1, 1, r, 1))) for a in (key, value)]  # 0, 1, 0, 1, ...
    assert np.abs(found - attention(query, *other, visible)).max() > 0.1


def test_attention_keeps_the_dtype_and_takes_the_softmax_in_float32():
    query, key, value = (jnp.asarray(draw(i, 67, 1, 64).astype(jnp.bfloat16)) for i in range(3))
    found = attention(query, key, value)
    assert found.dtype == jnp.bfloat16
    exact = attention(*(jnp.asarray(np.float32(a)) for a in (query, key, value)))
    # bfloat16 scores would be off by 2^-9 of scores up to 4: errors well above 2^-8.
    assert np.abs(np.float32(found) - np.asarray(exact)).max() < 2**-8


# Norms


def test_layer_norm_by_formula():
    x = draw(1, 2, 3, 11) * 3 + 1
    norm = drawn(lambda key: LayerNorm(11, "vision", 0.25))
    y = x.astype(np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 0.25)
    close(call(norm, jnp.asarray(x)), y * norm.weight.get_value() + norm.bias.get_value())


def test_rms_norm_by_formula():
    x = draw(1, 2, 3, 11) * 3 + 1
    norm = drawn(lambda key: RMSNorm(11, "embed", 0.25))
    y = x.astype(np.float64)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 0.25)
    close(call(norm, jnp.asarray(x)), y * norm.weight.get_value())


def test_norms_start_as_plain_norms_and_work_in_float32():
    # In bfloat16, 256 + 1 is 256: the spread would vanish.
    x = jnp.asarray([256.0, 258, 260, 262], jnp.bfloat16)
    found = call(LayerNorm(4, "vision", 0.0), x)
    assert found.dtype == jnp.bfloat16
    close(np.float32(found), np.asarray([-3, -1, 1, 3]) / np.sqrt(5), 2**-8)
    x = jnp.asarray([3.0, 4, 0, 0], jnp.bfloat16)
    found = call(RMSNorm(4, "embed", 0.0), x)
    assert found.dtype == jnp.bfloat16
    close(np.float32(found), [1.2, 1.6, 0, 0], 2**-8)


# Rotary positions


def test_rotary_on_paper():
    # Pairs are (0, 2) and (1, 3); angles position * theta^0 and position * theta^(-1/2).
    x = jnp.asarray([1.0, 0, 0, 5])[None, None, None]
    found = turn(x, jnp.asarray([[3]]), 9.0)[0, 0, 0]
    close(found, [np.cos(3), -5 * np.sin(1), np.sin(3), 5 * np.cos(1)])


def test_rotary_at_position_zero_is_the_identity():
    x = jnp.asarray(draw(1, 2, 3, 5, 14))
    np.testing.assert_array_equal(turn(x, jnp.zeros((2, 3), jnp.int32), 10000.0), x)


def test_rotary_keeps_norms_and_depends_on_distance_only():
    query, key = (jnp.asarray(draw(i, 1, 1, 3, 14)) for i in (1, 2))

    def product(at: int, other: int) -> np.ndarray:
        turned = np.asarray(turn(query, jnp.asarray([[at]]), 100.0))
        close(np.linalg.norm(turned, axis=-1), np.linalg.norm(query, axis=-1))
        return (turned * np.asarray(turn(key, jnp.asarray([[other]]), 100.0))).sum(-1)

    close(product(7, 3), product(37, 33), ROTARY_TOLERANCE)
    close(product(3, 7), product(0, 4), ROTARY_TOLERANCE)
    assert np.abs(product(7, 3) - product(7, 4)).max() > 0.01
    assert np.abs(product(7, 3) - product(3, 7)).max() > 0.01  # direction matters


def test_rotary_turns_every_row_by_its_own_position():
    x = jnp.asarray(draw(1, 2, 3, 5, 14))
    position = np.asarray([[0, 4, 2], [11, 1, 1]], np.int32)
    found = np.asarray(turn(x, jnp.asarray(position), 50.0))
    for b, t in np.ndindex(2, 3):
        same = jnp.asarray(np.full((2, 3), position[b, t]))
        np.testing.assert_array_equal(found[b, t], np.asarray(turn(x, same, 50.0))[b, t])


# Projections


def test_projection_over_several_axes_against_einsum():
    e, n, h, d = 5, 3, 7, 11
    split = drawn(lambda key: Projection(key, (e, n, h), "vision heads head"))
    x = draw(3, 2, 13, e)
    wanted = np.einsum("bte,enh->btnh", x, split.weight.get_value()) + np.asarray(
        split.bias.get_value()
    )
    close(call(split, jnp.asarray(x)), wanted, 1e-5)
    assert split.bias.shape == (n, h)

    joined = drawn(lambda key: Projection(key, (n, h, d), "heads head embed", inputs=2))
    y = draw(4, 2, 13, n, h)
    wanted = np.einsum("btnh,nhd->btd", y, joined.weight.get_value()) + np.asarray(
        joined.bias.get_value()
    )
    close(call(joined, jnp.asarray(y)), wanted, 1e-5)
    assert joined.bias.shape == (d,)


def test_projection_without_bias_is_linear_and_has_no_bias_parameter():
    module = drawn(lambda key: Projection(key, (3, 5), "embed mlp", bias=False))
    assert [path for path, _ in nnx.to_flat_state(nnx.state(module))] == [("weight",)]
    np.testing.assert_array_equal(call(module, jnp.zeros((2, 3))), np.zeros((2, 5)))


def test_projection_casts_its_weights_to_the_activations():
    module = drawn(lambda key: Projection(key, (3, 5), "embed mlp"))
    assert module.weight.get_value().dtype == jnp.float32
    assert call(module, jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_projection_starts_with_outputs_of_the_size_of_its_inputs():
    @jax.jit
    def build(key: jax.Array) -> tuple[Projection, Projection]:
        split = Projection(key, (101, 3, 67), "embed heads head")
        return split, Projection(key, (13, 17, 67), "heads head embed", inputs=2)

    for module, fan_in in zip(build(jax.random.key(0)), (101, 13 * 17), strict=True):
        # Relative error of a standard deviation from n draws: 1 / sqrt(2 n), n > 10,000.
        assert np.std(module.weight.get_value()) == pytest.approx(fan_in**-0.5, rel=0.03)
        assert not np.asarray(module.bias.get_value()).any()


def test_mlp_has_no_activation_after_the_last_layer():
    module = drawn(lambda key: MLP(key, (3, 5, 7, 11), "vision mlp embed out", jax.nn.relu))
    y = x = draw(1, 11, 3)
    for i, layer in enumerate(module.layers):
        y = y @ np.asarray(layer.weight.get_value()) + np.asarray(layer.bias.get_value())
        y = np.maximum(y, 0) if i < 2 else y
    assert (y < 0).any() and (y > 0).any()
    close(call(module, jnp.asarray(x)), y, 1e-5)
    names = [layer.weight.get_metadata()["axes"] for layer in module.layers]
    assert names == ["vision mlp", "mlp embed", "embed out"]


# Pictures


def test_up_convolution_against_a_loop():
    c, o, rows, columns = 3, 5, 2, 7
    module = drawn(lambda key: UpConvolution(key, c, o))
    x = draw(4, 11, rows, columns, c)
    weight, bias = np.asarray(module.weight.get_value()), np.asarray(module.bias.get_value())
    wanted = np.zeros((11, 2 * rows, 2 * columns, o))
    for y in range(rows):
        for z in range(columns):
            for i in range(2):
                for j in range(2):
                    wanted[:, 2 * y + i, 2 * z + j] = x[:, y, z] @ weight[:, i, j] + bias
    close(call(module, jnp.asarray(x)), wanted, 1e-5)
    close(call(module, jnp.asarray(x[:, None]))[:, 0], wanted, 1e-5)  # any number of leading axes


@pytest.mark.torch
def test_up_convolution_is_that_of_torch():
    import torch

    module = drawn(lambda key: UpConvolution(key, 3, 5))
    theirs = torch.nn.ConvTranspose2d(3, 5, kernel_size=2, stride=2)
    x = draw(4, 2, 7, 11, 3)
    with torch.no_grad():
        theirs.weight.copy_(
            torch.tensor(np.asarray(module.weight.get_value()).transpose(0, 3, 1, 2))
        )
        theirs.bias.copy_(torch.tensor(np.asarray(module.bias.get_value())))
        wanted = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    close(call(module, jnp.asarray(x)), wanted, 1e-5)


def test_bilinear_resize_on_paper():
    line = jnp.asarray([0.0, 4, 8, 12])[None, :, None]
    # Half-pixel centres: twice as many samples lie a quarter pixel off the old ones.
    close(resize(line, 1, 8)[0, :, 0], [0, 1, 3, 5, 7, 9, 11, 12])
    # Half as many, without antialias: the mean of the two neighbours only.
    close(resize(line, 1, 2)[0, :, 0], [2, 10])
    spike = jnp.zeros((6, 1, 1)).at[0, 0, 0].set(1.0)
    # A third: the middle one of three, so a spike beside it is not seen.
    close(resize(spike, 2, 1)[:, 0, 0], [0, 0])


def test_bilinear_resize_leaves_its_own_size_and_constants_alone():
    x = jnp.asarray(draw(1, 2, 5, 7, 3))
    np.testing.assert_array_equal(resize(x, 5, 7), x)
    close(resize(jnp.full((5, 7, 2), 3.0), 11, 4), np.full((11, 4, 2), 3.0))


@pytest.mark.torch
@pytest.mark.parametrize("size", [(5, 7), (11, 13), (3, 17), (2, 3)])
def test_bilinear_resize_is_that_of_torch(size):
    import torch

    x = draw(1, 2, 5, 7, 3)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(x.transpose(0, 3, 1, 2)), size=size, mode="bilinear", align_corners=False
    )
    close(resize(jnp.asarray(x), *size), wanted.numpy().transpose(0, 2, 3, 1))


# Parameters and their axes


def test_unknown_axis_name_is_refused():
    with pytest.raises(ValueError, match=r"\['heighth'\] are not in the legend"):
        normal(jax.random.key(0), (2, 3), "embed heighth")
    with pytest.raises(ValueError, match="not in the legend"):
        logical_axes("embed  mlp hedas")
    assert logical_axes(" embed  mlp ") == ("embed", "mlp")


@pytest.mark.parametrize("axes", ["embed", "embed mlp heads"])
def test_every_axis_has_one_name(axes):
    with pytest.raises(ValueError, match=r"do not name the 2 axes of \(2, 3\)"):
        constant(1.0, (2, 3), axes)


class Step(nnx.Module):
    def __init__(self, key: jax.Array) -> None:
        self.project = Projection(key, (5, 5), "embed embed")
        self.norm = RMSNorm(5, "embed", 1e-5)
        self.fixed = Constant(jax.random.normal(key, (2, 3)), axes="coordinate frequency")

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.norm(jnp.tanh(self.project(x))) + self.fixed[...].sum()


def test_stack_adds_the_axis_name_and_keeps_the_kind_of_every_variable():
    stacked = jax.eval_shape(lambda key: stack(Step, key, 7), jax.random.key(0))
    found = {
        path: (type(variable), variable.get_metadata()["axes"], variable.get_value().shape)
        for path, variable in nnx.to_flat_state(nnx.state(stacked))
    }
    assert found == {
        ("fixed",): (Constant, "layer coordinate frequency", (7, 2, 3)),
        ("norm", "weight"): (nnx.Param, "layer embed", (7, 5)),
        ("project", "bias"): (nnx.Param, "layer embed", (7, 5)),
        ("project", "weight"): (nnx.Param, "layer embed embed", (7, 5, 5)),
    }
    other = jax.eval_shape(lambda key: stack(Step, key, 2, axis="scale"), jax.random.key(0))
    assert other.norm.weight.get_metadata()["axes"] == "scale embed"


def test_scan_over_stacked_modules_is_the_unrolled_loop():
    @jax.jit
    def both(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        scanned, _ = jax.lax.scan(lambda x, step: (step(x), None), x, stack(Step, key, 3))
        unrolled = x
        for own in jax.random.split(key, 3):
            unrolled = Step(own)(unrolled)
        return scanned, unrolled

    x = draw(1, 2, 5)
    scanned, unrolled = both(jnp.asarray(x), jax.random.key(3))
    close(scanned, unrolled, 1e-5)
    assert np.abs(scanned - x).max() > 0.1
