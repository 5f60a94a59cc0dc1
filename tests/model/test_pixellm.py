"""The composition: packed sequences, garbage in invalid slots, image tokens, greedy decoding."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixellm_jax.batch import Batch, Prediction, check, spec
from pixellm_jax.config import (
    CodebookConfig,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from pixellm_jax.images.geometry import VOID
from pixellm_jax.inference.decoding import LENGTH as CUT
from pixellm_jax.inference.decoding import STOP, DecodeState
from pixellm_jax.model.pixellm import ImageFeatures, PixelLM, gather_states, visibility
from pixellm_jax.text.prompt import IMAGE_TOKEN, EncodedConversation, pack
from pixellm_jax.training.losses import Losses, losses
from tests.support.greedy_decoding import generate

# Float32 with sums in another order, relative to the largest value; a random model of this size
# amplifies rounding (1e-7) by two orders of magnitude at most.
TOLERANCE = 2e-5

# Compiling a gradient costs more than running it: half as much without XLA's optimisations.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

CONFIG = ModelConfig(
    vision=VisionConfig(
        width=14, heads=2, layers=3, mlp=29, patch=3, canvas=15, table=7, taps=(-1, 1)
    ),
    language=LanguageConfig(
        vocabulary=53, width=11, layers=2, heads=6, kv_heads=2, head=10, mlp=23, max_positions=64
    ),
    codebook=CodebookConfig(tokens_per_scale=3, scales=2),
    decoder=DecoderConfig(width=24, heads=3, mlp=19, depth=1),
    image_grid=3,
    dtype="float32",
)
B, LENGTH, TARGETS, MASKS = 3, 47, 5, 13

PREFIX = [1, 41, IMAGE_TOKEN, 42]
SEG = list(range(43, 49))
QUESTIONS = [5, 6, 7], [8, 9, 10, 11, 12]
ANSWERS = [13, *SEG, 14, 2], [*SEG, 15, *SEG, 16, 17, 2]


def conversation(question: list[int], answer: list[int]) -> EncodedConversation:
    ids = np.asarray(PREFIX + question + answer, np.int32)
    asked = len(PREFIX) + len(question)
    starts = np.flatnonzero(ids == SEG[0])
    index = (starts[:, None] + np.arange(len(SEG))).reshape(-1, 2, 3).astype(np.int32)
    return EncodedConversation(ids, np.arange(len(ids)) >= asked, index)


BOTH = [conversation(*turn) for turn in zip(QUESTIONS, ANSWERS, strict=True)]


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def drawn(config: ModelConfig) -> PixelLM:
    """A model whose parameters, biases too, are drawn by numpy: there is nothing to compile."""
    graph, state = nnx.split(jax.eval_shape(partial(PixelLM, config=config), jax.random.key(0)))
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


class Result(NamedTuple):
    prediction: Prediction
    losses: Losses
    gradient: nnx.State


@partial(jax.jit, compiler_options=QUICK)
def _run(model: PixelLM, batch: Batch) -> Result:
    graph, trained, rest = nnx.split(model, nnx.Param, ...)

    def total(trained: nnx.State) -> tuple[jax.Array, tuple[Prediction, Losses]]:
        prediction = nnx.merge(graph, trained, rest)(batch)
        terms = losses(prediction, batch)
        return terms.total, (prediction, terms)

    gradient, (prediction, terms) = jax.grad(total, has_aux=True)(trained)
    return Result(prediction, terms, gradient)


def run(model: PixelLM, batch: Batch) -> Result:
    """One compilation serves all tests: every batch has the same shapes."""
    assert batch.tokens.shape == (B, LENGTH)
    return jax.tree.map(np.asarray, _run(model, batch))


@pytest.fixture(scope="module")
def model() -> PixelLM:
    model = drawn(CONFIG)
    table = model.language_model.embedding
    table.set_value(10 * table.get_value())  # so that an id matters to the next: varied answers
    return model


@pytest.fixture(scope="module")
def batch() -> Batch:
    """One image three times: both conversations packed, the first alone, the second alone."""
    rng = np.random.default_rng(3)
    rows = [
        pack(part, image_tokens=CONFIG.image_tokens, length=LENGTH, targets=TARGETS)
        for part in (BOTH, BOTH[:1], BOTH[1:])
    ]
    image = np.zeros((CONFIG.vision.canvas, CONFIG.vision.canvas, 3), np.uint8)
    image[:11] = rng.integers(0, 256, image[:11].shape)
    truth = rng.choice([0, 1, VOID], (3, MASKS, MASKS)).astype(np.uint8)
    masks = np.full((B, TARGETS, MASKS, MASKS), VOID, np.uint8)
    masks[0, :3], masks[1, :1], masks[2, :2] = truth, truth[:1], truth[1:]
    batch = Batch(
        image=np.stack([image] * B),
        image_hw=np.asarray([[11, 15]] * B, np.int32),
        tokens=np.stack([row.tokens for row in rows]),
        segment=np.stack([row.segment for row in rows]),
        position=np.stack([row.position for row in rows]),
        loss_mask=np.stack([row.loss_mask for row in rows]),
        codebook_index=np.stack([row.codebook_index for row in rows]),
        masks=masks,
        target_valid=np.stack([row.target_valid for row in rows]),
        target_conversation=np.stack([row.target_conversation for row in rows]),
    )
    check(batch, CONFIG)
    assert batch.target_valid.sum(axis=1).tolist() == [3, 1, 2]
    assert (batch.segment == -1).any(axis=1).all()
    return batch


@pytest.fixture(scope="module")
def mixed(batch) -> Batch:
    """The same sequences with three different images of different sizes."""
    image = np.random.default_rng(4).integers(0, 256, batch.image.shape, dtype=np.uint8)
    return batch._replace(image=image, image_hw=np.asarray([[11, 15], [15, 8], [5, 15]], np.int32))


@pytest.fixture(scope="module")
def result(model, batch) -> Result:
    return run(model, batch)


@pytest.fixture(scope="module")
def mixed_result(model, mixed) -> Result:
    return run(model, mixed)


# Packing


def test_packed_conversations_are_those_of_rows_of_their_own(batch, result):
    for row, part in ((1, 1), (2, 2)):
        packed = np.flatnonzero(np.isin(batch.segment[0], (0, part)))
        alone = np.flatnonzero(batch.segment[row] >= 0)
        np.testing.assert_array_equal(batch.tokens[0, packed], batch.tokens[row, alone])
        for name in ("hidden", "text_logits"):
            values = getattr(result.prediction, name)
            assert error(values[0, packed], values[row, alone]) < TOLERANCE
        targets = batch.target_conversation[0] == part
        masks = result.prediction.mask_logits
        assert error(masks[0, targets], masks[row, batch.target_valid[row]]) < TOLERANCE
    hidden = result.prediction.hidden
    first, second = (np.flatnonzero(batch.segment[0] == part)[0] for part in (1, 2))
    assert error(hidden[0, first], hidden[0, second]) > 0.01


def test_losses_of_the_packed_row_are_those_of_its_conversations(model, batch, result):
    def only(*rows: int) -> Losses:
        keep = np.isin(np.arange(B), rows)
        kept = batch._replace(
            loss_mask=batch.loss_mask & keep[:, None],
            target_valid=batch.target_valid & keep[:, None],
        )
        return losses(jax.tree.map(jnp.asarray, result.prediction), kept)

    for packed, alone in zip(only(0), only(1, 2), strict=True):
        assert error(packed, alone) < TOLERANCE
        assert packed > 0


def test_visibility_by_hand():
    segment = jnp.asarray([[0, 0, 1, 1, 2, 2, -1]])
    valid = jnp.asarray([[True, False, True, True, True, True, True]])
    wanted = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 0, 0],  # padding sees the prefix and is seen by nobody
    ]
    np.testing.assert_array_equal(visibility(segment, valid)[0], np.asarray(wanted, bool))


def test_gather_states_by_hand():
    hidden = jnp.asarray(draw(1, 2, 7, 3))
    index = np.random.default_rng(2).integers(0, 7, (2, 5, 2, 3)).astype(np.int32)
    found = gather_states(hidden, jnp.asarray(index))
    for place in np.ndindex(*index.shape):
        np.testing.assert_array_equal(found[place], hidden[place[0], index[place]])


def test_permuting_a_batch_permutes_what_comes_out(model, mixed, mixed_result):
    order = np.asarray([2, 0, 1])
    found = run(model, Batch(*(field[order] for field in mixed)))
    for name in Prediction._fields:
        wanted = getattr(mixed_result.prediction, name)
        assert error(getattr(found.prediction, name), wanted[order]) < TOLERANCE
        assert error(getattr(found.prediction, name), wanted) > 0.01
    for ours, wanted in zip(found.losses, mixed_result.losses, strict=True):
        assert error(ours, wanted) < TOLERANCE


# Padding


def test_garbage_in_every_invalid_slot_changes_no_bit(model, mixed, mixed_result):
    rng = np.random.default_rng(8)

    def garbage(name: str, valid: np.ndarray, low: int, high: int) -> np.ndarray:
        field = getattr(mixed, name)
        valid = valid.reshape(valid.shape + (1,) * (field.ndim - valid.ndim))
        assert not valid.all()
        return np.where(valid, field, rng.integers(low, high, field.shape)).astype(field.dtype)

    live, filled = mixed.segment >= 0, mixed.target_valid
    side = np.arange(CONFIG.vision.canvas)
    inside = (side < mixed.image_hw[:, :1])[:, :, None] & (side < mixed.image_hw[:, 1:])[:, None]
    found = run(
        model,
        mixed._replace(
            image=garbage("image", inside, 0, 256),
            tokens=garbage("tokens", live, 0, CONFIG.language.vocabulary),
            position=garbage("position", live, 0, 1000),
            codebook_index=garbage("codebook_index", filled, -1000, 1000),
            masks=garbage("masks", filled, 0, 256),
            target_conversation=garbage("target_conversation", filled, -1000, 1000),
        ),
    )
    np.testing.assert_array_equal(
        found.prediction.hidden[live], mixed_result.prediction.hidden[live]
    )
    np.testing.assert_array_equal(
        found.prediction.text_logits[live], mixed_result.prediction.text_logits[live]
    )
    np.testing.assert_array_equal(
        found.prediction.mask_logits[filled], mixed_result.prediction.mask_logits[filled]
    )
    assert (found.prediction.hidden[~live] != mixed_result.prediction.hidden[~live]).any()
    assert (
        found.prediction.mask_logits[~filled] != mixed_result.prediction.mask_logits[~filled]
    ).any()
    assert found.losses == mixed_result.losses
    for ours, wanted in zip(
        *map(jax.tree.leaves, (found.gradient, mixed_result.gradient)), strict=True
    ):
        assert np.isfinite(ours).all()
        assert not wanted.any() or error(ours, wanted) < TOLERANCE


def test_image_tokens_of_the_padding_are_never_attended_to(model, batch):
    # Rows 0-10 of 15: patch rows 0-3 of 5 are valid, and image tokens sample patch rows 0, 1, 3.
    # Rows 0-5: patch rows 0 and 1, so the last row of image tokens is padding.
    hw = jnp.asarray([[11, 15], [5, 15], [15, 4]])
    features = encode(model, jnp.asarray(batch.image), hw)
    grid = [
        [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
        [[1, 1, 1], [1, 1, 1], [0, 0, 0]],
        [[1, 1, 0], [1, 1, 0], [1, 1, 0]],
    ]
    np.testing.assert_array_equal(features.token_valid, np.reshape(grid, (3, 9)).astype(bool))
    tokens, segment = jnp.asarray(batch.tokens), jnp.asarray(batch.segment)

    @partial(jax.jit, compiler_options=QUICK)
    def slope(seen: jax.Array, probe: jax.Array) -> jax.Array:
        def read(seen: jax.Array) -> jax.Array:
            visible = visibility(segment, model.token_valid(tokens, features.token_valid))
            x = model.embed(tokens, seen)
            return (model.language_model(x, jnp.asarray(batch.position), visible) * probe).sum()

        return jax.grad(read)(seen)

    text = (batch.tokens >= 0) & (batch.segment >= 0)
    probe = jnp.asarray(draw(3, B, LENGTH, CONFIG.language.width) * text[..., None])
    felt = np.abs(np.asarray(slope(features.tokens, probe))).sum(-1)
    np.testing.assert_array_equal(felt > 0, features.token_valid)


# Images


@jax.jit
def encode(model: PixelLM, image: jax.Array, hw: jax.Array) -> ImageFeatures:
    return model.encode_image(image, hw)


def test_uint8_images_are_normalised_inside_the_picture_and_zero_outside(model, mixed):
    pixels = (mixed.image - np.float32(CONFIG.pixel_mean)) / np.float32(CONFIG.pixel_std)
    for image, (h, w) in zip(pixels, mixed.image_hw, strict=True):
        image[h:], image[:, w:] = 0, 0
    hw = jnp.asarray(mixed.image_hw)
    found = jax.jit(lambda image: model.normalise(image, hw))(jnp.asarray(mixed.image))
    np.testing.assert_allclose(found, pixels, atol=1e-6)
    # A float image is one that is normalised already.
    np.testing.assert_array_equal(model.normalise(jnp.asarray(pixels), hw), pixels)
    ours = encode(model, jnp.asarray(mixed.image), hw)
    theirs = encode(model, jnp.asarray(pixels, jnp.float32), hw)
    assert error(ours.tokens, theirs.tokens) < TOLERANCE
    for a, b in zip(ours.maps, theirs.maps, strict=True):
        assert error(a, b) < TOLERANCE


def test_image_tokens_enter_the_sequence_in_order(model):
    seen = jnp.asarray(draw(1, 2, 9, CONFIG.language.width))
    tokens = np.asarray([[1, 3, *[IMAGE_TOKEN] * 9, 5], [7] * 12], np.int32)
    found = np.asarray(model.embed(jnp.asarray(tokens), seen))
    table = np.asarray(model.language_model.embedding[...])
    np.testing.assert_array_equal(found[0, 2:11], seen[0])
    np.testing.assert_array_equal(found[0, [0, 1, 11]], table[[1, 3, 5]])
    np.testing.assert_array_equal(found[1], table[[7] * 12])  # a row of text has no image


# Gradients and dtypes


def test_every_parameter_gets_a_gradient(mixed_result):
    slopes = {
        ".".join(map(str, path)): float(np.abs(variable.get_value()).max())
        for path, variable in nnx.to_flat_state(mixed_result.gradient)
    }
    largest = max(slopes.values())
    assert np.isfinite(list(slopes.values())).all()
    # The same vector added to every key changes no softmax: zero but for rounding. (LLaMA's keys
    # have no bias.)
    flat = {name for name in slopes if name.endswith("key.bias")}
    assert len(flat) == 1 + 2 * 4  # vision layers (stacked), four attentions per scale
    for name, size in slopes.items():
        assert size < 1e-5 * largest if name in flat else size > 1e-5 * largest, name


def test_losses_and_logits_are_float32_in_a_bfloat16_model(batch):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    model = jax.eval_shape(partial(PixelLM, config=config), jax.random.key(0))
    shapes = spec(config, batch=2, length=LENGTH, targets=TARGETS, masks=MASKS)
    found = jax.eval_shape(lambda model, batch: model(batch), model, shapes)
    assert found.hidden.dtype == jnp.bfloat16
    assert found.text_logits.dtype == found.mask_logits.dtype == jnp.float32
    side = config.mask_grid
    assert found.mask_logits.shape == (2, TARGETS, side, side)
    assert found.text_logits.shape == (2, LENGTH, config.language.vocabulary)
    terms = jax.eval_shape(losses, found, shapes)
    assert {term.dtype for term in terms} == {jnp.dtype("float32")}


# Greedy decoding

BUDGET = 7


class Decoded(NamedTuple):
    features: ImageFeatures
    prompts: list[np.ndarray]
    lengths: np.ndarray
    generation: DecodeState


def padded(prompts: list[np.ndarray], length: int) -> np.ndarray:
    """Prompts padded on the right with ids that nobody may see."""
    rows = [np.r_[prompt, np.arange(20, 20 + length - len(prompt))] for prompt in prompts]
    return np.stack(rows).astype(np.int32)


@pytest.fixture(scope="module")
def decoded(model, mixed) -> Decoded:
    """Two images, two prompts of different lengths, and no id that ends an answer."""
    features = encode(model, jnp.asarray(mixed.image), jnp.asarray(mixed.image_hw))
    features = jax.tree.map(lambda leaf: leaf[:2], features)
    expanded = [PREFIX[0], PREFIX[1], *[IMAGE_TOKEN] * CONFIG.image_tokens, PREFIX[3]]
    prompts = [np.asarray(expanded + question, np.int32) for question in QUESTIONS]
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    assert lengths[0] < lengths[1]
    generation = generate(model, features, padded(prompts, 19), lengths, budget=BUDGET, stop=-1)
    return Decoded(features, prompts, lengths, jax.tree.map(np.asarray, generation))


def test_generated_ids_are_the_teacher_forced_argmax_and_states_those_of_a_full_pass(
    model, mixed, decoded
):
    tokens, states = decoded.generation.tokens, decoded.generation.states
    assert decoded.generation.num_generated.tolist() == [BUDGET, BUDGET]
    assert decoded.generation.status.tolist() == [CUT, CUT]  # ended by nothing but the budget
    assert len(set(tokens.ravel())) > 5  # not one id over and over
    whole = np.zeros((B, LENGTH), np.int32)
    segment = np.full((B, LENGTH), -1, np.int32)
    for row, (prompt, answer) in enumerate(zip(decoded.prompts, tokens, strict=True)):
        whole[row, : len(prompt) + BUDGET] = np.r_[prompt, answer]
        segment[row, : len(prompt) + BUDGET] = 0
    whole[2], segment[2] = mixed.tokens[2], mixed.segment[2]
    counted = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (B, LENGTH))
    forced = run(model, mixed._replace(tokens=whole, segment=segment, position=counted)).prediction
    for row, length in enumerate(decoded.lengths):
        before = length - 1 + np.arange(BUDGET)
        np.testing.assert_array_equal(forced.text_logits[row, before].argmax(-1), tokens[row])
        assert error(states[row], forced.hidden[row, before]) < TOLERANCE
        chances = jax.nn.softmax(forced.text_logits[row, before], axis=-1).max(-1)
        assert error(decoded.generation.token_prob[row], chances) < TOLERANCE


def test_an_answer_depends_neither_on_padding_nor_on_the_other_rows(model, decoded):
    alone = generate(
        model,
        jax.tree.map(lambda leaf: leaf[1:], decoded.features),
        padded(decoded.prompts[1:], 29),
        decoded.lengths[1:],
        budget=BUDGET,
        stop=-1,
    )
    np.testing.assert_array_equal(np.asarray(alone.tokens)[0], decoded.generation.tokens[1])
    assert error(alone.states[0], decoded.generation.states[1]) < TOLERANCE


def test_a_row_ends_at_the_stop_id_and_the_others_go_on(model, decoded):
    tokens = decoded.generation.tokens
    stop = int(tokens[0, 2])
    first = [int(np.argmax(row == stop)) if stop in row else None for row in tokens]
    assert first == [2, None]
    found = generate(
        model,
        decoded.features,
        padded(decoded.prompts, 19),
        decoded.lengths,
        budget=BUDGET,
        stop=stop,
    )
    assert found.num_generated.tolist() == [3, BUDGET]
    assert found.status.tolist() == [STOP, CUT]
    np.testing.assert_array_equal(found.tokens[0, :3], tokens[0, :3])
    np.testing.assert_array_equal(found.tokens[1], tokens[1])


def test_decoding_ends_early_when_every_row_has_ended_and_at_a_budget_of_one(model, decoded):
    tokens = decoded.generation.tokens
    arguments = (
        model,
        jax.tree.map(lambda leaf: leaf[:1], decoded.features),
        padded(decoded.prompts[:1], 19),
        decoded.lengths[:1],
    )
    found = generate(*arguments, budget=BUDGET, stop=int(tokens[0, 1]))
    assert found.num_generated.tolist() == [2]
    np.testing.assert_array_equal(found.tokens[0, :2], tokens[0, :2])
    assert not np.asarray(found.states)[0, 2:].any()  # no pass was made for what nobody reads
    found = generate(*arguments, budget=1, stop=-1)
    assert found.num_generated.tolist() == [1]
    np.testing.assert_array_equal(found.tokens[0], tokens[0, :1])
