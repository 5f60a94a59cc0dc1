"""The update: the same on every mesh and however it is cut into micro-batches; LoRA; bad steps.

Tolerance: float32 sums in another order, 1e-4 for the losses of a whole model as everywhere. The
first updates of Adam are signs of gradients times the learning rate, so parameters are compared
after one update that is smooth (eps = 1), relative to the largest update. There 5e-4: to change
every weight by one rounding (6e-8 of it) changes the update of this model by 1.5e-4, measured.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pixellm_jax.config import MeshConfig
from pixellm_jax.errors import InputError
from pixellm_jax.model.lora import LORA, merge_lora
from pixellm_jax.sharding import batch_sharding, make_mesh
from pixellm_jax.training.config import REFERENCE_FROZEN, OptimizerConfig
from pixellm_jax.training.state import TrainState, initial_state, make_blueprint
from pixellm_jax.training.step import StepMetrics, make_step
from tests.support.small_training import lora_train, small_batch, small_model, small_train

TOLERANCE, UPDATE_TOLERANCE = 1e-4, 5e-4
SMOOTH = OptimizerConfig(warmup=0, learning_rate=1.0, eps=1.0, clip=1e9, schedule="constant")

SLOW = partial(pytest.param, marks=pytest.mark.slow)
HIDDEN = jax.jit(lambda model, batch: model(batch).hidden)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def batch():
    return small_batch()


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    count = data * fsdp * tensor
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(config, jax.devices()[:count])


def one_update(train, mesh, batch) -> tuple[TrainState, TrainState, StepMetrics]:
    """State before (on the host) and after an update."""
    blueprint = make_blueprint(small_model(), train)
    state = initial_state(blueprint, mesh, None)
    before = jax.device_get(state)
    placed = jax.tree.map(lambda array: jax.device_put(array, batch_sharding(mesh)), batch)
    after, metrics = make_step(blueprint, mesh)(state, placed)
    return before, after, jax.device_get(metrics)


@pytest.fixture(scope="module")
def single(batch):
    return one_update(lora_train(optimizer=SMOOTH), mesh_of(1, 1, 1), batch)


def assert_same_update(one, other, tolerance: float = UPDATE_TOLERANCE) -> None:
    (before, after, metrics), (_, after2, metrics2) = one, other
    for name, value in metrics.losses._asdict().items():
        assert value == pytest.approx(getattr(metrics2.losses, name), rel=TOLERANCE)
    updates = {n: np.asarray(v) - before.trainable[n] for n, v in after.trainable.items()}
    largest = max(np.abs(update).max() for update in updates.values())
    for name, update in updates.items():
        other_update = np.asarray(after2.trainable[name]) - before.trainable[name]
        assert np.abs(other_update - update).max() <= tolerance * largest, name


@pytest.mark.parametrize("shape", [SLOW((8, 1, 1)), SLOW((1, 8, 1)), (2, 2, 2)])
def test_the_mesh_does_not_change_the_update(single, batch, shape):
    other = one_update(lora_train(optimizer=SMOOTH), mesh_of(*shape), batch)
    assert_same_update(single, other)


def test_micro_batches_do_not_change_the_update(single, batch):
    train = lora_train(optimizer=SMOOTH, accumulation=4)
    assert_same_update(single, one_update(train, mesh_of(2, 1, 1), batch))


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_weights_and_moments_lie_in_shards(method):
    mesh = mesh_of(2, 2, 2)
    train = lora_train(optimizer=OptimizerConfig(method=method))
    if method == "muon":
        train = small_train(optimizer=train.optimizer)
    state = initial_state(make_blueprint(small_model(), train), mesh, None)
    values = state.trainable | state.frozen
    head, query = values["language_model.head"], values["language_model.layers.query.weight"]
    assert head.sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert head.addressable_shards[0].data.size == head.size // 4
    assert query.addressable_shards[0].data.size == query.size // 4
    moments = jax.tree_util.tree_leaves_with_path(state.optimizer)
    moments = [(path[-1].key, leaf) for path, leaf in moments if leaf.shape not in ((), (3,))]
    assert {name for name, _ in moments} == state.trainable.keys()
    for name, leaf in moments:
        assert leaf.sharding == state.trainable[name].sharding, name


@pytest.mark.slow
def test_the_mesh_does_not_change_the_update_of_muon(batch):
    """2e-3 (measured 6e-4): directions with tiny gradients, whose own errors are larger, are
    turned as far as all others.
    """
    train = small_train(optimizer=dataclasses.replace(SMOOTH, method="muon"))
    one, other = (one_update(train, mesh_of(*shape), batch) for shape in [(1, 1, 1), (2, 2, 2)])
    assert_same_update(one, other, tolerance=2e-3)


def test_frozen_weights_stay_and_trained_ones_move(single):
    before, after, _ = single
    for name, value in before.frozen.items():
        np.testing.assert_array_equal(np.asarray(after.frozen[name]), value, err_msg=name)
    still = [n for n, v in before.trainable.items() if (np.asarray(after.trainable[n]) == v).all()]
    # The `down` half of a pair has no gradient while its other half is zero, and a key's bias
    # moves all scores of a query alike.
    expected = [n for n in still if n.endswith((".lora.down", ".key.bias"))]
    unread = "pixel_decoder.score_token"
    assert set(still) - {unread} == set(expected)
    assert any(n.endswith(".lora.down") for n in still)


def test_lora_starts_as_the_model_and_merges_into_it(batch):
    blueprint = make_blueprint(small_model(), lora_train())
    state = initial_state(blueprint, mesh_of(1, 1, 1), None)
    model = blueprint.model(state)
    layers = model.language_model.layers
    bare = blueprint.model(state)
    merge_lora(bare.language_model.layers)
    assert bare.language_model.layers.query.lora is None
    np.testing.assert_array_equal(bare.language_model.layers.query.weight[...], layers.query.weight)

    up = layers.query.lora.up
    up.set_value(jax.random.normal(jax.random.key(1), up.shape))
    merged = jax.tree.map(lambda leaf: leaf, model)
    merge_lora(merged.language_model.layers)
    with_pair, without = (HIDDEN(m, batch) for m in (model, merged))
    # Another order of float32 products: 1e-4 for a whole model, as everywhere.
    np.testing.assert_allclose(with_pair, without, atol=1e-4)
    assert not np.allclose(without, HIDDEN(bare, batch), atol=1e-3)


def test_dropout_is_drawn_from_the_key(batch):
    train = lora_train(lora=dataclasses.replace(lora_train().lora, dropout=0.5))
    blueprint = make_blueprint(small_model(), train)
    model = blueprint.model(initial_state(blueprint, mesh_of(1, 1, 1), None))
    up = model.language_model.layers.value.lora.up
    up.set_value(jnp.ones(up.shape))
    run = jax.jit(lambda m, batch, key: m(batch, key).hidden)
    one, same, other = (run(model, batch, jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert not np.allclose(one, HIDDEN(model, batch))


def test_a_step_without_finite_gradients_changes_nothing(batch):
    train = small_train()
    mesh = mesh_of(1, 1, 1)
    blueprint = make_blueprint(small_model(), train)
    step = make_step(blueprint, mesh)
    state = initial_state(blueprint, mesh, None)
    # Normalised pixels may be given as floats; one is not a number.
    poison = batch._replace(image=np.full(batch.image.shape, np.nan, np.float32))
    before = jax.device_get(state)
    state, metrics = step(state, poison)
    state, metrics = step(state, poison)
    assert not metrics.finite and int(metrics.skipped) == int(metrics.skipped_in_row) == 2
    for name, value in before.trainable.items():
        np.testing.assert_array_equal(np.asarray(state.trainable[name]), value, err_msg=name)
    state, metrics = step(state, batch)
    assert metrics.finite and int(metrics.skipped) == 2 and int(metrics.skipped_in_row) == 0
    assert int(state.step) == 3


def test_every_parameter_is_trainable_or_frozen():
    with pytest.raises(InputError, match="neither trainable nor frozen: codebook"):
        make_blueprint(small_model(), small_train(trainable=("vision_encoder", "language_model")))
    with pytest.raises(InputError, match="'nothing'.*match nothing"):
        make_blueprint(
            small_model(), lora_train(frozen=("vision_encoder", "language_model", "nothing"))
        )
    with pytest.raises(InputError, match="not a projection of a layer; choose from"):
        wrong = dataclasses.replace(lora_train().lora, projections=("querry",))
        make_blueprint(small_model(), lora_train(lora=wrong))


def test_the_longest_entry_decides_and_constants_are_never_trained():
    names = make_blueprint(small_model(), lora_train()).trainable
    assert "language_model.head" in names and "language_model.layers.query.weight" not in names
    assert "language_model.layers.query.lora.up" in names
    assert not any(name.endswith(".matrix") for name in names)
    assert {name for name in names if LORA in name.split(".")} == {
        f"language_model.layers.{side}.lora.{half}"
        for side in ("query", "value")
        for half in ("down", "up")
    }


def test_the_reference_mode_freezes_what_the_released_script_freezes():
    reference = make_blueprint(small_model(), lora_train(frozen=REFERENCE_FROZEN)).trainable
    ours = make_blueprint(small_model(), lora_train()).trainable
    parts = ("pixel_decoder.neck.", "pixel_decoder.dense", "codebook.token_", "codebook.mask_")
    assert ours - reference == {name for name in ours if name.startswith(parts)}
    assert "codebook.token_fusion" in ours - reference


def test_tokens_that_all_targets_share_start_small():
    state = initial_state(make_blueprint(small_model(), small_train()), mesh_of(1, 1, 1), None)
    for name in ("level", "mask_tokens", "score_token"):
        assert 0.005 < np.std(state.trainable[f"pixel_decoder.{name}"]) < 0.04


def test_mesh_sizes_must_multiply_to_the_devices():
    with pytest.raises(InputError, match="do not make 8 devices"):
        make_mesh(MeshConfig(data=3))
