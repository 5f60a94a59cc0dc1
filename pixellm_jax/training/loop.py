"""Training loop: steps, log, validation and checkpoints, with a clean end for every way to stop."""

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
from pixellm_jax.training.checkpoints import (
    SCORE,
    RunCheckpoints,
    refuse_other_recipe,
    write_recipe,
)
from pixellm_jax.training.log import RunLog
from pixellm_jax.training.memory import peak_memory_bytes
from pixellm_jax.training.state import (
    Blueprint,
    TrainState,
    frozen_values,
    initial_state,
    provenance,
)
from pixellm_jax.training.step import StepMetrics, make_step
from pixellm_jax.training.validation import Validation

Validate = Callable[[PixelLM], Validation]


@runtime_checkable
class Batches(Protocol):
    """Stream of this process's share of every batch (`batch_share`), with a restorable position."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...


class Outcome(NamedTuple):
    """End of a run.

    Attributes:
        state: training state after the last step.
        finished: all steps were done; otherwise the run was interrupted.
    """

    state: TrainState
    finished: bool


def fit(
    blueprint: Blueprint,
    batches: Batches,
    *,
    run: Path,
    mesh: Mesh,
    init: Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    evaluate: Validate | None = None,
    project: str | None = None,
) -> Outcome:
    """Train until `blueprint.train.steps`, resuming from the last checkpoint in `run` if any.

    SIGTERM and Ctrl-C end the run with a checkpoint after the current step (with several processes,
    Ctrl-C ends its process at once). A run that was killed resumes from its last checkpoint and
    ends bit for bit where it would have ended.

    Args:
        blueprint: model, trained parameters and training configuration.
        batches: training data.
        run: folder of the run.
        mesh: mesh of devices.
        init: checkpoint folder of the initial weights; without it they are random.
        recipe: written to the run as JSON, and compared on resume.
        evaluate: validation, called with the model every `evaluate_every` steps and at the end.
        project: Weights & Biases project.

    Raises:
        InputError: the run cannot be resumed with this recipe, a disk is full, or too many
            consecutive steps had no finite gradients.
        KeyboardInterrupt: after the checkpoint of a run that was interrupted by Ctrl-C.
    """
    main = jax.process_index() == 0
    record: dict[str, Any] = {
        "source": provenance(init) if init is not None else None,
        "recipe": dict(recipe or {}),
    }
    checkpoints = RunCheckpoints(run, blueprint.train, save_frozen=init is None)
    state, best = _restore(blueprint, mesh, init, record, checkpoints, batches)
    if main:
        write_recipe(run, record["recipe"])
    log = None
    interruption = _Interruption()
    try:
        start = int(state.step)
        if main:
            log = RunLog(
                run, steps=blueprint.train.steps, start=start, recipe=recipe, project=project
            )
            if start:
                log.message(f"resuming from step {start} of {run}")
        loop = _Loop(blueprint, mesh, batches, checkpoints, log, evaluate)
        with interruption.handle_signals():
            state = loop.run(state, best, record, interruption)
            checkpoints.wait()
    finally:
        checkpoints.close()
        if log is not None:
            log.close()
    if interruption.signal == signal.SIGINT:
        raise KeyboardInterrupt
    return Outcome(state, finished=int(state.step) >= blueprint.train.steps)


def _restore(
    blueprint: Blueprint,
    mesh: Mesh,
    init: Path | None,
    record: Mapping[str, Any],
    checkpoints: RunCheckpoints,
    batches: Batches,
) -> tuple[TrainState, float | None]:
    """Return state and best score: initial ones, or from the last checkpoint of the same run."""
    latest = checkpoints.latest()
    if latest is None:
        return initial_state(blueprint, mesh, init), None
    notes = checkpoints.notes(latest)
    source = record["source"]
    if (notes["source"] or {}).get("fingerprint") != (source or {}).get("fingerprint"):
        raise InputError(
            f"{checkpoints.folder}: the run began from {notes['source'] or 'random weights'}, "
            f"now --init is {source or 'not given'}: use the same, or another --out"
        )
    refuse_other_recipe(checkpoints.folder.parent, notes.get("recipe") or {}, record["recipe"])
    restored = checkpoints.restore(latest, blueprint, mesh)
    batches.set_state(restored.data)
    if init is None:
        return TrainState(**restored.state), notes["best"]
    frozen = frozen_values(blueprint, mesh, init)
    return TrainState(**restored.state, frozen=frozen), notes["best"]


class _Loop:
    """The steps of a run and what happens between them."""

    def __init__(
        self,
        blueprint: Blueprint,
        mesh: Mesh,
        batches: Batches,
        checkpoints: RunCheckpoints,
        log: RunLog | None,
        evaluate: Validate | None,
    ) -> None:
        self.blueprint = blueprint
        self.train = blueprint.train
        self.mesh = mesh
        self.batches = batches
        self.checkpoints = checkpoints
        self.log = log
        self.evaluate = evaluate
        self.update = make_step(blueprint, mesh)
        self.matmul_peak = flops.matmul_peak(blueprint.config.dtype) * mesh.size
        self.recent: list[StepMetrics] = []  # metrics since the last report
        self.watch = Stopwatch("data", rest="step")

    def run(
        self,
        state: TrainState,
        best: float | None,
        record: Mapping[str, Any],
        interruption: _Interruption,
    ) -> TrainState:
        """Run all remaining steps, or until an interruption; return the last state."""
        train = self.train
        for step in range(int(state.step) + 1, train.steps + 1):
            with self.watch("data"):
                batch = next(self.batches)
            if self.recent:
                jax.block_until_ready(self.recent[-1])  # at most one step is in flight
                self._refuse_to_diverge()
            batch = self._to_devices(batch)
            state, metrics = self.update(state, batch)
            self.recent.append(metrics)
            if self.log is not None:
                self.log.step()
            end = step == train.steps
            if step % train.log_every == 0 or end:
                self._report(step, batch)
                self._refuse_to_diverge()
                self.recent = []
            score = None
            if self.evaluate is not None and train.evaluate_every:
                if step % train.evaluate_every == 0 or end:
                    with self.watch.paused():
                        score = self._validate(step, state, self.evaluate)
            improved = score is not None and (best is None or score > best)
            if improved:
                best = score
            stop = interruption.requested(step)
            if step % train.save_every == 0 or end or improved or stop:
                self.checkpoints.save(
                    step,
                    state,
                    data=self.batches.get_state(),
                    notes={"best": best, **record},
                    score=score,
                )
            if stop:
                if self.log is not None:
                    self.log.message(
                        f"interrupted: saved at step {step}; run the same command to resume"
                    )
                break
        return state

    def _to_devices(self, batch: Batch) -> Batch:
        """Place this process's rows of a batch on their devices."""
        _, processes = batch_share(self.mesh)
        ways = batch_ways(self.mesh) * self.train.accumulation
        rows = len(batch.tokens) * processes
        if rows % ways:
            raise InputError(
                f"data.batch={rows} is no multiple of {ways} (mesh data x fsdp x "
                "train.accumulation); change one of them"
            )
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda array: jax.make_array_from_process_local_data(
                sharding, array, (rows, *array.shape[1:])
            ),
            batch,
        )

    def _refuse_to_diverge(self) -> None:
        skipped = int(self.recent[-1].skipped_in_row)
        if skipped >= self.train.max_skipped:
            raise InputError(
                f"{skipped} steps in a row had no finite gradients "
                f"(train.max_skipped={self.train.max_skipped}); they left the weights unchanged: "
                "lower train.optimizer.learning_rate, or check the data"
            )

    def _report(self, step: int, batch: Batch) -> None:
        """Log means over the finite steps since the last report, and the speed."""
        last: StepMetrics = jax.device_get(self.recent[-1])
        metrics = jax.device_get(self.recent)
        finite = [one for one in metrics if one.finite] or metrics
        means = jax.tree.map(lambda *values: float(np.mean(values)), *finite)
        elapsed = self.watch.restart()
        if self.log is None:
            return
        seconds = sum(elapsed.values())
        steps = len(self.recent)
        images, length = batch.tokens.shape
        work = flops.train_flops(
            self.blueprint.config,
            self.blueprint.trainable,
            images=images,
            length=length,
            targets=batch.target_valid.shape[1],
        )
        speed = work * steps / seconds
        terms = means.losses
        values = {f"loss/{name}": value for name, value in terms._asdict().items()}
        values |= {
            "gradient_norm": means.gradient_norm,
            "learning_rate": float(last.learning_rate),
            "skipped": float(last.skipped),
            "examples_per_second": images * steps / seconds,
            "tokens_per_second": means.tokens * steps / seconds,
            "targets_per_second": means.targets * steps / seconds,
            "seconds_per_step": seconds / steps,
            "waiting_for_data": elapsed["data"] / seconds,
            "teraflops_per_second": speed / 1e12,
            "mfu": speed / self.matmul_peak,
            "memory_gib": peak_memory_bytes() / 2**30,
        }
        note = (
            f"loss {terms.total:.3f} (text {terms.text:.3f} bce {terms.mask_bce:.3f} dice "
            f"{terms.mask_dice:.3f}) {values['examples_per_second']:.1f} ex/s "
            f"{values['tokens_per_second']:.0f} tok/s MFU {values['mfu']:.0%} "
            f"{values['memory_gib']:.1f} GiB"
        )
        self.log.log(step, values, note=note)

    def _validate(self, step: int, state: TrainState, evaluate: Validate) -> float | None:
        """Validate the model and return the score that chooses the best checkpoint."""
        result = evaluate(self.blueprint.model(state))
        if self.log is not None:
            scores = {f"validation/{name}": value for name, value in result.scores.items()}
            self.log.log(step, scores)
            self.log.show(step, result.images)
            text = "  ".join(f"{name} {value:.4f}" for name, value in result.scores.items())
            self.log.message(f"step {step}: validation  {text}")
        return result.scores.get(SCORE)


class _Interruption:
    """Request to stop after the current step, by SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Take over SIGTERM and Ctrl-C; with several processes JAX handles SIGTERM itself."""
        numbers = [] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]

        def request(number: int, _: object) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt  # the second request stops at once
            self.signal = number

        try:
            previous = {number: signal.signal(number, request) for number in numbers}
        except ValueError:  # not the main thread, which alone receives signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Return whether to stop, the same answer in every process."""
        if jax.process_count() == 1:
            return self.signal is not None
        return bool(multihost_utils.reached_preemption_sync_point(step))
