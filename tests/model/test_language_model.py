"""LLaMA: against Hugging Face on random weights; causality, the cache, packing, remat."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixellm_jax.config import LanguageConfig, ModelConfig
from pixellm_jax.model.language_model import Cache, LanguageBlock, LanguageModel
from pixellm_jax.model.layers import attend
from pixellm_jax.weights import torch_layout

# Float32 with sums in another order: relative to the largest value. Cached decoding, packing and
# unrolling multiply the same numbers in other shapes, so they share the bound of a layer.
LAYER, WHOLE = 1e-5, 1e-4

CONFIG = LanguageConfig(
    vocabulary=31,
    width=18,
    layers=3,
    heads=6,
    kv_heads=2,
    head=10,
    mlp=29,
    rope_theta=37.0,
    eps=0.03,
    max_positions=64,
)
# Compiling a gradient costs more than running it: half as much without XLA's optimisations.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

B, T = 2, 13
FLOAT = jnp.dtype("float32")


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def drawn(config: LanguageConfig) -> LanguageModel:
    """A model whose parameters are all drawn by numpy: there is nothing to compile."""
    build = partial(LanguageModel, config=config)
    graph, state = nnx.split(jax.eval_shape(build, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.asarray(draw(i, *leaf.shape) / 3) for i, leaf in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def error(found, wanted) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def counted(rows: int = B, length: int = T) -> jax.Array:
    return jnp.asarray(np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)))


def causal(rows: int = B, length: int = T) -> np.ndarray:
    return np.broadcast_to(np.tril(np.ones((length, length), bool)), (rows, length, length))


@jax.jit
def run(
    model: LanguageModel, x: jax.Array, position: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Final-norm states, and logits."""
    hidden = model(x, position, visible)
    return hidden, model.logits(hidden)


@jax.jit
def extend(
    model: LanguageModel,
    x: jax.Array,
    position: jax.Array,
    visible: jax.Array,
    cache: Cache,
    start: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Writes all rows from `start` on."""
    place = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape[:2])
    return model.extend(x, position, visible, cache, place)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return drawn(CONFIG)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return draw(77, B, T, CONFIG.width)


@pytest.fixture(scope="module")
def hidden(model, x) -> np.ndarray:
    """States of the full forward pass."""
    return np.asarray(run(model, jnp.asarray(x), counted(), jnp.asarray(causal()))[0])


# Against Hugging Face


@pytest.fixture(scope="module")
def llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=CONFIG.vocabulary,
        hidden_size=CONFIG.width,
        intermediate_size=CONFIG.mlp,
        num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads,
        num_key_value_heads=CONFIG.kv_heads,
        head_dim=CONFIG.head,
        rms_norm_eps=CONFIG.eps,
        max_position_embeddings=CONFIG.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def converted(llama) -> LanguageModel:
    """Our model with the tensors of `llama`, by their published names."""
    tensors = {name: value.numpy() for name, value in llama.state_dict().items()}
    graph, state = nnx.split(
        jax.eval_shape(partial(LanguageModel, config=CONFIG), jax.random.key(0))
    )
    variables = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
    for entry in torch_layout.table(ModelConfig(language=CONFIG), kind="required"):
        if entry.path.startswith("language_model."):
            layers = [entry.to_ours(tensors.pop(name)) for name in entry.names]
            value = np.stack(layers) if entry.count else layers[0]
            variables.pop(entry.path.removeprefix("language_model.")).set_value(jnp.asarray(value))
    assert not variables
    assert not tensors
    return nnx.merge(graph, state)


@pytest.mark.torch
def test_whole_model_and_every_layer_are_those_of_hugging_face(llama, converted):
    import torch

    tokens = np.random.default_rng(1).integers(0, CONFIG.vocabulary, (B, T)).astype(np.int32)
    with torch.no_grad():
        out = llama(torch.tensor(tokens).long(), output_hidden_states=True)
    states = [x.numpy() for x in out.hidden_states]
    assert len(states) == CONFIG.layers + 1

    embedded = converted.embed(jnp.asarray(tokens))
    np.testing.assert_array_equal(embedded, states[0])
    hidden, logits = run(converted, embedded, counted(), jnp.asarray(causal()))
    assert error(hidden, states[-1]) < WHOLE
    assert error(logits, out.logits.numpy()) < WHOLE

    for i in range(CONFIG.layers - 1):  # the state after the last layer is given normed only
        block = jax.tree.map(lambda leaf: leaf[i], converted.layers)  # noqa: B023
        assert error(run_block(block, jnp.asarray(states[i])), states[i + 1]) < LAYER


@jax.jit
def run_block(block: LanguageBlock, x: jax.Array) -> jax.Array:
    return block.finish(x, attend(*block.qkv(x, counted()), jnp.asarray(causal())))


# Causality


def test_a_state_depends_on_no_later_input_and_on_every_earlier_one(model, x):
    probe = jnp.asarray(draw(5, B, CONFIG.width))

    @partial(jax.jit, compiler_options=QUICK)
    def slope(x: jax.Array, at: jax.Array) -> jax.Array:
        def read(x: jax.Array) -> jax.Array:
            hidden = model(x, counted(), jnp.asarray(causal()))
            return (jax.lax.dynamic_index_in_dim(hidden, at, 1, False) * probe).sum()

        return jax.grad(read)(x)

    for at in (0, 5, T - 1):
        felt = np.abs(np.asarray(slope(jnp.asarray(x), jnp.int32(at)))).sum(-1)
        assert (felt[:, at + 1 :] == 0).all()
        assert (felt[:, : at + 1] > 0).all()


# Decoding with a cache


@pytest.mark.parametrize("pieces", [(7, 1, 1, 1, 1, 1, 1), (1, 7, 4, 1), (7, 4, 1, 1)])
def test_extending_in_pieces_is_the_full_forward_pass(model, x, hidden, pieces):
    assert sum(pieces) == T
    room = T + 4  # the cache is longer than the sequence
    cache = model.empty_cache(B, room, FLOAT)
    visible = np.pad(causal(), ((0, 0), (0, 0), (0, room - T)))
    start = 0
    for size in pieces:
        now = slice(start, start + size)
        found, cache = extend(
            model,
            jnp.asarray(x[:, now]),
            counted()[:, now],
            jnp.asarray(visible[:, now]),
            cache,
            jnp.int32(start),
        )
        assert error(found, hidden[:, now]) < LAYER
        start += size
    assert not np.stack(cache.key)[:, :, :, T:].any()  # nothing is written past the sequence


def test_cache_positions_that_nobody_sees_do_not_matter(model, x, hidden):
    room = T + 4
    empty = model.empty_cache(B, room, FLOAT)
    visible = np.pad(causal(), ((0, 0), (0, 0), (0, room - T)))
    arguments = [jnp.asarray(x[:, :7]), counted()[:, :7], jnp.asarray(visible[:, :7])]
    clean, _ = extend(model, *arguments, empty, jnp.int32(0))
    dirty = jax.tree.map(lambda leaf: jnp.asarray(1e4 * draw(8, *leaf.shape)), empty)
    found, cache = extend(model, *arguments, dirty, jnp.int32(0))
    np.testing.assert_array_equal(found, clean)
    # What was there beyond the seven new positions is still there: they alone were written.
    for now, before in zip(cache.value, dirty.value, strict=True):
        np.testing.assert_array_equal(now[:, :, 7:], before[:, :, 7:])
    assert error(clean, hidden[:, :7]) < LAYER


def test_rotary_position_counts_and_not_the_place_in_the_cache(model, x, hidden):
    # The same seven states, written four places further on, with their own positions.
    room = T + 4
    cache = model.empty_cache(B, room, FLOAT)
    visible = np.pad(causal()[:, :7, :7], ((0, 0), (0, 0), (4, room - 11)))
    found, cache = extend(
        model, jnp.asarray(x[:, :7]), counted()[:, :7], jnp.asarray(visible), cache, jnp.int32(4)
    )
    assert error(found, hidden[:, :7]) < LAYER
    assert not np.stack(cache.key)[:, :, :, :4].any()
    shifted, _ = extend(
        model,
        jnp.asarray(x[:, :7]),
        counted()[:, :7] * 2,
        jnp.asarray(visible),
        cache,
        jnp.int32(4),
    )
    assert error(shifted, hidden[:, :7]) > 0.01


def test_every_row_writes_at_a_place_of_its_own_and_nowhere_beyond_the_cache(model, x, hidden):
    room, starts = T + 4, (0, 3)
    cache = model.empty_cache(B, room, FLOAT)
    place = np.asarray(starts)[:, None] + np.arange(7)
    visible = np.zeros((B, 7, room), bool)
    for row, start in enumerate(starts):
        visible[row, :, start : start + 7] = causal()[row, :7, :7]
    place[1, 5:] = room  # the last two of the second row are written nowhere
    found, cache = jax.jit(LanguageModel.extend)(
        model, jnp.asarray(x[:, :7]), counted()[:, :7], jnp.asarray(visible), cache, place
    )
    assert error(found[0], hidden[0, :7]) < LAYER
    assert error(found[1, :5], hidden[1, :5]) < LAYER
    written = np.stack(cache.key).any(axis=(0, 2, 4))
    assert [np.flatnonzero(row).tolist() for row in written] == [[*range(7)], [*range(3, 8)]]


def test_unstacked_layers_are_the_stacked_ones(model, x, hidden):
    graph, state = nnx.split(model)
    apart = nnx.merge(graph, state)
    apart.layers = nnx.List(apart.blocks())
    stacked = dict(nnx.to_flat_state(nnx.state(model.layers)))
    for i, block in enumerate(apart.blocks()):
        for path, variable in nnx.to_flat_state(nnx.state(block)):
            np.testing.assert_array_equal(variable[...], stacked[path][i])
            axes = stacked[path].get_metadata()["axes"]
            assert f"layer {variable.get_metadata()['axes']}" == axes
    cache = apart.empty_cache(B, T, FLOAT)
    found, _ = extend(apart, jnp.asarray(x), counted(), jnp.asarray(causal()), cache, jnp.int32(0))
    assert error(found, hidden) < LAYER


# Packing


def test_two_packed_conversations_are_two_rows(model, x):
    prefix, first, second = 3, 4, 6
    assert prefix + first + second == T
    owner = np.repeat([0, 1, 2], [prefix, first, second])
    packed = causal(1)[0] & ((owner[:, None] == owner) | (owner == 0))
    places = [np.r_[:prefix, np.flatnonzero(owner == part)] for part in (1, 2)]
    rows, visible = np.repeat(x[:1], 3, axis=0), np.repeat(causal(1), 3, axis=0).copy()
    position = np.array(counted(3))
    visible[0] = packed
    position[0] = [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8]
    for row, place in enumerate(places, 1):
        rows[row, : len(place)] = x[0, place]  # what follows is garbage that nobody sees
    found, logits = run(model, *map(jnp.asarray, (rows, position, visible)))
    for row, place in enumerate(places, 1):
        assert error(found[0][place], found[row, : len(place)]) < LAYER
        assert error(logits[0][place], logits[row, : len(place)]) < LAYER
    unpacked = np.asarray(found[0])[places[1][-1]]
    alone, _ = run(model, *map(jnp.asarray, (rows, position, causal(3))))
    assert np.abs(alone[0, -1] - unpacked).max() > 0.01  # seeing the other conversation matters


# Rematerialisation


def test_scan_with_remat_is_the_unrolled_loop_and_so_are_its_gradients(model, x):
    visible, weight = jnp.asarray(causal()), jnp.asarray(draw(6, B, T, CONFIG.width))
    graph, state = nnx.split(model)

    def unrolled(model: LanguageModel, x: jax.Array) -> jax.Array:
        for i in range(CONFIG.layers):
            layer = jax.tree.map(lambda leaf: leaf[i], model.layers)  # noqa: B023
            x = layer.finish(x, attend(*layer.qkv(x, counted()), visible))
        return model.norm(x)

    def slopes(forward) -> tuple:
        def total(state: nnx.State, x: jax.Array) -> jax.Array:
            return (forward(nnx.merge(graph, state), x) * weight).sum()

        return jax.value_and_grad(total, argnums=(0, 1))(state, jnp.asarray(x))

    def ours() -> tuple:
        return slopes(lambda model, x: model(x, counted(), visible))

    assert "remat" in str(jax.make_jaxpr(ours)())
    compiled = partial(jax.jit, compiler_options=QUICK)
    leaves = (jax.tree.leaves(compiled(run)()) for run in (ours, lambda: slopes(unrolled)))
    for found, wanted in zip(*leaves, strict=True):
        if np.asarray(wanted).any():
            assert error(found, wanted) < LAYER
        else:  # embedding and head take no part here
            assert not np.asarray(found).any()


# Ids


def test_negative_ids_take_the_first_row_and_logits_are_float32(model):
    tokens = jnp.asarray([[-200, 30, 0]])
    found = model.embed(tokens)
    np.testing.assert_array_equal(found[0], np.asarray(model.embedding[...])[[0, 30, 0]])
    logits = model.logits(found.astype(jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert logits.shape == (1, 3, CONFIG.vocabulary)
