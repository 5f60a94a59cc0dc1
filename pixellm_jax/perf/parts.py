"""The parts of a training step, each as a program of its own that can be timed."""

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
    """A part of a step. `call` runs it; `flops`: matrix products, 0 where there are none."""

    name: str
    call: Callable[[], Any]
    flops: float = 0.0


def parts_of_a_step(blueprint: Blueprint, batch: Batch) -> Iterator[Part]:
    """Forward and backward of every part, of all of them together, and the update.

    A part is differentiated in what is trained of it and in what it is given, as in the step. The
    sum is not quite the whole: XLA fuses across parts, and programs of their own copy more.
    """
    config = blueprint.config
    state = initial_state(blueprint, make_mesh(MeshConfig()), None)
    batch = jax.tree.map(jnp.asarray, batch)
    values: dict[str, Array] = state.trainable | state.frozen
    (images, length), targets = batch.tokens.shape, batch.target_valid.shape[1]
    work = flops.train_flops_of_parts(
        config, blueprint.trainable, images=images, length=length, targets=targets
    )

    def program(
        run: Callable[..., Any], trained: tuple[str, ...], *given: Any
    ) -> Callable[[], Any]:
        """run(model, given), and where something of it is trained, its gradient."""
        own = {n: v for n, v in state.trainable.items() if f"{n}.".startswith(_dotted(trained))}
        rest = {name: value for name, value in values.items() if name not in own}

        def forward(own: Mapping[str, Array], rest: Mapping[str, Array], given: tuple) -> Any:
            return run(blueprint.assemble({**own, **rest}), *given)

        def both(own: Mapping[str, Array], rest: Mapping[str, Array], given: tuple) -> Any:
            out, back = jax.vjp(lambda own, given: forward(own, rest, given), own, given)
            return back(out)

        compiled = jax.jit(both if own else forward).lower(own, rest, given).compile()
        return lambda: compiled(own, rest, given)

    def see(model: PixelLM, image: Array) -> Any:
        return model.encode_image(image, batch.image_hw)

    def look(model: PixelLM, pixels: Array) -> Any:
        valid = jnp.ones((images, config.vision.grid, config.vision.grid), bool)
        return model.vision_encoder(pixels, valid)

    image = jax.jit(lambda values, given: see(blueprint.assemble(values), given))(
        values, batch.image
    )
    pixels = jnp.ones(batch.image.shape, config.dtype)
    yield Part("vision encoder", program(look, ("vision_encoder",), pixels), work.vision_encoder)

    def project(model: PixelLM, taps: tuple[Array, ...]) -> Any:
        grid = config.vision.grid
        seen = taps[0][:, : config.image_tokens]
        maps = model.mask_projector(jnp.stack(taps, axis=1))
        maps = maps.reshape(images, len(taps), grid, grid, -1)
        return model.image_projector(seen), model.pixel_decoder.features(maps)

    shape = (images, config.vision.grid**2, config.vision.width)
    taps = tuple(jnp.ones(shape, config.dtype) for _ in config.vision.tap_layers)
    yield Part("image features", program(project, IMAGE_FEATURES, taps), work.image_features)

    x = jnp.ones((images, length, config.language.width), config.dtype)
    visible = visibility(batch.segment, jnp.ones((images, length), bool))

    def read(model: PixelLM, x: Array) -> Array:
        return model.language_model(x, batch.position, visible)

    layers = ("language_model.layers", "language_model.norm")
    yield Part("language model", program(read, layers, x), work.language_model)

    def say(model: PixelLM, hidden: Array) -> Array:
        return text_sum(model.language_model.logits(hidden), batch)

    yield Part("head, text loss", program(say, ("language_model.head",), x), work.head)

    def draw(model: PixelLM, hidden: Array, maps: tuple[Array, ...]) -> Array:
        return model.decode_masks(gather_states(hidden, batch.codebook_index), maps)

    yield Part(
        "pixel decoder",
        program(draw, ("codebook", "pixel_decoder"), x, image.maps),
        work.pixel_decoder,
    )

    side = config.mask_grid
    logits = jnp.zeros((images, targets, side, side))
    judge = jax.jit(jax.grad(lambda x: sum(mask_sums(x, batch, blueprint.train.loss.alpha))))
    yield Part("mask losses", lambda: judge(logits))

    def whole(trainable: dict[str, Array], frozen: dict[str, Array], batch: Batch) -> Array:
        model = blueprint.assemble(trainable | frozen)
        return losses(model(batch), batch, blueprint.train.loss).total

    gradient = jax.jit(jax.value_and_grad(whole))
    yield Part(
        "forward and backward", lambda: gradient(state.trainable, state.frozen, batch), sum(work)
    )

    update = blueprint.optimizer
    slopes = jax.tree.map(jnp.ones_like, state.trainable)

    def apply(slopes: Any, moments: Any, trainable: Any) -> Any:
        updates, moments = update.update(slopes, moments, trainable)
        return moments, optax.apply_updates(trainable, updates)

    kept = [state.optimizer, state.trainable]
    applied = jax.jit(apply, donate_argnums=(1, 2))

    def call() -> Any:
        kept[:] = applied(slopes, *kept)
        return kept

    yield Part("update", call)


def _dotted(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)
