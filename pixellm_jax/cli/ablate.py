"""`pixellm ablate`: train a small model without one part of the method at a time."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixellm_jax.errors import InputError
from pixellm_jax.experiments.ablation_grid import (
    LEVELS,
    Grid,
    apply_changes,
    base_recipe,
    make_grid,
    select_settings,
)
from pixellm_jax.experiments.ablation_report import (
    PLOT,
    RESULTS,
    TABLE,
    Result,
    figure_class,
    format_changes,
    read_results,
)
from pixellm_jax.experiments.ablation_run import (
    TRIAL_STEPS,
    check_base,
    count_flops,
    count_parameters,
    estimate_seconds,
    run_grid,
    try_setting,
)
from pixellm_jax.experiments.recipe import Recipe
from pixellm_jax.experiments.shapes_recipe import DEMO_OVERRIDES
from pixellm_jax.training.memory import keep_freed_memory_on_cpu
from pixellm_jax.training.state import make_blueprint

HELD_OUT_SCENES = DEMO_OVERRIDES["train.evaluate_batches"] * DEMO_OVERRIDES["validation.batch"]

EXAMPLES = """examples:
  pixellm ablate --dry-run
  pixellm ablate --out runs/ablations
  pixellm ablate --only base plain-bce --level full --steps 2000 --out runs/overlaps

The folder receives ablations.jsonl (one line per run, written when the run ends), ablations.md and
ablations.png. The same command resumes after any interruption, even in the middle of a run. If you
start it a second time, both processes share the work: each takes the next run that is free. Two
runs at a time, one core each:

  taskset -c 0 pixellm ablate &
  taskset -c 1 pixellm ablate &
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options and the help text."""
    parser.description = (
        "Trains the small model of `pixellm demo --train` from scratch, once per setting and seed. "
        "Each setting changes one part of the method, and all runs have the same number of steps. "
        f"Each model is scored on {HELD_OUT_SCENES} held-out scenes (teacher-forced)."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("ablations"),
        metavar="DIR",
        help="results folder, new or of an earlier run to resume (ablations)",
    )
    parser.add_argument(
        "--level", choices=LEVELS, default="simple", help="level of the scenes (simple)"
    )
    parser.add_argument(
        "--steps", type=int, default=400, metavar="N", help="training steps per run (400)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="S",
        help="seeds of every setting (0 1 2)",
    )
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="only these settings")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the settings and a time estimate; without earlier results, "
        f"{TRIAL_STEPS} training steps are timed first",
    )
    parser.set_defaults(when_interrupted="run the same command again to resume")


def run(options: argparse.Namespace) -> None:
    """Print the settings and a time estimate, train the missing runs, print the result files.

    With `--dry-run`, stop after the estimate.
    """
    keep_freed_memory_on_cpu()
    base = base_recipe(options.level, options.steps)
    grid = select_settings(make_grid(base.model), options.only)
    seeds = list(dict.fromkeys(options.seeds))
    if min(seeds) < 0:
        raise InputError(f"--seeds: {min(seeds)} must not be negative")
    figure_class()  # a missing matplotlib is reported before the first run
    check_base(base, options.out)
    flops = _print_settings(base, grid)
    _print_estimate(base, grid, seeds, flops, options)
    if options.dry_run:
        return
    run_grid(base, grid, seeds, options.out, log=lambda line: print(line, flush=True))
    for name in (RESULTS, TABLE, PLOT):
        print(options.out / name)


def _print_settings(base: Recipe, grid: Grid) -> dict[str, float]:
    """Print a line per setting and return the FLOPs of a training step of each."""
    flops = {}
    for name, changes in grid.items():
        recipe = apply_changes(base, changes, seed=0)
        blueprint = make_blueprint(recipe.model, recipe.train)
        flops[name] = count_flops(blueprint, recipe.data)
        print(f"{name:16} {count_parameters(blueprint):>9,} parameters  {format_changes(changes)}")
    return flops


def _print_estimate(
    base: Recipe,
    grid: Grid,
    seeds: Sequence[int],
    flops: Mapping[str, float],
    options: argparse.Namespace,
) -> None:
    results = [result for result in read_results(options.out) if result.name in grid]
    done = {(result.name, result.seed) for result in results}
    missing = [name for seed in seeds for name in grid if (name, seed) not in done]
    print(f"{len(seeds) * len(grid)} runs of {options.steps} steps, {len(missing)} to do")
    if not missing:
        return
    reference = results[-1] if results else _try_first(base, grid)
    minutes = estimate_seconds(missing, flops, options.steps, reference) / 60
    print(
        f"estimate: {minutes:.0f} minutes in one process, {minutes / 2:.0f} in two with one "
        f"core each (from {reference.steps} steps of {reference.name} at "
        f"{reference.seconds_per_step:.3f} s)",
        flush=True,
    )


def _try_first(base: Recipe, grid: Grid) -> Result:
    """Time a few steps of the first setting."""
    name, changes = next(iter(grid.items()))
    return try_setting(base, name, changes)
