"""Ablation runs: train every setting of a grid with every seed, resumably, in several processes."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from data_pipeline.config import DataConfig
from pixellm_jax.errors import InputError
from pixellm_jax.experiments.ablation_grid import Changes, Grid, apply_changes, with_steps
from pixellm_jax.experiments.ablation_report import (
    Result,
    append_result,
    read_results,
    write_report,
)
from pixellm_jax.experiments.recipe import Recipe
from pixellm_jax.experiments.shapes_training import open_loader, read_batches
from pixellm_jax.files import read_optional_json, write_whole
from pixellm_jax.model.flops import train_flops
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import make_mesh
from pixellm_jax.training.log import METRICS
from pixellm_jax.training.loop import fit
from pixellm_jax.training.state import Blueprint, make_blueprint
from pixellm_jax.training.validation import Validation, validate

GRID = "grid.json"
"""File with the base recipe that all runs of a folder share."""

TRIAL_STEPS = 40
"""Steps of a trial run; the first ones are slower, because the loader reads ahead."""


def run_grid(
    base: Recipe,
    grid: Grid,
    seeds: Sequence[int],
    out: Path,
    *,
    log: Callable[[str], None] = print,
) -> None:
    """Train every setting with every seed that has no result in `out` yet, and write the report.

    Runs that another process is working on are left to that process.

    Args:
        base: recipe that the settings change.
        grid: settings to train.
        seeds: seeds of every setting.
        out: folder of the results, new or of the same base recipe.
        log: called with each line about progress.

    Raises:
        InputError: `out` holds runs of another recipe, or cannot be written.
        KeyboardInterrupt: interrupted; the current run has a checkpoint.
    """
    _keep_base(base, out)
    for seed, (name, changes) in itertools.product(seeds, grid.items()):
        folder = out / f"{name}-{seed}"
        with _claim(folder.with_name(f"{folder.name}.lock")) as claimed:
            if not claimed:
                log(f"{name}, seed {seed}: left to the process that is running it")
                continue
            if any((r.name, r.seed) == (name, seed) for r in read_results(out)):
                continue
            log(f"{name}, seed {seed}")
            result = train(base, name, changes, seed, folder)
            append_result(out, result)
            shutil.rmtree(folder)
            write_report(out)
        jax.clear_caches()
        log(
            f"  gIoU {result.giou:.3f}  cIoU {result.ciou:.3f}  text loss {result.text:.3f}  "
            f"{result.seconds:.0f} s"
        )
    write_report(out)


def train(base: Recipe, name: str, changes: Changes, seed: int, folder: Path) -> Result:
    """Train one setting in `folder`, from its last checkpoint if it has one.

    Validation losses are weighted as in `base`, whatever weights the setting trains with.

    Raises:
        KeyboardInterrupt: interrupted, after a checkpoint.
    """
    begin = time.perf_counter()
    recipe = apply_changes(base, changes, seed)
    assert recipe.validation is not None  # every base recipe has it
    validation = recipe.validation
    vocabulary = recipe.vocabulary(None)
    blueprint = make_blueprint(recipe.model, recipe.train)
    mesh = make_mesh(recipe.train.mesh, jax.local_devices()[:1])

    def evaluate(model: PixelLM) -> Validation:
        held_out = read_batches(
            validation, recipe.model, vocabulary, count=recipe.train.evaluate_batches
        )
        return Validation(validate(model, held_out, mesh, base.train.loss).scores)

    batches = open_loader(recipe.data, recipe.model, vocabulary)
    try:
        outcome = fit(
            blueprint,
            batches,
            run=folder,
            mesh=mesh,
            recipe=dataclasses.asdict(recipe),
            evaluate=evaluate,
        )
    finally:
        batches.close()
    if not outcome.finished:
        raise KeyboardInterrupt
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    (validated,) = (record for record in records if "validation/giou" in record)
    scores = {key.removeprefix("validation/"): value for key, value in validated.items()}
    steps = scores.pop("step")
    step_times = [r["seconds_per_step"] for r in records if "seconds_per_step" in r]
    return Result(
        name=name,
        seed=seed,
        changes=dict(changes),
        parameters=count_parameters(blueprint),
        steps=steps,
        seconds_per_step=statistics.median(step_times),
        seconds=time.perf_counter() - begin,
        left_out=batches.counts["conversations over budget"],
        **scores,
    )


def try_setting(base: Recipe, name: str, changes: Changes) -> Result:
    """Run `TRIAL_STEPS` steps of one setting in a temporary folder, to measure their time."""
    short = dataclasses.replace(base, train=with_steps(base.train, TRIAL_STEPS))
    with tempfile.TemporaryDirectory() as folder:
        result = train(short, name, changes, 0, Path(folder))
    jax.clear_caches()
    return result


def count_parameters(blueprint: Blueprint) -> int:
    """Return the number of parameters of the model."""
    return sum(math.prod(shape.shape) for shape in blueprint.shapes.values())


def count_flops(blueprint: Blueprint, data: DataConfig) -> float:
    """Return the floating-point operations of one training step."""
    return train_flops(
        blueprint.config,
        blueprint.trainable,
        images=data.batch,
        length=data.length,
        targets=data.targets,
    )


def estimate_seconds(
    settings: Iterable[str], flops: Mapping[str, float], steps: int, reference: Result
) -> float:
    """Estimate the time of several runs, one after the other, from the time of one of them.

    Args:
        settings: setting of each run.
        flops: setting -> operations of a step. A step takes time in proportion to them.
        steps: length of the runs.
        reference: a measured run; the rest of a run (compilation, validation) takes as long as its.
    """
    overhead = max(0.0, reference.seconds - reference.steps * reference.seconds_per_step)
    seconds_per_flop = reference.seconds_per_step / flops[reference.name]
    return sum(overhead + steps * seconds_per_flop * flops[name] for name in settings)


def check_base(base: Recipe, out: Path) -> None:
    """Check that the runs in `out`, if any, are of this base recipe.

    Raises:
        InputError: they are of another recipe; the message says what differs.
    """
    kept = _flatten(read_optional_json(out / GRID))
    new = _flatten(_plain(base))
    different = [key for key in new if kept.get(key, new[key]) != new[key]]
    if kept and (different or kept.keys() != new.keys()):
        examples = ", ".join(f"{key}={kept[key]}, now {new[key]}" for key in different[:3])
        raise InputError(
            f"{out}: its runs are of another recipe ({examples or 'other keys'}); ask for the same "
            "recipe, or choose another --out"
        )


def _keep_base(base: Recipe, out: Path) -> None:
    """Write the base recipe into `out`."""
    check_base(base, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / GRID, json.dumps(_plain(base), indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{out}: cannot write here ({error.strerror or error}); choose another --out"
        ) from None


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as it reads back from a JSON file."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _flatten(values: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = dict[str, Any]()
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{group}{key}.")
        else:
            flat[f"{group}{key}"] = value
    return flat


@contextmanager
def _claim(lock: Path) -> Iterator[bool]:
    """Try to lock a file; yield whether this process holds the lock.

    The operating system releases the lock when the process ends.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        lock.unlink(missing_ok=True)
