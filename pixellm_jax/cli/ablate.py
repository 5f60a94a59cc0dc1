"""`scripts/ablate.py`: what each part of the method is worth, by training without it on shapes."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import itertools
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sources.shapes.dataset import DATASETS, Shapes
from pixellm_jax.config import ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.experiments import shapes_training
from pixellm_jax.experiments.ablation_grid import (
    LEVELS,
    base_recipe,
    change,
    choose,
    settings,
    with_steps,
)
from pixellm_jax.experiments.ablation_report import (
    PLOT,
    RESULTS,
    TABLE,
    Result,
    append_result,
    figure_class,
    format_changes,
    read_results,
    write_report,
)
from pixellm_jax.experiments.recipe import Recipe
from pixellm_jax.files import read_optional_json, write_whole
from pixellm_jax.model.flops import train_flops
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import make_mesh
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.config import LossConfig
from pixellm_jax.training.log import METRICS
from pixellm_jax.training.loop import fit
from pixellm_jax.training.state import Blueprint, make_blueprint
from pixellm_jax.training.validation import Evaluation, evaluate_given

GRID = "grid.json"
"""What all runs of a folder share."""

SCENES = shapes_training.TRAIN.evaluate_batches * shapes_training.HELD_OUT.batch
TRIAL_STEPS = 40
"""The first ones are slower: the loader reads ahead."""

EXAMPLES = """examples:
  python scripts/ablate.py --dry-run
  python scripts/ablate.py --out runs/ablations
  python scripts/ablate.py --only base plain-bce --level full --steps 2000 --out runs/overlaps

The folder gets ablations.jsonl (a line per run, written as it ends), ablations.md and
ablations.png. The same command goes on after any interruption, inside a run too. Started again
while it runs, it shares the runs with the first: each takes the next one that is free. Two runs at
a time, a core each:

  taskset -c 0 python scripts/ablate.py &
  taskset -c 1 python scripts/ablate.py &
"""


def run_grid(
    base: Recipe, grid: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], out: Path
) -> None:
    """Trains every setting with every seed that has no result in `out` yet, and reports.

    Runs that another process has in hand are left to it.

    Raises:
        InputError: `out` holds runs of another recipe, or cannot be written.
        KeyboardInterrupt: told to stop; the run in hand is saved.
    """
    _keep_grid(base, out)
    for seed, (name, changes) in itertools.product(seeds, grid.items()):
        place = out / f"{name}-{seed}"
        with _claim(place.with_name(f"{place.name}.lock")) as mine:
            if not mine:
                print(f"{name}, seed {seed}: left to the process that has it in hand", flush=True)
                continue
            if any((r.name, r.seed) == (name, seed) for r in read_results(out)):
                continue
            print(f"{name}, seed {seed}", flush=True)
            result = train(base, name, changes, seed, place)
            append_result(out, result)
            shutil.rmtree(place)
            write_report(out)
        jax.clear_caches()
        print(
            f"  gIoU {result.giou:.3f}  cIoU {result.ciou:.3f}  text loss {result.text:.3f}  "
            f"{result.seconds:.0f} s",
            flush=True,
        )
    write_report(out)


def train(base: Recipe, name: str, changes: Mapping[str, Any], seed: int, folder: Path) -> Result:
    """Trains one setting in `folder`, from its last checkpoint if it has one.

    Losses on held-out scenes are weighted as in `base`, whatever the setting trains with.

    Raises:
        KeyboardInterrupt: told to stop, after a checkpoint.
    """
    begin, recipe = time.perf_counter(), change(base, changes, seed)
    vocabulary, blueprint = recipe.vocabulary(None), make_blueprint(recipe.model, recipe.train)
    mesh = make_mesh(recipe.train.mesh, jax.local_devices()[:1])

    def evaluate(model: PixelLM) -> Evaluation:
        return Evaluation(_evaluate(model, recipe, vocabulary, mesh, base.train.loss))

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
    (scored,) = (record for record in records if "validation/giou" in record)
    found = {key.removeprefix("validation/"): value for key, value in scored.items()}
    steps = found.pop("step")
    each = [record["seconds_per_step"] for record in records if "seconds_per_step" in record]
    return Result(
        name=name,
        seed=seed,
        changes=dict(changes),
        parameters=count_parameters(blueprint),
        steps=steps,
        seconds_per_step=statistics.median(each),
        seconds=time.perf_counter() - begin,
        left_out=batches.counts["conversations over budget"],
        **found,
    )


def count_parameters(blueprint: Blueprint) -> int:
    """Numbers in the model."""
    return sum(math.prod(shape.shape) for shape in blueprint.shapes.values())


def count_operations(blueprint: Blueprint, data: DataConfig) -> float:
    """Of one training step."""
    return train_flops(
        blueprint.config,
        blueprint.trainable,
        images=data.batch,
        length=data.length,
        targets=data.targets,
    )


def estimate(
    runs: Iterable[str], operations: Mapping[str, float], steps: int, reference: Result
) -> float:
    """Seconds of runs of `steps` steps, given by their settings, one after the other.

    A step takes as long as one of `reference`, in proportion to its operations; the rest of a run
    (compilation, evaluation) takes as long as there.
    """
    rest = max(0.0, reference.seconds - reference.steps * reference.seconds_per_step)
    each = reference.seconds_per_step / operations[reference.name]
    return sum(rest + steps * each * operations[name] for name in runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs; returns the exit code (0, 2 for bad input, 130)."""
    parser = argparse.ArgumentParser(
        prog="ablate.py",
        description="Trains the small model of `pixellm demo --train` from nothing, with one part "
        "of the method changed at a time and the same number of steps each, and scores it on "
        f"{SCENES} held-out scenes whose answers are given.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("ablations"),
        metavar="DIR",
        help="folder of the results, new or to go on (ablations)",
    )
    parser.add_argument("--level", choices=LEVELS, default="simple", help="of the scenes (simple)")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of every run (400)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="of every setting"
    )
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="these settings alone")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"print the settings and an estimate (without results: of {TRIAL_STEPS} steps)",
    )
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except InputError as error:
        print(f"ablate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ablate.py: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    base, out = base_recipe(options.level, options.steps), options.out
    grid, seeds = choose(settings(base.model), options.only), list(dict.fromkeys(options.seeds))
    if min(seeds) < 0:
        raise InputError(f"--seeds: {min(seeds)} must not be negative")
    figure_class()
    _check_grid(base, out)
    operations = {}
    for name, changes in grid.items():
        recipe = change(base, changes, seed=0)
        blueprint = make_blueprint(recipe.model, recipe.train)
        operations[name] = count_operations(blueprint, recipe.data)
        print(f"{name:16} {count_parameters(blueprint):>9,} parameters  {format_changes(changes)}")
    results = [result for result in read_results(out) if result.name in grid]
    done = {(result.name, result.seed) for result in results}
    missing = [name for seed in seeds for name in grid if (name, seed) not in done]
    print(f"{len(seeds) * len(grid)} runs of {options.steps} steps, {len(missing)} to do")
    if missing:
        reference = results[-1] if results else _try(base, grid)
        minutes = estimate(missing, operations, options.steps, reference) / 60
        print(
            f"estimate: {minutes:.0f} minutes in one process, {minutes / 2:.0f} in two with a core "
            f"each (from {reference.steps} steps of {reference.name} at "
            f"{reference.seconds_per_step:.3f} s)",
            flush=True,
        )
    if options.dry_run:
        return
    run_grid(base, grid, seeds, out)
    for file in (RESULTS, TABLE, PLOT):
        print(out / file)


def _try(base: Recipe, grid: Mapping[str, Mapping[str, Any]]) -> Result:
    """A very short run of the first setting, to see how long one takes."""
    name, changes = next(iter(grid.items()))
    short = dataclasses.replace(base, train=with_steps(base.train, TRIAL_STEPS))
    with tempfile.TemporaryDirectory() as folder:
        result = train(short, name, changes, 0, Path(folder))
    jax.clear_caches()
    return result


def open_loader(data: DataConfig, model: ModelConfig, vocabulary: Vocabulary) -> Loader:
    """As many questions about a scene as in the demo."""
    datasets = {}
    for name in (name for family in data.families for name in family.datasets):
        dataset, _, split = name.partition("/")
        datasets[name] = Shapes(
            split=split, level=DATASETS[dataset], questions=shapes_training.QUESTIONS
        )
    return Loader(data, model, vocabulary, datasets)


def _evaluate(
    model: PixelLM, recipe: Recipe, vocabulary: Vocabulary, mesh: Mesh, loss: LossConfig
) -> dict[str, float]:
    assert recipe.validation is not None  # every base has it
    batches = open_loader(recipe.validation, recipe.model, vocabulary)
    try:
        first = itertools.islice(batches, recipe.train.evaluate_batches)
        return evaluate_given(model, first, mesh, loss).scores
    finally:
        batches.close()


def _check_grid(base: Recipe, out: Path) -> None:
    """Raises where `out` belongs to another recipe, with what differs."""
    kept, new = (_flatten(values) for values in (read_optional_json(out / GRID), _plain(base)))
    different = [key for key in new if kept.get(key, new[key]) != new[key]]
    if kept and (different or kept.keys() != new.keys()):
        found = ", ".join(f"{key}={kept[key]}, now {new[key]}" for key in different[:3])
        raise InputError(
            f"{out}: its runs are of another recipe ({found or 'other keys'}); ask for the same, "
            "or choose another --out"
        )


def _keep_grid(base: Recipe, out: Path) -> None:
    """Marks `out` as a folder of this recipe."""
    _check_grid(base, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / GRID, json.dumps(_plain(base), indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{out}: cannot write here ({error.strerror or error}); choose another --out"
        ) from None


def _plain(recipe: Recipe) -> dict[str, Any]:
    """As it comes back from a JSON file."""
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
    """Whether this process alone has the lock, which the system gives back when it ends."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        lock.unlink(missing_ok=True)
