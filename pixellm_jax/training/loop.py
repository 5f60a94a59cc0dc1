"""The training loop: steps, log, validation, checkpoints, and a tidy end whatever ends it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pixellm_jax.batch import Batch
from pixellm_jax.errors import InputError
from pixellm_jax.model import flops
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import batch_sharding, batch_share, batch_ways
from pixellm_jax.stopwatch import Stopwatch
from pixellm_jax.training.checkpoints import RunCheckpoints
from pixellm_jax.training.log import RunLog
from pixellm_jax.training.memory import peak_memory_bytes
from pixellm_jax.training.recipe_record import keep_recipe, refuse_other_recipe
from pixellm_jax.training.state import (
    Blueprint,
    TrainState,
    frozen_values,
    initial_state,
    provenance,
)
from pixellm_jax.training.step import StepMetrics, make_step
from pixellm_jax.training.validation import Evaluation

GIOU = "giou"


@runtime_checkable
class Batches(Protocol):
    """A stream of a share of every batch (`batch_share`), which says and takes back where it is."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...


class Outcome(NamedTuple):
    """How a run ended: its state, and whether all steps were done (else it was told to stop)."""

    state: TrainState
    finished: bool


class _Progress:
    """What is not in the state: the best score, and whether somebody asked to stop."""

    best: float | None = None
    stop: int | None = None


def fit(
    blueprint: Blueprint,
    batches: Batches,
    *,
    run: Path,
    mesh: Mesh,
    init: Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    evaluate: Callable[[PixelLM], Evaluation] | None = None,
    project: str | None = None,
) -> Outcome:
    """Trains until `blueprint.train.steps`, from the last checkpoint in `run` if there is one.

    init: checkpoint folder of the first weights; without it they are drawn. recipe: kept beside the
    run as JSON. evaluate: called with the model every `evaluate_every` steps and at the end.
    project: of Weights & Biases.

    SIGTERM, and Ctrl-C, end the run after the step in hand with a checkpoint (of several processes,
    Ctrl-C ends one at once). A run that was killed goes on from its last checkpoint, and ends bit
    for bit where it would have ended.

    Raises:
        InputError: the run cannot be resumed with this recipe, a disk is full, or too many steps in
            a row had no finite gradients.
        KeyboardInterrupt: after the checkpoint of a run that was interrupted by Ctrl-C.
    """
    train, progress, main = blueprint.train, _Progress(), jax.process_index() == 0
    source = provenance(init) if init is not None else None
    checkpoints = RunCheckpoints(run, train, whole=init is None)
    known: dict[str, Any] = {"source": source, "recipe": dict(recipe or {})}
    state = _begin(blueprint, mesh, init, known, checkpoints, batches, progress)
    if main:
        keep_recipe(run, known["recipe"])
    start = int(state.step)
    log = None
    try:
        if main:
            log = RunLog(run, steps=train.steps, start=start, recipe=recipe, project=project)
            if start:
                log.say(f"going on from step {start} of {run}")
        with _stopping(progress):
            state = _loop(
                blueprint, mesh, state, batches, checkpoints, log, evaluate, known, progress
            )
            checkpoints.wait()
    finally:
        checkpoints.close()
        if log is not None:
            log.close()
    if progress.stop == signal.SIGINT:
        raise KeyboardInterrupt
    return Outcome(state, finished=int(state.step) >= train.steps)


def _begin(
    blueprint: Blueprint,
    mesh: Mesh,
    init: Path | None,
    known: Mapping[str, Any],
    checkpoints: RunCheckpoints,
    batches: Batches,
    progress: _Progress,
) -> TrainState:
    latest, source = checkpoints.latest(), known["source"]
    if latest is None:
        return initial_state(blueprint, mesh, init)
    notes = checkpoints.notes(latest)
    if (notes["source"] or {}).get("fingerprint") != (source or {}).get("fingerprint"):
        raise InputError(
            f"{checkpoints.folder}: the run began from {notes['source'] or 'drawn weights'}, "
            f"now --init is {source or 'not given'}: give the same, or another --out"
        )
    refuse_other_recipe(checkpoints.folder.parent, notes.get("recipe") or {}, known["recipe"])
    found = checkpoints.restore(latest, blueprint, mesh)
    batches.set_state(found.data)
    progress.best = notes["best"]
    if init is None:
        return TrainState(**found.state)
    return TrainState(**found.state, frozen=frozen_values(blueprint, mesh, init))


def _loop(
    blueprint: Blueprint,
    mesh: Mesh,
    state: TrainState,
    batches: Batches,
    checkpoints: RunCheckpoints,
    log: RunLog | None,
    evaluate: Callable[[PixelLM], Evaluation] | None,
    known: Mapping[str, Any],
    progress: _Progress,
) -> TrainState:
    train, update = blueprint.train, make_step(blueprint, mesh)
    peak = flops.matmul_peak(blueprint.config.dtype) * mesh.size
    put, recent = _Put(mesh, train.accumulation), list[StepMetrics]()
    watch = Stopwatch("data", rest="step")
    for step in range(int(state.step) + 1, train.steps + 1):
        with watch("data"):
            batch = next(batches)
        if recent:
            jax.block_until_ready(recent[-1])  # one step at most is in flight
            _refuse_to_diverge(recent[-1], train.max_skipped)
        batch = put(batch)
        state, metrics = update(state, batch)
        recent.append(metrics)
        if log is not None:
            log.step()
        score, end = None, step == train.steps
        if step % train.log_every == 0 or end:
            _report(log, step, recent, watch, blueprint, batch, peak)
            _refuse_to_diverge(recent[-1], train.max_skipped)
            recent = []
        if evaluate is not None and train.evaluate_every:
            if step % train.evaluate_every == 0 or end:
                with watch.paused():
                    score = _validate(blueprint, state, evaluate, log, step)
        better = score is not None and (progress.best is None or score > progress.best)
        if better:
            progress.best = score
        stopped = _asked_to_stop(progress, step)
        if step % train.save_every == 0 or end or better or stopped:
            notes = {"best": progress.best, **known}
            checkpoints.save(step, state, data=batches.get_state(), notes=notes, score=score)
        if stopped:
            if log is not None:
                log.say(f"asked to stop: saved at step {step}; the same command goes on from there")
            break
    return state


class _Put:
    """Brings this process's rows of a batch to their devices."""

    def __init__(self, mesh: Mesh, parts: int) -> None:
        self.sharding, (_, self.shares) = batch_sharding(mesh), batch_share(mesh)
        self.ways = batch_ways(mesh) * parts

    def __call__(self, batch: Batch) -> Batch:
        rows = len(batch.tokens) * self.shares
        if rows % self.ways:
            raise InputError(
                f"data.batch={rows} is no multiple of {self.ways} (mesh data x fsdp x "
                "train.accumulation); change one of them"
            )
        return jax.tree.map(
            lambda array: jax.make_array_from_process_local_data(
                self.sharding, array, (rows, *array.shape[1:])
            ),
            batch,
        )


def _report(
    log: RunLog | None,
    step: int,
    recent: list[StepMetrics],
    watch: Stopwatch,
    blueprint: Blueprint,
    batch: Batch,
    peak: float,
) -> None:
    """Means over the sound steps since the last report, and speed. `peak`: FLOP/s of the mesh."""
    found: StepMetrics = jax.device_get(recent[-1])
    made = jax.device_get(recent)
    sound = [metrics for metrics in made if metrics.finite] or made
    means = jax.tree.map(lambda *values: float(np.mean(values)), *sound)
    spent = watch.restart()
    seconds = sum(spent.values())
    if log is None:
        return
    images = len(batch.tokens)
    examples = images * len(recent)
    work = flops.train_flops(
        blueprint.config,
        blueprint.trainable,
        images=images,
        length=batch.tokens.shape[1],
        targets=batch.target_valid.shape[1],
    )
    speed = work * len(recent) / seconds
    values = {f"loss/{name}": value for name, value in means.losses._asdict().items()}
    values |= {
        "gradient_norm": means.gradient_norm,
        "learning_rate": float(found.learning_rate),
        "skipped": float(found.skipped),
        "examples_per_second": examples / seconds,
        "tokens_per_second": means.tokens * len(recent) / seconds,
        "targets_per_second": means.targets * len(recent) / seconds,
        "seconds_per_step": seconds / len(recent),
        "waiting_for_data": spent["data"] / seconds,
        "teraflops_per_second": speed / 1e12,
        "mfu": speed / peak,
        "memory_gib": peak_memory_bytes() / 2**30,
    }
    terms = means.losses
    note = (
        f"loss {terms.total:.3f} (text {terms.text:.3f} bce {terms.mask_bce:.3f} dice "
        f"{terms.mask_dice:.3f}) {values['examples_per_second']:.1f} ex/s "
        f"{values['tokens_per_second']:.0f} tok/s MFU {values['mfu']:.0%} "
        f"{values['memory_gib']:.1f} GiB"
    )
    log.log(step, values, note=note)


def _refuse_to_diverge(metrics: StepMetrics, most: int) -> None:
    row = int(metrics.skipped_in_row)
    if row >= most:
        raise InputError(
            f"{row} steps in a row had no finite gradients (train.max_skipped={most}); the weights "
            "are as they were before them: lower train.optimizer.learning_rate, or look at the data"
        )


def _validate(
    blueprint: Blueprint,
    state: TrainState,
    evaluate: Callable[[PixelLM], Evaluation],
    log: RunLog | None,
    step: int,
) -> float | None:
    found = evaluate(blueprint.model(state))
    if log is not None:
        log.log(step, {f"validation/{name}": value for name, value in found.scores.items()})
        log.show(step, found.pictures)
        told = "  ".join(f"{name} {value:.4f}" for name, value in found.scores.items())
        log.say(f"step {step}: validation  {told}")
    return found.scores.get(GIOU)


@contextmanager
def _stopping(progress: _Progress) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask to stop. Of several processes JAX watches SIGTERM itself."""
    signals = [] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]

    def ask(number: int, _: object) -> None:
        if progress.stop is not None:
            raise KeyboardInterrupt  # asked twice: now
        progress.stop = number

    try:
        before = {number: signal.signal(number, ask) for number in signals}
    except ValueError:  # not the main thread: whoever runs it there stops it
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked_to_stop(progress: _Progress, step: int) -> bool:
    """The same answer on every host."""
    if jax.process_count() == 1:
        return progress.stop is not None
    return bool(multihost_utils.reached_preemption_sync_point(step))
