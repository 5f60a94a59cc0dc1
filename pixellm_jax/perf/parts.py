"""Benchmark of the parts of a training step, each compiled as a program of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from pixellm_jax.batch import Batch
from pixellm_jax.config import MeshConfig
from pixellm_jax.model import flops
from pixellm_jax.model.pixellm import PixelLM, gather_states, visibility
from pixellm_jax.perf.train_step import Timing, time_in_turns
from pixellm_jax.sharding import make_mesh
from pixellm_jax.training.losses import losses, mask_sums, text_sum
from pixellm_jax.training.state import Blueprint, initial_state

IMAGE_FEATURES = (
    "image_projector",
    "mask_projector",
    "pixel_decoder.neck",
    "pixel_decoder.upsamples",
)


class Part(NamedTuple):
    """One part of a step.

    Attributes:
        name: label in the table.
        call: runs the part and returns its arrays.
        flops: FLOPs of its matrix products, 0 where there are none.
    """

    name: str
    call: Callable[[], Any]
    flops: float = 0.0


class PartMeasurement(NamedTuple):
    """Measured cost of one part of a step."""

    name: str
    timing: Timing
    flops: float


def measure_parts(blueprint: Blueprint, batch: Batch, *, repeat: int) -> Iterator[PartMeasurement]:
    """Time every part of a training step, one after the other."""
    for part in parts_of_step(blueprint, batch):
        (timing,) = time_in_turns([part.call], repeat)
        yield PartMeasurement(part.name, timing, part.flops)


def parts_of_step(blueprint: Blueprint, batch: Batch) -> Iterator[Part]:
    """Yield forward and backward of every part, of all of them together, and the update.

    As in the step, a part is differentiated with respect to its trained parameters and its inputs.
    The parts do not add up to the step exactly: XLA fuses across parts, and separate programs copy
    more.
    """
    config = blueprint.config
    state = initial_state(blueprint, make_mesh(MeshConfig()), None)
    batch = jax.tree.map(jnp.asarray, batch)
    values: dict[str, Array] = state.trainable | state.frozen
    images, length = batch.tokens.shape
    targets = batch.target_valid.shape[1]
    work = flops.train_flops_of_parts(
        config, blueprint.trainable, images=images, length=length, targets=targets
    )

    def compile_part(
        run: Callable[..., Any], modules: tuple[str, ...], *inputs: Any
    ) -> Callable[[], Any]:
        """Compile run(model, inputs), with its gradient if any of `modules` is trained."""
        trained = {
            name: value
            for name, value in state.trainable.items()
            if f"{name}.".startswith(_dotted(modules))
        }
        rest = {name: value for name, value in values.items() if name not in trained}

        def forward(trained: Mapping[str, Array], rest: Mapping[str, Array], inputs: tuple) -> Any:
            return run(blueprint.assemble({**trained, **rest}), *inputs)

        def with_gradient(
            trained: Mapping[str, Array], rest: Mapping[str, Array], inputs: tuple
        ) -> Any:
            output, vjp = jax.vjp(
                lambda trained, inputs: forward(trained, rest, inputs), trained, inputs
            )
            return vjp(output)

        function = with_gradient if trained else forward
        compiled = jax.jit(function).lower(trained, rest, inputs).compile()
        return lambda: compiled(trained, rest, inputs)

    def encode_image(model: PixelLM, image: Array) -> Any:
        return model.encode_image(image, batch.image_hw)

    def encode_pixels(model: PixelLM, pixels: Array) -> Any:
        valid = jnp.ones((images, config.vision.grid, config.vision.grid), bool)
        return model.vision_encoder(pixels, valid)

    image = jax.jit(lambda values, image: encode_image(blueprint.assemble(values), image))(
        values, batch.image
    )
    pixels = jnp.ones(batch.image.shape, config.dtype)
    yield Part(
        "vision encoder",
        compile_part(encode_pixels, ("vision_encoder",), pixels),
        work.vision_encoder,
    )

    def project(model: PixelLM, taps: tuple[Array, ...]) -> Any:
        grid = config.vision.grid
        patches = taps[0][:, : config.image_tokens]
        maps = model.mask_projector(jnp.stack(taps, axis=1))
        maps = maps.reshape(images, len(taps), grid, grid, -1)
        return model.image_projector(patches), model.pixel_decoder.features(maps)

    shape = (images, config.vision.grid**2, config.vision.width)
    taps = tuple(jnp.ones(shape, config.dtype) for _ in config.vision.tap_layers)
    yield Part("image features", compile_part(project, IMAGE_FEATURES, taps), work.image_features)

    x = jnp.ones((images, length, config.language.width), config.dtype)
    visible = visibility(batch.segment, jnp.ones((images, length), bool))

    def run_layers(model: PixelLM, x: Array) -> Array:
        return model.language_model(x, batch.position, visible)

    layers = ("language_model.layers", "language_model.norm")
    yield Part("language model", compile_part(run_layers, layers, x), work.language_model)

    def text_loss(model: PixelLM, hidden: Array) -> Array:
        return text_sum(model.language_model.logits(hidden), batch)

    yield Part("head, text loss", compile_part(text_loss, ("language_model.head",), x), work.head)

    def decode_masks(model: PixelLM, hidden: Array, maps: tuple[Array, ...]) -> Array:
        return model.decode_masks(gather_states(hidden, batch.codebook_index), maps)

    yield Part(
        "pixel decoder",
        compile_part(decode_masks, ("codebook", "pixel_decoder"), x, image.maps),
        work.pixel_decoder,
    )

    side = config.mask_grid
    logits = jnp.zeros((images, targets, side, side))
    mask_gradient = jax.jit(
        jax.grad(lambda x: sum(mask_sums(x, batch, blueprint.train.loss.alpha)))
    )
    yield Part("mask losses", lambda: mask_gradient(logits))

    def total_loss(trainable: dict[str, Array], frozen: dict[str, Array], batch: Batch) -> Array:
        model = blueprint.assemble(trainable | frozen)
        return losses(model(batch), batch, blueprint.train.loss).total

    gradient = jax.jit(jax.value_and_grad(total_loss))
    yield Part(
        "forward and backward", lambda: gradient(state.trainable, state.frozen, batch), sum(work)
    )

    optimizer = blueprint.optimizer
    gradients = jax.tree.map(jnp.ones_like, state.trainable)

    def update(gradients: Any, moments: Any, trainable: Any) -> Any:
        updates, moments = optimizer.update(gradients, moments, trainable)
        return moments, optax.apply_updates(trainable, updates)

    current = [state.optimizer, state.trainable]
    jitted_update = jax.jit(update, donate_argnums=(1, 2))

    def call_update() -> Any:
        current[:] = jitted_update(gradients, *current)
        return current

    yield Part("update", call_update)


def _dotted(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)
