"""Benchmark of generation: prefill, decoding steps and masks of answers of a known length.

Random weights neither end an answer nor name a target. `make_reciting` therefore sets embeddings
and head so that every id of a sentence is followed by the next one, and the last by the first. The
layers stay as they are and no shape changes, so a forward pass costs what it costs otherwise.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pixellm_jax.config import DTYPES, ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.inference.engine import Engine, EngineConfig
from pixellm_jax.inference.prepare import WEIGHTS, prepare_for_inference
from pixellm_jax.inference.request import Request
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.perf.baseline import BaselineRun, generate
from pixellm_jax.perf.train_step import PROMPT_TOKENS, QUESTION_TOKENS
from pixellm_jax.text.prompt import IMAGE_TOKEN
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.memory import peak_memory_bytes
from pixellm_jax.weights import checkpoint

PRECISIONS = (*DTYPES, *WEIGHTS)
"""Compute dtypes, and the formats of quantized weights."""

STEPS_PER_SYNC = 8
"""Decoding steps between two synchronisations of the host, at which the time is taken."""

MIN_SENTENCES = 3
"""Shortest answer in sentences: some steps must lie between its first and its last sync."""

RECOMPUTED_TOKENS = 4
"""Ids that the baseline generates without a cache."""

SENTENCE_WORDS = 10
"""Text ids of a sentence before its target."""

EMBEDDING_SCALE = 2.0**20
"""Magnitude of the embeddings, large enough to drown what the layers add."""

START_STRIDE = 7
"""Offset in words between the first words of the answers of two consecutive rows."""


class DecodingRun(NamedTuple):
    """Measured times of one run, in seconds.

    Attributes:
        prefill: all images and prompts.
        step: one decoding step of all rows.
        masks: all masks.
        total: the run as a whole.
        steps: number of decoding steps.
        compiled: number of programs that were compiled.
    """

    prefill: float
    step: float
    masks: float
    total: float
    steps: int
    compiled: int


class DecodingMeasurement(NamedTuple):
    """Measured cost of generation by the engine.

    Attributes:
        mode: "one by one" or "at once", the way that codebook tokens are read.
        runs: timed runs.
        rows: batch size.
        tokens: ids of an answer.
        masks: masks of all answers.
        bytes_per_step: least memory traffic of a decoding step (`step_bytes`).
        compiled: programs compiled by the warm-up run.
        peak_bytes: peak memory in use so far (`peak_memory_bytes`).
    """

    mode: str
    runs: tuple[DecodingRun, ...]
    rows: int
    tokens: int
    masks: int
    bytes_per_step: float
    compiled: int
    peak_bytes: int

    @property
    def prefill(self) -> float:
        return median(run.prefill for run in self.runs)

    @property
    def step(self) -> float:
        return median(run.step for run in self.runs)

    @property
    def total(self) -> float:
        return median(run.total for run in self.runs)

    @property
    def steps(self) -> int:
        return self.runs[0].steps

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second while decoding, without prefill and masks."""
        return self.rows * (self.tokens - 1) / (self.steps * self.step)

    @property
    def masks_per_second(self) -> float:
        return self.masks / median(run.masks for run in self.runs)

    @property
    def bytes_per_second(self) -> float:
        """Memory traffic of the decoding steps."""
        return self.bytes_per_step / self.step


class BaselineMeasurement(NamedTuple):
    """Measured cost of generation by the PyTorch baseline.

    Attributes:
        mode: "cached" or "recomputed".
        runs: timed runs.
        rows: batch size.
    """

    mode: str
    runs: tuple[BaselineRun, ...]
    rows: int

    @property
    def prefill(self) -> float:
        return median(run.prefill for run in self.runs)

    @property
    def step(self) -> float:
        return median(run.step for run in self.runs)

    @property
    def tokens_per_second(self) -> float:
        return self.rows / self.step


def load_reciting(
    precision: str, config: ModelConfig, *, folder: Path | None = None, tokenizer: Path
) -> tuple[PixelLM, Vocabulary]:
    """Return a reciting model, prepared for inference, and its vocabulary.

    Args:
        precision: entry of `PRECISIONS`.
        config: configuration that computes in this precision.
        folder: checkpoint whose layers are taken; without it the weights are random.
        tokenizer: tokenizer folder for random weights.
    """
    if folder is None:
        vocabulary = Vocabulary.with_codebook(tokenizer, **dataclasses.asdict(config.codebook))
        model = random_model(config)
    else:
        vocabulary = checkpoint.read_vocabulary(folder, config)
        model = checkpoint.load_model(folder, dtype=config.dtype)
    weights = precision if precision in WEIGHTS else None
    return prepare_for_inference(
        make_reciting(model, make_sentence(vocabulary)), weights=weights
    ), vocabulary


def measure_decoding(
    model: PixelLM,
    vocabulary: Vocabulary,
    *,
    rows: int,
    sentences: int,
    repeat: int,
    baseline: Any = None,
    recompute: bool = False,
) -> tuple[list[DecodingMeasurement], list[BaselineMeasurement]]:
    """Time the generation of answers, by the engine and by a baseline, in turns.

    Every way of generating runs once before, uncounted. The engine runs with codebook tokens read
    one by one, and with jump-forward decoding (at once).

    Args:
        model: model of `load_reciting`.
        vocabulary: vocabulary of `load_reciting`.
        rows: batch size.
        sentences: sentences of an answer, each with one mask; at least `MIN_SENTENCES`.
        repeat: number of timed runs.
        baseline: model of `perf.baseline.make_baseline`.
        recompute: time the baseline without a cache, too.

    Raises:
        InputError: the answers are longer than the model's positions.
    """
    sentence = make_sentence(vocabulary)
    tokens = sentences * len(sentence)
    requests = make_requests(model.config, sentence, count=rows, sentences=sentences)
    length = requests[0].prompt_length
    positions = model.config.language.max_positions
    if length + tokens > positions:
        raise InputError(
            f"--masks {sentences}: an answer of {tokens} ids after {length} is longer than the "
            f"{positions} positions of the model; request fewer"
        )
    engines: dict[str, Callable[[], DecodingRun]] = {}
    for mode, at_once in (("one by one", 0), ("at once", sys.maxsize)):
        config = EngineConfig(
            max_batch=rows,
            steps_per_sync=STEPS_PER_SYNC,
            max_new_tokens=tokens,
            max_tokens_per_step=at_once,
        )
        engines[mode] = partial(_run_new_engine, model, vocabulary, config, requests)
    baselines: dict[str, Callable[[], BaselineRun]] = {}
    if baseline is not None:
        run_baseline = partial(generate, baseline, rows=rows, length=length)
        baselines["cached"] = partial(run_baseline, tokens=tokens, cache=True)
        if recompute:
            baselines["recomputed"] = partial(run_baseline, tokens=RECOMPUTED_TOKENS, cache=False)
    compiled = {mode: run().compiled for mode, run in engines.items()}
    for run in baselines.values():
        run()
    engine_runs: dict[str, list[DecodingRun]] = {mode: [] for mode in engines}
    baseline_runs: dict[str, list[BaselineRun]] = {mode: [] for mode in baselines}
    for _ in range(repeat):
        for mode in engines:
            engine_runs[mode].append(engines[mode]())
        for mode in baselines:
            baseline_runs[mode].append(baselines[mode]())
    measured = [
        DecodingMeasurement(
            mode=mode,
            runs=tuple(runs),
            rows=rows,
            tokens=tokens,
            masks=rows * sentences,
            bytes_per_step=step_bytes(model, rows, length + tokens // 2),
            compiled=compiled[mode],
            peak_bytes=peak_memory_bytes(),
        )
        for mode, runs in engine_runs.items()
    ]
    return measured, [
        BaselineMeasurement(mode, tuple(runs), rows) for mode, runs in baseline_runs.items()
    ]


def run_engine(engine: Engine, requests: Sequence[Request]) -> DecodingRun:
    """Answer all requests in one batch, taking the time at every sync of the host.

    The first sync includes the prefill and the last one the masks; those in between contain nothing
    but decoding steps. Their price per step is deducted from the first and the last.
    """
    for request in requests:
        engine.add_request(request)
    seconds = list[float]()
    steps = list[int]()
    while not engine.idle:
        before = engine.num_steps
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
        steps.append(engine.num_steps - before)
    steps[0] -= 1  # the prefill counts as one
    step = sum(seconds[1:-1]) / sum(steps[1:-1])
    return DecodingRun(
        prefill=seconds[0] - steps[0] * step,
        step=step,
        masks=seconds[-1] - steps[-1] * step,
        total=sum(seconds),
        steps=sum(steps),
        compiled=engine.counter.compiled.total(),
    )


def step_bytes(model: PixelLM, rows: int, positions: int) -> float:
    """Return the least memory traffic of a decoding step with one new id per row, in bytes.

    Counts the language model's weights as they are stored (of the embeddings one row per id) and
    the cached keys and values of `positions` positions per row. Writes, and whatever does not stay
    in the caches of a CPU, are not counted.
    """
    config = model.config.language
    weights = 0.0
    for path, variable in nnx.to_flat_state(nnx.state(model.language_model)):
        if path != ("embedding",):
            weights += variable.size * _bits(variable.dtype) / 8
    cached = 2 * config.layers * config.kv_heads * config.head
    return weights + rows * (config.width + positions * cached) * _bits(model.config.dtype) / 8


def random_model(config: ModelConfig) -> PixelLM:
    """Return a model with the same random weights in every call.

    The language model's matrices are stored in the compute dtype.
    """

    def initialise(key: jax.Array) -> PixelLM:
        model = PixelLM(key, config)
        for path, variable in nnx.to_flat_state(nnx.state(model.language_model)):
            if "norm" not in ".".join(map(str, path)):
                variable.set_value(variable[...].astype(config.dtype))
        return model

    return jax.jit(initialise)(jax.random.key(0))


def make_sentence(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return `SENTENCE_WORDS` ids of plain text and the codebook tokens of one target."""
    text = (index for index in range(vocabulary.size) if index not in vocabulary.marks)
    return (*(next(text) for _ in range(SENTENCE_WORDS)), *vocabulary.group)


def make_reciting(model: PixelLM, sentence: Sequence[int]) -> PixelLM:
    """Return a copy that generates after each id of `sentence` the next, after the last the first.

    Embeddings are random signs, and the head of each id has the signs of the id before it.
    """
    reciting = jax.tree.map(lambda leaf: leaf, model)
    language = reciting.language_model
    shape = language.head.shape
    dtype = model.config.dtype
    embedding_key, head_key = jax.random.split(jax.random.key(1))
    signs = jax.random.rademacher(embedding_key, shape, jnp.float32)
    ids = np.asarray(sentence)
    head = jax.random.rademacher(head_key, shape, jnp.float32)
    head = head.at[np.roll(ids, -1)].set(signs[ids])
    language.embedding.set_value((EMBEDDING_SCALE * signs).astype(dtype))
    language.head.set_value((head * shape[1] ** -0.5).astype(dtype))
    return reciting


def make_requests(
    config: ModelConfig, sentence: Sequence[int], *, count: int, sentences: int
) -> list[Request]:
    """Return requests about images of noise, each answered by `sentences` sentences.

    The answers begin at different words, so that the rows do not reach their targets in the same
    step, as in a batch whose requests arrived at different times.
    """
    rng = np.random.default_rng(0)
    canvas = config.vision.canvas
    image_tokens = np.full(config.image_tokens, IMAGE_TOKEN)
    requests = []
    for row in range(count):
        prompt = rng.integers(3, max(sentence), PROMPT_TOKENS)
        question = rng.integers(3, max(sentence), QUESTION_TOKENS)
        question[-1] = sentence[START_STRIDE * row % SENTENCE_WORDS]
        tokens = np.concatenate([prompt[:-1], image_tokens, prompt[-1:], question])
        requests.append(
            Request(
                tokens.astype(np.int32),
                rng.integers(0, 256, (canvas, canvas, 3), np.uint8),
                (canvas, canvas),
                max_new_tokens=sentences * len(sentence),
            )
        )
    return requests


def _run_new_engine(
    model: PixelLM, vocabulary: Vocabulary, config: EngineConfig, requests: Sequence[Request]
) -> DecodingRun:
    """Run with empty image caches; compiled programs are kept."""
    return run_engine(Engine(model, vocabulary, config), requests)


def _bits(dtype: Any) -> int:
    return jax.dtypes.itemsize_bits(dtype)
