"""Pixel decoder: against PyTorch written from the description, and target by target."""

from __future__ import annotations

from functools import partial
from typing import Any

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
from pixellm_jax.model.layers import Constant
from pixellm_jax.model.pixel_decoder import (
    FourierPositions,
    PixelDecoder,
    TwoWayLayer,
)

# Float32 with sums in another order, relative to the largest value: one layer, and the whole.
LAYER, WHOLE = 1e-5, 1e-4

# Compiling a gradient costs more than running it: half as much without XLA's optimisations.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

B, M, D, C, HEADS, GRID = 2, 3, 13, 24, 3, 5


def config_of(scales: int, tokens: int = 1, depth: int = 2) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            width=8, heads=2, layers=4, canvas=2 * GRID, patch=2, taps=(-2, 1, 2)[:scales]
        ),
        language=LanguageConfig(width=D),
        codebook=CodebookConfig(scales=scales, tokens_per_scale=tokens),
        decoder=DecoderConfig(width=C, heads=HEADS, mlp=29, depth=depth, mask_tokens=5),
    )


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def drawn(kind: type, config: ModelConfig) -> Any:
    """A module whose parameters, biases too, are drawn by numpy: there is nothing to compile."""
    graph, state = nnx.split(jax.eval_shape(partial(kind, config=config), jax.random.key(0)))
    leaves, tree = jax.tree.flatten(state)
    leaves = [
        jnp.asarray(2 * draw(i, *leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5)
        for i, leaf in enumerate(leaves)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def error(found, wanted) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@jax.jit
def decode(decoder: PixelDecoder, projected: jax.Array, queries: jax.Array) -> jax.Array:
    return decoder(decoder.features(projected), queries)


@pytest.fixture(scope="module")
def decoder() -> PixelDecoder:
    decoder = drawn(PixelDecoder, config_of(2))
    last = decoder.hypernetwork.layers[-1]
    for parameter in (last.weight, last.bias):  # logits of order one: no sigmoid is saturated
        parameter.set_value(parameter.get_value() / 20)
    return decoder


@pytest.fixture(scope="module")
def projected() -> np.ndarray:
    return draw(50, B, 2, GRID, GRID, D)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return draw(51, B, M, 2, C)


@pytest.fixture(scope="module")
def masks(decoder, projected, queries) -> np.ndarray:
    return np.asarray(decode(decoder, jnp.asarray(projected), jnp.asarray(queries)))


# By hand


def test_fourier_positions_of_a_grid_by_hand():
    # Centres of 2 rows and 3 columns: y = -1/2, 1/2; x = -2/3, 0, 2/3.
    matrix = np.asarray([[0.25, 0.0, 1.0], [0.0, 0.5, -1.0]])  # turns per unit of x, of y
    codes = drawn(lambda key, config: FourierPositions(key, 6), config_of(1))
    codes.matrix.set_value(jnp.asarray(matrix, jnp.float32))
    found = codes(2, 3)
    assert found.dtype == jnp.float32
    wanted = []
    for y in (-1 / 2, 1 / 2):
        for x in (-2 / 3, 0, 2 / 3):
            turns = np.asarray([x / 4, y / 2, x - y])
            wanted.append([*np.sin(2 * np.pi * turns), *np.cos(2 * np.pi * turns)])
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_fourier_matrix_is_stored_and_never_trained(decoder):
    for positions in decoder.positions:
        assert isinstance(positions.matrix, Constant)
    assert not issubclass(Constant, nnx.Param)
    trained = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    assert not [path for path, _ in trained if "matrix" in path]


# Any N and L


@pytest.mark.parametrize(("scales", "tokens", "depth"), [(1, 3, 2), (2, 1, 1), (3, 3, 1)])
def test_any_n_and_l_gives_masks_of_four_times_the_grid_and_trains(scales, tokens, depth):
    config = config_of(scales, tokens, depth)
    parts = {"codebook": drawn(Codebook, config), "decoder": drawn(PixelDecoder, config)}
    graph, trained, rest = nnx.split(nnx.Dict(**parts), nnx.Param, ...)
    side = 4 * GRID
    assert config.mask_grid == side
    weight = jnp.asarray(draw(52, B, M, side, side))

    @partial(jax.jit, compiler_options=QUICK)
    def slopes(trained: nnx.State, states: jax.Array, projected: jax.Array) -> tuple:
        def total(trained: nnx.State) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graph, trained, rest)
            features = model.decoder.features(projected)
            masks = model.decoder(features, model.codebook.fuse_tokens(states))
            return (model.codebook.fuse_masks(masks) * weight).sum(), masks

        return jax.grad(total, has_aux=True)(trained)

    states = jnp.asarray(draw(53, B, M, scales, tokens, D))
    gradient, masks = slopes(trained, states, jnp.asarray(draw(54, B, scales, GRID, GRID, D)))
    assert masks.shape == (scales, B, M, side, side)
    assert masks.dtype == jnp.float32
    largest = {
        ".".join(map(str, path)): float(np.abs(variable.get_value()).max())
        for path, variable in nnx.to_flat_state(gradient)
    }
    assert len(largest) == len(nnx.to_flat_state(trained)) > 50
    scale = max(largest.values())
    assert np.isfinite(scale)
    for name, size in largest.items():
        # The same vector added to every key changes no softmax: zero but for rounding.
        if name.endswith("key.bias"):
            assert size < 1e-6 * scale, name
        else:
            assert size > 1e-5 * scale, name


# Targets


def test_permuting_targets_permutes_masks(decoder, projected, queries, masks):
    order = [2, 0, 1]
    found = decode(decoder, jnp.asarray(projected), jnp.asarray(queries[:, order]))
    assert error(found, masks[:, :, order]) < LAYER
    assert error(found, masks) > 0.01


def test_a_mask_depends_on_its_own_query_only(decoder, projected, queries, masks):
    other = queries.copy()
    other[0, 1] = 1e4 * draw(60, 2, C)
    found = np.asarray(decode(decoder, jnp.asarray(projected), jnp.asarray(other)))
    changed = (found != masks).any(axis=(0, 3, 4))
    assert changed.tolist() == [[False, True, False], [False, False, False]]


def test_a_mask_depends_on_its_own_image_only(decoder, projected, queries, masks):
    other = projected.copy()
    other[1] = draw(61, 2, GRID, GRID, D)
    found = np.asarray(decode(decoder, jnp.asarray(other), jnp.asarray(queries)))
    changed = (found != masks).any(axis=(0, 3, 4))
    assert changed.tolist() == [[False] * M, [True] * M]


def test_further_scales_see_the_masks_before_them(decoder, projected, queries, masks):
    for scale, feels in ((0, [True, True]), (1, [False, True])):
        other = queries.copy()
        other[:, :, scale] = draw(62, B, M, C)
        found = np.asarray(decode(decoder, jnp.asarray(projected), jnp.asarray(other)))
        assert [error(found[s], masks[s]) > WHOLE for s in (0, 1)] == feels
        assert (found[0] == masks[0]).all() != feels[0]


# PyTorch, from the description: tensors carry no batch axis; images are [c y x].


PIXEL_EPS, TOKEN_EPS = 1e-6, 1e-5  # of norms over the channels of a pixel, and over tokens


def tensor(parameter: nnx.Variable) -> Any:
    import torch

    return torch.tensor(np.asarray(parameter.get_value()))


def linear(module: Any, x: Any) -> Any:
    weight = tensor(module.weight)
    weight = weight.reshape(np.prod(weight.shape[: module.inputs]), -1)
    y = x @ weight
    return y if module.bias is None else y + tensor(module.bias).reshape(-1)


def norm(module: Any, x: Any, eps: float) -> Any:
    from torch.nn.functional import layer_norm

    return layer_norm(x, x.shape[-1:], tensor(module.weight), tensor(module.bias), eps)


def norm2d(module: Any, x: Any) -> Any:
    """Over the channels of every pixel."""
    return norm(module, x.permute(1, 2, 0), PIXEL_EPS).permute(2, 0, 1)


def attention(module: Any, query: Any, key: Any, value: Any) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    parts = zip((module.query, module.key, module.value), (query, key, value), strict=True)
    heads = [linear(part, x).unflatten(-1, (HEADS, -1)).transpose(0, 1) for part, x in parts]
    return linear(module.out, scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1))


def two_way_layer(layer: Any, first: bool, tokens: Any, image: Any, code: Any, place: Any) -> tuple:
    if first:
        tokens = attention(layer.token_attention, tokens, tokens, tokens)
    else:
        tokens = tokens + attention(layer.token_attention, tokens + code, tokens + code, tokens)
    tokens = norm(layer.token_norm, tokens, TOKEN_EPS)
    tokens = tokens + attention(layer.token_to_image, tokens + code, image + place, image)
    tokens = norm(layer.image_read_norm, tokens, TOKEN_EPS)
    hidden = linear(layer.mlp.layers[0], tokens).clamp(min=0)
    tokens = norm(layer.mlp_norm, tokens + linear(layer.mlp.layers[1], hidden), TOKEN_EPS)
    image = image + attention(layer.image_to_token, image + place, tokens + code, tokens)
    return tokens, norm(layer.image_norm, image, TOKEN_EPS)


def upsample(module: Any, x: Any) -> Any:
    from torch.nn.functional import conv_transpose2d, gelu

    weight = tensor(module.convolution.weight).permute(0, 3, 1, 2)
    x = conv_transpose2d(x[None], weight, tensor(module.convolution.bias), stride=2)[0]
    return gelu(norm2d(module.norm, x))


def neck(module: Any, x: Any) -> Any:
    from torch.nn.functional import conv2d

    x = norm2d(
        module.reduce_norm, conv2d(x[None], tensor(module.reduce.weight).T[..., None, None])[0]
    )
    weight = tensor(module.mix).permute(3, 2, 0, 1)
    return norm2d(module.mix_norm, conv2d(x[None], weight, padding=1)[0])


def resized(mask: Any, side: int) -> Any:
    from torch.nn.functional import interpolate

    return interpolate(mask[None, None], (side, side), mode="bilinear", align_corners=False)[0, 0]


def decode_one(decoder: Any, scale: int, image: Any, query: Any, previous: Any) -> Any:
    """The mask logits of one target at one scale, at twice the side of `image`."""
    import torch

    c, side, _ = image.shape
    tokens = torch.cat(
        [tensor(decoder.score_token)[None], tensor(decoder.mask_tokens), query[None]]
    )
    tokens = tokens + tensor(decoder.level)[scale]
    if previous is not None:
        image = image * (resized(previous, side).sigmoid() + 1)
    pixels = (image + tensor(decoder.dense)[:, None, None]).flatten(1).T
    centre = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    angle = (
        2
        * torch.pi
        * torch.stack([x, y], -1).reshape(-1, 2)
        @ tensor(decoder.positions[scale].matrix)
    )
    place = torch.cat([angle.sin(), angle.cos()], dim=-1)

    transformer, code = decoder.transformers[scale], tokens
    for i, layer in enumerate(transformer.layers):
        tokens, pixels = two_way_layer(layer, i == 0, tokens, pixels, code, place)
    tokens = tokens + attention(transformer.token_to_image, tokens + code, pixels + place, pixels)
    weights = norm(transformer.norm, tokens, TOKEN_EPS)[1]  # of the first mask token
    *hidden, last = decoder.hypernetwork.layers
    for layer in hidden:
        weights = linear(layer, weights).clamp(min=0)
    return torch.einsum(
        "cyx,c->yx",
        upsample(decoder.output, pixels.T.reshape(c, side, side)),
        linear(last, weights),
    )


@pytest.mark.torch
@pytest.mark.parametrize("first", [True, False])
def test_two_way_layer_is_that_of_the_description(first):
    import torch

    layer = drawn(lambda key, config: TwoWayLayer(key, config.decoder, first=first), config_of(1))
    tokens, image, code = draw(1, 1, 1, 7, C), draw(2, 1, 1, 11, C), draw(3, 1, 1, 7, C)
    place = draw(4, 11, C)
    found = jax.jit(lambda *x: layer(*x))(*map(jnp.asarray, (tokens, image, code, place)))
    flat = (torch.tensor(a) for a in (tokens[0, 0], image[0, 0], code[0, 0], place))
    for ours, theirs in zip(found, two_way_layer(layer, first, *flat), strict=True):
        assert error(ours[0, 0], theirs.numpy()) < LAYER


@pytest.mark.torch
def test_neck_is_that_of_the_description(decoder, projected):
    import torch

    features = projected[:, 0] * np.float32([[[[1]]], [[[1e-3]]]])  # faint ones show the epsilon
    found = jax.jit(lambda neck, x: neck(x))(decoder.neck, jnp.asarray(features))
    for ours, x in zip(found, features, strict=True):
        theirs = neck(decoder.neck, torch.tensor(x.transpose(2, 0, 1)))
        assert error(ours, theirs.numpy().transpose(1, 2, 0)) < LAYER


@pytest.mark.torch
def test_whole_decoder_is_that_of_the_description(decoder, projected, queries, masks):
    import torch

    for b, m in np.ndindex(B, M):
        images = [neck(decoder.neck, torch.tensor(x.transpose(2, 0, 1))) for x in projected[b]]
        images[1] = upsample(decoder.upsamples[0], images[1])
        query = torch.tensor(queries[b, m])
        early = decode_one(decoder, 0, images[0], query[0], None)
        late = decode_one(decoder, 1, images[1], query[1], early)
        assert error(masks[0, b, m], resized(early, 4 * GRID).numpy()) < WHOLE
        assert error(masks[1, b, m], late.numpy()) < WHOLE


@pytest.mark.parametrize("scales", [1, 2])
def test_no_target_at_all(scales):
    config = config_of(scales)
    decoder = drawn(PixelDecoder, config)
    features = decoder.features(jnp.asarray(draw(1, B, scales, GRID, GRID, D)))
    masks = decoder(features, jnp.zeros((B, 0, scales, C)))
    assert masks.shape == (scales, B, 0, 4 * GRID, 4 * GRID)
