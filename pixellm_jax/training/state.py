"""State of a training run: its parts, their shardings, and how they are initialised."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Int

from pixellm_jax.config import ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.model.layers import Constant
from pixellm_jax.model.lora import LORA, add_lora
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import replicated, weight_sharding
from pixellm_jax.training.config import TrainConfig
from pixellm_jax.training.optimizer import make_optimizer, state_shardings, trainable_names
from pixellm_jax.weights import checkpoint


class TrainState(NamedTuple):
    """Everything that a step changes, and the frozen weights that it reads.

    Attributes:
        step: updates so far, those without finite gradients included.
        trainable: dotted name -> float32 master weight.
        frozen: dotted name -> weight in the compute dtype (constants keep theirs).
        optimizer: moments of the optimizer.
        skipped: steps without finite gradients.
        skipped_in_row: consecutive steps without finite gradients, up to the last one.
    """

    step: Int[Array, ""]
    trainable: dict[str, Array]
    frozen: dict[str, Array]
    optimizer: optax.OptState
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


@dataclass(frozen=True, kw_only=True, eq=False)
class Blueprint:
    """Structure of a model in training, without any weights.

    Attributes:
        config: model configuration.
        train: training configuration.
        graph: graph definition of the model (`nnx.split`).
        variables: (path, variable) of every parameter.
        trainable: dotted names of the trained parameters.
        shapes: shape and dtype of every parameter by dotted name.
        axes: logical axes of every parameter by dotted name.
    """

    config: ModelConfig
    train: TrainConfig
    graph: Any
    variables: Any
    trainable: frozenset[str]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, str]

    def assemble(self, values: Mapping[str, Array]) -> PixelLM:
        """Return the model with these weights (or shapes)."""
        flat = [(path, variable.replace(values[_name(path)])) for path, variable in self.variables]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def model(self, state: TrainState) -> PixelLM:
        """Return the model of a state."""
        return self.assemble(state.trainable | state.frozen)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Gradient transformation of the trained parameters."""
        axes = {name: self.axes[name] for name in sorted(self.trainable)}
        return make_optimizer(self.train.optimizer, self.train.steps, axes)

    def shardings(self, mesh: Mesh) -> dict[str, Sharding]:
        """Return the sharding of every parameter."""
        return {
            name: weight_sharding(self.axes[name], shape.shape, mesh)
            for name, shape in self.shapes.items()
        }

    def state(self, mesh: Mesh) -> TrainState:
        """Return shapes, dtypes and shardings of the full state."""
        shardings = self.shardings(mesh)
        trainable: dict[str, Any] = {}
        frozen: dict[str, Any] = {}
        for name, shape in self.shapes.items():
            part = trainable if name in self.trainable else frozen
            part[name] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name])
        everywhere = replicated(mesh)
        moments = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            jax.eval_shape(self.optimizer.init, trainable),
            state_shardings(
                self.optimizer,
                trainable,
                {name: shardings[name] for name in trainable},
                everywhere,
            ),
        )
        count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        return TrainState(count, trainable, frozen, moments, count, count)


def make_blueprint(config: ModelConfig, train: TrainConfig) -> Blueprint:
    """Plan a training run without allocating an array.

    Raises:
        InputError: parameters that are neither trainable nor frozen, or unknown LoRA projections.
    """
    graph, state = nnx.split(jax.eval_shape(partial(_initialise, config, train), jax.random.key(0)))
    variables = nnx.to_flat_state(state)
    constants = {_name(path) for path, variable in variables if isinstance(variable, Constant)}
    names = {_name(path) for path, _ in variables}
    trainable = trainable_names(sorted(names - constants), sorted(constants), train)
    shapes, axes = {}, {}
    for path, variable in variables:
        name = _name(path)
        full_precision = name in trainable or name in constants
        dtype = jnp.float32 if full_precision else jnp.dtype(config.dtype)
        shapes[name] = jax.ShapeDtypeStruct(variable.get_value().shape, dtype)
        axes[name] = str(variable.get_metadata()["axes"])
    return Blueprint(
        config=config,
        train=train,
        graph=graph,
        variables=variables,
        trainable=trainable,
        shapes=shapes,
        axes=axes,
    )


def initial_state(blueprint: Blueprint, mesh: Mesh, init: Path | None) -> TrainState:
    """Return the state before the first step, created in its shards.

    The weights are random, or read from the checkpoint folder `init`; LoRA pairs are always random.

    Raises:
        InputError: `init` is not a checkpoint of this model.
    """
    spec = blueprint.state(mesh)
    values = _values(blueprint, mesh, init, {*blueprint.shapes})
    trainable = {name: values[name] for name in spec.trainable}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, spec.optimizer)
    moments = jax.jit(blueprint.optimizer.init, out_shardings=shardings)(trainable)
    # Three buffers, since the step donates each of them.
    step, skipped, skipped_in_row = (
        jax.device_put(jnp.int32(0), spec.step.sharding) for _ in range(3)
    )
    return TrainState(
        step=step,
        trainable=trainable,
        frozen={name: values[name] for name in spec.frozen},
        optimizer=moments,
        skipped=skipped,
        skipped_in_row=skipped_in_row,
    )


def frozen_values(blueprint: Blueprint, mesh: Mesh, init: Path) -> dict[str, Array]:
    """Read the frozen part of the initial state into its shards.

    Raises:
        InputError: `init` is not a checkpoint of this model.
    """
    return _values(blueprint, mesh, init, blueprint.shapes.keys() - blueprint.trainable)


def provenance(init: Path) -> dict[str, str]:
    """Return path and fingerprint of the checkpoint that provides the frozen weights.

    Raises:
        InputError: `init` cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in (init / checkpoint.CONFIG, init / checkpoint.PARAMS / "manifest.ocdbt"):
            digest.update(path.read_bytes())
    except OSError as error:
        raise InputError(f"{init}: cannot be read ({error.strerror}); name a checkpoint") from None
    return {"path": str(init), "fingerprint": digest.hexdigest()}


def _initialise(config: ModelConfig, train: TrainConfig, key: Array) -> PixelLM:
    model_key, lora_key = jax.random.split(key)
    model = PixelLM(model_key, config)
    if train.lora is not None:
        add_lora(model.language_model.layers, train.lora, lora_key)
    return model


def _random_values(blueprint: Blueprint, mesh: Mesh, names: set[str]) -> dict[str, Array]:
    """Initialise some of the parameters in their shards; the others are never computed."""
    if not names:
        return {}

    def initialise(key: Array) -> dict[str, Array]:
        state = nnx.state(_initialise(blueprint.config, blueprint.train, key))
        return {
            _name(path): variable[...].astype(blueprint.shapes[_name(path)].dtype)
            for path, variable in nnx.to_flat_state(state)
            if _name(path) in names
        }

    shardings = {
        name: sharding for name, sharding in blueprint.shardings(mesh).items() if name in names
    }
    # It runs once: on a CPU, optimising the many small generators takes longer than running them.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    jitted = jax.jit(initialise, out_shardings=shardings, compiler_options=options)
    return jitted(jax.random.key(blueprint.train.seed))


def _values(
    blueprint: Blueprint, mesh: Mesh, init: Path | None, names: Set[str]
) -> dict[str, Array]:
    """Read some of the parameters from `init`, or initialise them, in their shards."""
    random = {name for name in names if init is None or LORA in name.split(".")}
    values = _random_values(blueprint, mesh, random)
    if init is not None:
        values |= _read_values(blueprint, mesh, init, names - random)
    return values


def _read_values(
    blueprint: Blueprint, mesh: Mesh, init: Path, names: Iterable[str]
) -> dict[str, Array]:
    """Read some of the parameters from a checkpoint folder into their shards."""
    arrays = checkpoint.open_arrays(init)
    shardings = blueprint.shardings(mesh)
    checkpoint.check_arrays(init, checkpoint.read_config(init), arrays)
    values = {}
    for name in names:
        expected = blueprint.shapes[name]
        found = tuple(arrays[name].shape) if name in arrays else None
        if found != expected.shape:
            raise InputError(
                f"{init}: {name}: found {found or 'nothing'}, the recipe's model has "
                f"{expected.shape}; start from a checkpoint of the same model"
            )
        values[name] = checkpoint.restore(arrays[name], shardings[name], expected.dtype)
    return values


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
