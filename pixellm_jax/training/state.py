"""The state of a training, where its parts lie on a mesh, and how it begins."""

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
    """All that a step changes, and the frozen weights it reads.

    step: updates so far, those without finite gradients included. trainable: dotted name ->
    float32 master weight. frozen: dotted name -> weight in the compute dtype (constants as they
    are). skipped, skipped_in_row: steps without finite gradients.
    """

    step: Int[Array, ""]
    trainable: dict[str, Array]
    frozen: dict[str, Array]
    optimizer: optax.OptState
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


@dataclass(frozen=True, kw_only=True, eq=False)
class Blueprint:
    """The model without its numbers: what is trained, and how to put it together.

    `shapes`, `axes`: of every parameter by dotted name.
    """

    config: ModelConfig
    train: TrainConfig
    graph: Any
    variables: Any
    trainable: frozenset[str]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, str]

    def assemble(self, values: Mapping[str, Array]) -> PixelLM:
        """The model with these numbers (or shapes)."""
        flat = [(path, variable.replace(values[_name(path)])) for path, variable in self.variables]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def model(self, state: TrainState) -> PixelLM:
        """The model of a state."""
        return self.assemble(state.trainable | state.frozen)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """What makes updates of gradients, and its state."""
        axes = {name: self.axes[name] for name in sorted(self.trainable)}
        return make_optimizer(self.train.optimizer, self.train.steps, axes)

    def shardings(self, mesh: Mesh) -> dict[str, Sharding]:
        """Where every parameter lies."""
        return {
            name: weight_sharding(self.axes[name], shape.shape, mesh)
            for name, shape in self.shapes.items()
        }

    def state(self, mesh: Mesh) -> TrainState:
        """Shapes, dtypes and places of the whole state."""
        places = self.shardings(mesh)
        parts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for name, shape in self.shapes.items():
            part = parts[name not in self.trainable]
            part[name] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=places[name])
        trainable, frozen = parts
        whole = replicated(mesh)
        own = {name: places[name] for name in trainable}
        moments = jax.tree.map(
            lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
            jax.eval_shape(self.optimizer.init, trainable),
            state_shardings(self.optimizer, trainable, own, whole),
        )
        count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return TrainState(count, trainable, frozen, moments, count, count)


def make_blueprint(config: ModelConfig, train: TrainConfig) -> Blueprint:
    """Plans a training without making an array.

    Raises:
        InputError: parameters that are neither trainable nor frozen, or unknown LoRA projections.
    """
    graph, state = nnx.split(jax.eval_shape(partial(_draw, config, train), jax.random.key(0)))
    variables = nnx.to_flat_state(state)
    constants = {_name(path) for path, variable in variables if isinstance(variable, Constant)}
    names = {_name(path) for path, _ in variables}
    trainable = trainable_names(sorted(names - constants), sorted(constants), train)
    shapes, axes = {}, {}
    for path, variable in variables:
        name = _name(path)
        fixed = name in trainable or name in constants
        dtype = jnp.float32 if fixed else jnp.dtype(config.dtype)
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
    """The state before the first step, made in its shards.

    The weights are drawn, or read from the checkpoint folder `init`; LoRA pairs are always drawn.

    Raises:
        InputError: `init` is no checkpoint of this model.
    """
    wanted, values = blueprint.state(mesh), _values(blueprint, mesh, init, {*blueprint.shapes})
    trainable = {name: values[name] for name in wanted.trainable}
    places = jax.tree.map(lambda leaf: leaf.sharding, wanted.optimizer)
    moments = jax.jit(blueprint.optimizer.init, out_shardings=places)(trainable)
    zero = [jax.device_put(jnp.int32(0), wanted.step.sharding) for _ in range(3)]
    frozen = {name: values[name] for name in wanted.frozen}
    return TrainState(zero[0], trainable, frozen, moments, zero[1], zero[2])


def frozen_values(blueprint: Blueprint, mesh: Mesh, init: Path) -> dict[str, Array]:
    """The part of the initial state that never changes, read into its shards.

    Raises:
        InputError: `init` is no checkpoint of this model.
    """
    return _values(blueprint, mesh, init, blueprint.shapes.keys() - blueprint.trainable)


def provenance(init: Path) -> dict[str, str]:
    """Where frozen weights come from, and a mark by which they are known again.

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


def _draw(config: ModelConfig, train: TrainConfig, key: Array) -> PixelLM:
    first, second = jax.random.split(key)
    model = PixelLM(first, config)
    if train.lora is not None:
        add_lora(model.language_model.layers, train.lora, second)
    return model


def _draw_values(blueprint: Blueprint, mesh: Mesh, names: set[str]) -> dict[str, Array]:
    """Some of the parameters, drawn in their shards; the others are never computed."""
    if not names:
        return {}

    def draw(key: Array) -> dict[str, Array]:
        state = nnx.state(_draw(blueprint.config, blueprint.train, key))
        return {
            _name(path): variable[...].astype(blueprint.shapes[_name(path)].dtype)
            for path, variable in nnx.to_flat_state(state)
            if _name(path) in names
        }

    places = {name: place for name, place in blueprint.shardings(mesh).items() if name in names}
    # It runs once: on a CPU, optimising the many small generators takes longer than the drawing.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    drawing = jax.jit(draw, out_shardings=places, compiler_options=options)
    return drawing(jax.random.key(blueprint.train.seed))


def _values(
    blueprint: Blueprint, mesh: Mesh, init: Path | None, names: Set[str]
) -> dict[str, Array]:
    """Some of the parameters, drawn where there is no `init` for them, in their shards."""
    drawn = {name for name in names if init is None or LORA in name.split(".")}
    values = _draw_values(blueprint, mesh, drawn)
    if init is not None:
        values |= _read_values(blueprint, mesh, init, names - drawn)
    return values


def _read_values(
    blueprint: Blueprint, mesh: Mesh, init: Path, names: Iterable[str]
) -> dict[str, Array]:
    """Some of the parameters from a checkpoint folder, in their shards."""
    arrays, places = checkpoint.open_arrays(init), blueprint.shardings(mesh)
    checkpoint.check_arrays(init, checkpoint.read_config(init), arrays)
    values = {}
    for name in names:
        want = blueprint.shapes[name]
        if name not in arrays or tuple(arrays[name].shape) != want.shape:
            have = tuple(arrays[name].shape) if name in arrays else "nothing"
            raise InputError(
                f"{init}: {name}: found {have}, the recipe's model has {want.shape}; start "
                "from a checkpoint of the same model"
            )
        values[name] = checkpoint.restore(arrays[name], places[name], want.dtype)
    return values


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
