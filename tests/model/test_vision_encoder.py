"""CLIP: against Hugging Face on random weights, and the properties of taps, table and padding."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixellm_jax.config import CodebookConfig, ModelConfig, VisionConfig
from pixellm_jax.model.vision_encoder import (
    VisionBlock,
    VisionEncoder,
    quick_gelu,
    resize_positions,
)
from pixellm_jax.weights import torch_layout

# Float32 with sums in another order: relative to the largest value.
LAYER, WHOLE = 1e-5, 1e-4
# Resized tables: sample positions up to 17 are float32, so weights are off by 1e-6.
TABLE = 1e-5

LAYERS = 3
CONFIG = VisionConfig(
    width=35,
    layers=LAYERS,
    heads=7,
    mlp=29,
    patch=2,
    canvas=22,
    table=5,
    taps=tuple(range(LAYERS + 1)),
    eps=0.01,
)
GRID = CONFIG.grid  # 11
VALID = np.zeros((2, GRID, GRID), bool)
VALID[0, :7], VALID[1, :, :5] = True, True


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def drawn(config: VisionConfig) -> VisionEncoder:
    """An encoder whose parameters, biases too, are drawn by numpy: there is nothing to compile."""
    build = partial(VisionEncoder, config=config)
    graph, state = nnx.split(jax.eval_shape(build, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.asarray(draw(i, *leaf.shape) / 3) for i, leaf in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def with_config(encoder: VisionEncoder, **changes: object) -> VisionEncoder:
    """The same parameters under another config."""
    config = dataclasses.replace(encoder.config, **changes)
    graph = nnx.split(jax.eval_shape(partial(VisionEncoder, config=config), jax.random.key(0)))[0]
    return nnx.merge(graph, nnx.state(encoder))


def error(found, wanted) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@jax.jit
def encode(encoder: VisionEncoder, pixels: jax.Array, valid: jax.Array) -> tuple[jax.Array, ...]:
    return encoder(pixels, valid)


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return drawn(CONFIG)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return draw(99, 2, CONFIG.canvas, CONFIG.canvas, 3)


@pytest.fixture(scope="module")
def states(encoder, pixels) -> list[np.ndarray]:
    """All hidden states of the patches."""
    return [np.asarray(x) for x in encode(encoder, jnp.asarray(pixels), jnp.asarray(VALID))]


# Against Hugging Face


@pytest.fixture(scope="module")
def clip():
    """A random Hugging Face model with a position table of the canvas, and its tensors by
    published name."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=CONFIG.width,
            intermediate_size=CONFIG.mlp,
            num_hidden_layers=LAYERS,
            num_attention_heads=CONFIG.heads,
            image_size=CONFIG.canvas,
            patch_size=CONFIG.patch,
            layer_norm_eps=CONFIG.eps,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def converted(clip, config: VisionConfig, table: np.ndarray) -> VisionEncoder:
    """Our encoder with the tensors of `clip`, and `table` as its position table."""
    tensors = {f"vision_model.{k}": v.numpy() for k, v in clip.state_dict().items()}
    tensors["vision_model.embeddings.position_embedding.weight"] = table
    build = partial(VisionEncoder, config=config)
    graph, state = nnx.split(jax.eval_shape(build, jax.random.key(0)))
    variables = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
    whole = ModelConfig(vision=config, codebook=CodebookConfig(scales=len(config.taps)))
    for entry in torch_layout.table(whole, kind="required", source=torch_layout.VISION):
        layers = [entry.to_ours(tensors.pop(name)) for name in entry.names]
        value = np.stack(layers) if entry.count else layers[0]
        variables.pop(entry.path.removeprefix("vision_encoder.")).set_value(jnp.asarray(value))
    assert not variables
    assert set(tensors) == {
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
    }
    return nnx.merge(graph, state)


def hugging_face_states(clip, pixels: np.ndarray, valid: np.ndarray) -> list[np.ndarray]:
    """Every hidden state, class token included, where only valid patches are attended to."""
    import torch

    seen = np.concatenate([np.ones((len(valid), 1), bool), valid.reshape(len(valid), -1)], axis=1)
    hidden = torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min)
    hidden = hidden[:, None, None].expand(-1, 1, seen.shape[1], -1)
    with torch.no_grad():
        x = clip.embeddings(torch.tensor(pixels.transpose(0, 3, 1, 2)))
        out = [clip.pre_layrnorm(x)]
        for layer in clip.encoder.layers:
            out.append(layer(out[-1], hidden))
    return [x.numpy() for x in out]


@pytest.mark.torch
def test_whole_encoder_is_that_of_hugging_face_with_and_without_padding(clip, pixels):
    import torch

    small = draw(5, CONFIG.table**2 + 1, CONFIG.width)
    for form, valid in product(("released", "correct"), (VALID, np.ones_like(VALID))):
        own, rest = (small[-1:], small[:-1]) if form == "released" else (small[:1], small[1:])
        square = torch.tensor(rest.reshape(1, CONFIG.table, CONFIG.table, -1))
        square = torch.nn.functional.interpolate(
            square.permute(0, 3, 1, 2), size=(GRID, GRID), mode="bilinear", align_corners=False
        )
        rest = square.permute(0, 2, 3, 1).reshape(GRID**2, -1).numpy()
        table = np.concatenate([rest, own] if form == "released" else [own, rest])
        with torch.no_grad():
            clip.embeddings.position_embedding.weight.copy_(torch.tensor(table))
        wanted = hugging_face_states(clip, pixels, valid)
        config = dataclasses.replace(CONFIG, position_resize=form)
        found = encode(converted(clip, config, small), jnp.asarray(pixels), jnp.asarray(valid))
        for ours, theirs in zip(found, wanted, strict=True):
            assert error(ours, theirs[:, 1:]) < WHOLE


@pytest.mark.torch
def test_every_layer_is_that_of_hugging_face(clip, pixels):
    table = clip.embeddings.position_embedding.weight.detach().numpy()
    config = dataclasses.replace(CONFIG, table=GRID)
    ours = converted(clip, config, table)
    theirs = hugging_face_states(clip, pixels, VALID)
    visible = np.concatenate([np.ones((2, 1), bool), VALID.reshape(2, -1)], axis=1)
    visible = jnp.asarray(np.repeat(visible[:, None], GRID**2 + 1, axis=1))
    for i in range(LAYERS):
        block = jax.tree.map(lambda leaf: leaf[i], ours.layers)  # noqa: B023
        found = run_block(block, jnp.asarray(theirs[i]), visible)
        assert error(found, theirs[i + 1]) < LAYER


@jax.jit
def run_block(block: VisionBlock, x: jax.Array, visible: jax.Array) -> jax.Array:
    return block(x, visible)


# Layers and taps


def test_scan_is_the_unrolled_loop(encoder, pixels, states):
    visible = np.concatenate([np.ones((2, 1), bool), VALID.reshape(2, -1)], axis=1)
    visible = jnp.asarray(np.repeat(visible[:, None], GRID**2 + 1, axis=1))
    # The class token is not in `states`: the first layer needs its own row of the sequence.
    own = (encoder.class_token[...] + resize_positions(encoder.position[...], CONFIG)[0])[None]
    own = jnp.broadcast_to(encoder.embedding_norm(own), (2, 1, CONFIG.width))
    x = jnp.concatenate([own, jnp.asarray(states[0])], axis=1)
    for i in range(LAYERS):
        x = run_block(jax.tree.map(lambda leaf: leaf[i], encoder.layers), x, visible)  # noqa: B023
        assert error(x[:, 1:], states[i + 1]) < LAYER
        assert error(states[i], states[i + 1]) > 0.01


def test_taps_come_in_the_order_asked_for(encoder, pixels, states):
    taps = (-1, 1, -4, 1, 2)
    found = encode(with_config(encoder, taps=taps), jnp.asarray(pixels), jnp.asarray(VALID))
    assert len(found) == len(taps)
    for x, layer in zip(found, (3, 1, 0, 1, 2), strict=True):
        assert error(x, states[layer]) < LAYER


def test_layers_after_the_deepest_tap_do_not_exist(encoder, pixels, states):
    config = dataclasses.replace(CONFIG, taps=(1, -2))
    assert config.tap_layers == (1, 2)
    shapes = jax.eval_shape(partial(VisionEncoder, config=config), jax.random.key(0))
    assert shapes.layers.up.bias.shape == (2, CONFIG.mlp)
    graph, state = nnx.split(encoder)
    state["layers"] = jax.tree.map(lambda leaf: leaf[:2], state["layers"])
    short = with_config(nnx.merge(graph, state), taps=(1, -2))
    found = encode(short, jnp.asarray(pixels), jnp.asarray(VALID))
    for x, layer in zip(found, (1, 2), strict=True):
        assert error(x, states[layer]) < LAYER


def test_quick_gelu_on_paper():
    x = np.log(3) / 1.702  # sigmoid(ln 3) = 3/4
    np.testing.assert_allclose(quick_gelu(jnp.float32([x, 0, -x])), [0.75 * x, 0, -x / 4], 1e-6)


# Padding


def test_garbage_in_padded_patches_changes_no_bit_of_valid_patches(encoder, pixels, states):
    inside = np.repeat(np.repeat(VALID, CONFIG.patch, 1), CONFIG.patch, 2)[..., None]
    garbage = np.where(inside, pixels, 1000 * draw(7, *pixels.shape))
    found = encode(encoder, jnp.asarray(garbage), jnp.asarray(VALID))
    flat = VALID.reshape(2, -1)
    for x, state in zip(found, states, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[flat], state[flat])
        assert (np.asarray(x)[~flat] != state[~flat]).any(axis=-1).all()


def test_every_valid_patch_sees_every_valid_pixel(encoder, pixels, states):
    changed = pixels.copy()
    changed[0, 13, 21, 2] += 5  # last row and column of the valid part of image 0
    found = encode(encoder, jnp.asarray(changed), jnp.asarray(VALID))
    assert (np.asarray(found[1])[0] != states[1][0]).any(axis=-1).all()
    differs = (np.asarray(found[0])[0] != states[0][0]).any(axis=-1)
    assert np.flatnonzero(differs).tolist() == [6 * GRID + 10]  # its own patch before any layer
    np.testing.assert_array_equal(found[1][1], states[1][1])  # the other image


# Position table


def bilinear(square: np.ndarray, side: int) -> np.ndarray:
    """Half-pixel centres, clamped at the borders, in float64."""
    size = len(square)
    out = np.zeros((side, side, square.shape[-1]))
    for y, x in np.ndindex(side, side):
        at = [min(max((i + 0.5) * size / side - 0.5, 0), size - 1) for i in (y, x)]
        low = [int(a) for a in at]
        high = [min(i + 1, size - 1) for i in low]
        (v, u) = (a - i for a, i in zip(at, low, strict=True))
        top = (1 - u) * square[low[0], low[1]] + u * square[low[0], high[1]]
        bottom = (1 - u) * square[high[0], low[1]] + u * square[high[0], high[1]]
        out[y, x] = (1 - v) * top + v * bottom
    return out


def config_of(form: str, table: int) -> VisionConfig:
    return dataclasses.replace(CONFIG, position_resize=form, table=table)


@pytest.mark.parametrize("side", [5, 17])  # up to 11, and down to 11
def test_both_forms_of_the_position_table_against_a_loop(side):
    table = draw(3, side**2 + 1, 13)
    correct = resize_positions(jnp.asarray(table), config_of("correct", side))
    np.testing.assert_array_equal(correct[0], table[0])
    wanted = bilinear(table[1:].reshape(side, side, 13), GRID).reshape(GRID**2, 13)
    np.testing.assert_allclose(correct[1:], wanted, atol=TABLE)

    released = resize_positions(jnp.asarray(table), config_of("released", side))
    np.testing.assert_array_equal(released[-1], table[-1])
    wanted = bilinear(table[:-1].reshape(side, side, 13), GRID).reshape(GRID**2, 13)
    np.testing.assert_allclose(released[:-1], wanted, atol=TABLE)
    assert np.abs(released - correct).max() > 0.1
    if side < GRID:  # the class token still meets the class row: the corner of the enlarged grid
        np.testing.assert_allclose(released[0], table[0], atol=TABLE)


def test_both_forms_leave_a_table_of_the_right_size_as_it_is():
    table = jnp.asarray(draw(3, GRID**2 + 1, 13))
    for form in ("correct", "released"):
        np.testing.assert_array_equal(resize_positions(table, config_of(form, GRID)), table)


def test_encoder_adds_the_form_that_the_config_names(encoder, pixels, states):
    other = with_config(encoder, position_resize="correct")
    found = encode(other, jnp.asarray(pixels), jnp.asarray(VALID))
    assert CONFIG.position_resize == "released"
    assert error(found[0], states[0]) > 0.01
