"""Benchmark of a training step: seconds, FLOPs and memory, with random weights and data.

A step is forward, backward and update. Its FLOPs count the matrix products (`model.flops`); MFU
divides by the measured speed of a matrix product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pixellm_jax.batch import Batch, make_row, stack_rows
from pixellm_jax.config import SIZES, MeshConfig, ModelConfig
from pixellm_jax.model import flops
from pixellm_jax.perf.baseline import make_train_step
from pixellm_jax.sharding import batch_sharding, make_mesh
from pixellm_jax.text.prompt import IMAGE_TOKEN, EncodedConversation, pack
from pixellm_jax.training.config import LossConfig, TrainConfig
from pixellm_jax.training.memory import peak_memory_bytes
from pixellm_jax.training.state import Blueprint, initial_state
from pixellm_jax.training.step import make_step

PROMPT_TOKENS = 40
"""Ids before and around the image."""

QUESTION_TOKENS = 30
"""Ids of a question."""

ANSWER_TOKENS = 4
"""Ids of an answer in addition to its codebook tokens."""

RECIPES = {
    "all": TrainConfig(
        lora=None,
        trainable=(
            "language_model",
            "image_projector",
            "mask_projector",
            "codebook",
            "pixel_decoder",
        ),
        frozen=("vision_encoder",),
        loss=LossConfig(alpha=1.0),
    ),
    "paper": TrainConfig(),
}
"""Choices of trained parameters: all but the vision encoder, or the paper's with LoRA."""


class Timing(NamedTuple):
    """Wall-clock seconds of repeated calls, after one warm-up call that is not counted."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        """Smallest and largest value, such as "0.412-0.498"."""
        return f"{min(self.seconds):.3f}-{max(self.seconds):.3f}"


class StepMeasurement(NamedTuple):
    """Measured cost of a training step.

    Attributes:
        timing: seconds of a step.
        images: images per step.
        length: sequence positions per image.
        flops: FLOPs of the matrix products of a step.
        matmul_peak: measured FLOP/s of a matrix product on all devices.
        compile_seconds: seconds to trace and compile the step.
        planned_bytes: memory that the compiler plans per device.
        peak_bytes: peak memory in use so far (`peak_memory_bytes`).
        baseline: seconds of the PyTorch baseline's step, if it was measured.
    """

    timing: Timing
    images: int
    length: int
    flops: float
    matmul_peak: float
    compile_seconds: float
    planned_bytes: int
    peak_bytes: int
    baseline: Timing | None

    @property
    def examples_per_second(self) -> float:
        return self.images / self.timing.median

    @property
    def tokens_per_second(self) -> float:
        return self.images * self.length / self.timing.median

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.timing.median

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 to 1."""
        return self.flops_per_second / self.matmul_peak


def default_recipe(size: str) -> str:
    """Return the key of `RECIPES` for a size: "paper" for released sizes, else "all"."""
    return "paper" if size in SIZES else "all"


def measure_step(
    blueprint: Blueprint, batch: Batch, *, repeat: int, baseline: Any = None
) -> StepMeasurement:
    """Compile the training step for all devices and time it.

    Args:
        blueprint: model and trained parameters; the weights are random.
        batch: batch of `random_batch`; its images must divide among the devices.
        repeat: number of timed steps.
        baseline: model of `perf.baseline.make_baseline`, timed in turns with the step.
    """
    config = blueprint.config
    mesh = make_mesh(MeshConfig())
    batch = jax.device_put(batch, batch_sharding(mesh))
    images, length = batch.tokens.shape
    targets = batch.target_valid.shape[1]
    begin = time.perf_counter()
    jitted: Any = make_step(blueprint, mesh)
    step = jitted.lower(blueprint.state(mesh), batch).compile()
    compile_seconds = time.perf_counter() - begin
    state = initial_state(blueprint, mesh, None)

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    calls: list[Callable[[], Any]] = [call]
    if baseline is not None:
        answer = ANSWER_TOKENS + config.codebook.scales * config.codebook.tokens_per_scale
        calls.append(
            make_train_step(
                baseline,
                rows=images * targets,
                length=PROMPT_TOKENS + config.image_tokens + QUESTION_TOKENS + answer,
                supervised=answer,
            )
        )
    timing, *others = time_in_turns(calls, repeat)
    plan = step.memory_analysis()
    return StepMeasurement(
        timing=timing,
        images=images,
        length=length,
        flops=flops.train_flops(
            config, blueprint.trainable, images=images, length=length, targets=targets
        ),
        matmul_peak=flops.matmul_peak(config.dtype) * mesh.size,
        compile_seconds=compile_seconds,
        planned_bytes=plan.argument_size_in_bytes
        + plan.temp_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes,
        peak_bytes=peak_memory_bytes(),
        baseline=others[0] if others else None,
    )


def random_batch(config: ModelConfig, *, images: int, questions: int) -> Batch:
    """Return a batch of random images, conversations and masks, the same in every call.

    Every question has an answer of one target. The lower quarter of each canvas is padding.
    """
    rng = np.random.default_rng(0)
    codebook = config.codebook
    group_size = codebook.scales * codebook.tokens_per_scale
    # The vocabulary ends with the codebook and two more special tokens, as the released one does.
    text_ids = config.language.vocabulary - group_size - 2
    prompt = rng.integers(3, text_ids, PROMPT_TOKENS)
    conversations = []
    for _ in range(questions):
        text = rng.integers(3, text_ids, QUESTION_TOKENS + ANSWER_TOKENS)
        group = text_ids + np.arange(group_size)
        ids = np.concatenate([prompt[:-1], [IMAGE_TOKEN], prompt[-1:], text, group])
        supervised = np.arange(len(ids)) > PROMPT_TOKENS + QUESTION_TOKENS
        positions = np.arange(len(ids) - group_size, len(ids), dtype=np.int32)
        groups = positions.reshape(1, codebook.scales, codebook.tokens_per_scale)
        conversations.append(EncodedConversation(ids.astype(np.int32), supervised, groups))
    packed = pack(conversations, image_tokens=config.image_tokens)
    canvas = config.vision.canvas
    image_arrays = rng.integers(0, 256, (images, canvas, canvas, 3), np.uint8)
    mask_arrays = rng.integers(0, 2, (images, questions, canvas, canvas), np.uint8)
    return stack_rows(
        [
            make_row(packed, image=image, image_hw=(canvas * 3 // 4, canvas), masks=masks)
            for image, masks in zip(image_arrays, mask_arrays, strict=True)
        ]
    )


def time_in_turns(calls: Sequence[Callable[[], Any]], repeat: int) -> list[Timing]:
    """Time several functions, one after the other in each of `repeat` rounds.

    Every function runs once before, uncounted, and returns the arrays to wait for.
    """
    for call in calls:
        jax.block_until_ready(call())
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat):
        for call, measured in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            measured.append(time.perf_counter() - begin)
    return [Timing(tuple(measured)) for measured in seconds]
