"""Training step: gradients over the global batch, clipped, and applied if they are finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from pixellm_jax.batch import Batch, spec
from pixellm_jax.config import ModelConfig
from pixellm_jax.sharding import batch_sharding, replicated
from pixellm_jax.training.losses import Losses, count, losses
from pixellm_jax.training.optimizer import schedule
from pixellm_jax.training.state import Blueprint, TrainState


class StepMetrics(NamedTuple):
    """Metrics of a step, over the global batch.

    Attributes:
        losses: terms of the loss.
        gradient_norm: global norm before clipping.
        learning_rate: rate of this update.
        finite: loss and gradient norm are finite, so the update was applied.
        skipped: updates of the run so far that were not applied.
        skipped_in_row: skipped updates since the last applied one.
        tokens: supervised tokens.
        targets: supervised targets.
    """

    losses: Losses
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]
    tokens: Float[Array, ""]
    targets: Float[Array, ""]


Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_step(blueprint: Blueprint, mesh: Mesh) -> Step:
    """Return the jitted update on a mesh; it donates its input state.

    Losses are sums over all devices and micro-batches divided by the counts of the global batch, so
    that the update depends on the mesh and on `accumulation` by rounding only (and by dropout). If
    the loss or the gradient norm is not finite, weights and optimizer state stay unchanged and the
    step counts as skipped.
    """
    train = blueprint.train
    optimizer = blueprint.optimizer
    rate = schedule(train.optimizer, train.steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        counts = count(batch)
        key = jax.random.fold_in(jax.random.key(train.seed), state.step)

        def loss(trainable: dict[str, Array], part: Batch, key: Key[Array, ""]) -> tuple:
            model = blueprint.assemble(trainable | state.frozen)
            # The mesh makes `sharding.constrain` effective.
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                terms = losses(model(part, key), part, train.loss, counts)
            return terms.total, terms

        gradient_of = jax.grad(loss, has_aux=True)
        if train.accumulation == 1:
            gradients, terms = gradient_of(state.trainable, batch, key)
        else:
            gradients, terms = _accumulate(
                gradient_of, state.trainable, batch, key, train.accumulation
            )

        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(terms.total)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        updated = (optax.apply_updates(state.trainable, updates), optimizer_state)
        previous = (state.trainable, state.optimizer)
        trainable, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), updated, previous
        )
        skipped = 1 - finite.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            trainable=trainable,
            frozen=state.frozen,
            optimizer=optimizer_state,
            skipped=state.skipped + skipped,
            skipped_in_row=(state.skipped_in_row + 1) * skipped,
        )
        updates_applied = state.step - state.skipped
        return new_state, StepMetrics(
            losses=terms,
            gradient_norm=norm,
            learning_rate=jnp.asarray(rate(updates_applied), jnp.float32),
            finite=finite,
            skipped=new_state.skipped,
            skipped_in_row=new_state.skipped_in_row,
            tokens=counts.tokens,
            targets=counts.targets,
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, blueprint.state(mesh))
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def batch_spec(
    config: ModelConfig, mesh: Mesh, *, batch: int, length: int, targets: int, masks: int
) -> Batch:
    """Return shapes, dtypes and shardings of a batch, for lowering a step (see `batch.spec`)."""
    shapes = spec(config, batch=batch, length=length, targets=targets, masks=masks)
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


def _accumulate(
    gradient_of: Callable[..., tuple],
    trainable: dict[str, Array],
    batch: Batch,
    key: Key[Array, ""],
    parts: int,
) -> tuple[dict[str, Array], Losses]:
    """Sum gradients and loss terms over micro-batches, one after the other.

    Row i belongs to micro-batch i % parts, so that no row moves to another device (the rows of a
    device are a multiple of `parts`, as the loop checks).
    """

    def split(array: Array) -> Array:
        rows = array.shape[0] // parts
        return jnp.swapaxes(array.reshape(rows, parts, *array.shape[1:]), 0, 1)

    def add(sums: tuple, part: tuple[Batch, Array]) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, sums, gradient_of(trainable, *part)), None

    micro_batches = (jax.tree.map(split, batch), jax.random.split(key, parts))
    shapes = jax.eval_shape(
        gradient_of, trainable, jax.tree.map(lambda a: a[0], micro_batches[0]), key
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, micro_batches)[0]
