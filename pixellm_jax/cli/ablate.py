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

SCENES = DEMO_OVERRIDES["train.evaluate_batches"] * DEMO_OVERRIDES["validation.batch"]

EXAMPLES = """examples:
  pixellm ablate --dry-run
  pixellm ablate --out runs/ablations
  pixellm ablate --only base plain-bce --level full --steps 2000 --out runs/overlaps

The folder gets ablations.jsonl (a line per run, written as it ends), ablations.md and
ablations.png. The same command resumes after any interruption, inside a run too. Started again
while it runs, it shares the runs with the first process: each takes the next free run. Two runs at
a time, a core each:

  taskset -c 0 pixellm ablate &
  taskset -c 1 pixellm ablate &
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser.description = (
        "Trains the small model of `pixellm demo --train` from scratch, with one part "
        "of the method changed at a time and the same number of steps each, and scores it on "
        f"{SCENES} held-out scenes (teacher-forced)."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("ablations"),
        metavar="DIR",
        help="folder of the results, new or to resume (ablations)",
    )
    parser.add_argument("--level", choices=LEVELS, default="simple", help="of the scenes (simple)")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of every run (400)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="of every setting"
    )
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="only these settings")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"print the settings and a time estimate (without results: from {TRIAL_STEPS} steps)",
    )
    parser.set_defaults(when_interrupted="the same command resumes from there")


def run(options: argparse.Namespace) -> None:
    """Print the settings and an estimate, run what is missing, print where the results are."""
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
    """Print a line per setting; return the operations of a step of each."""
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
    reference = results[-1] if results else try_setting(base, *next(iter(grid.items())))
    minutes = estimate_seconds(missing, flops, options.steps, reference) / 60
    print(
        f"estimate: {minutes:.0f} minutes in one process, {minutes / 2:.0f} in two with a core "
        f"each (from {reference.steps} steps of {reference.name} at "
        f"{reference.seconds_per_step:.3f} s)",
        flush=True,
    )
