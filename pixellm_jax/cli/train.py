"""`pixellm train`: train a model by a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

from pixellm_jax.cli.options import (
    add_distributed_option,
    add_recipe_option,
    initialize_distributed,
)
from pixellm_jax.config import DTYPES
from pixellm_jax.experiments.recipe import read_recipe
from pixellm_jax.experiments.train_run import train_recipe, with_checkpoint_model
from pixellm_jax.training.memory import keep_freed_memory_on_cpu

EXAMPLES = """examples:
  pixellm train --config configs/shapes.py --out runs/shapes
  pixellm train --config configs/pixellm_7b.py --init llava_start --data prepared --out runs/7b \\
      --config.train.mesh.tensor=4 --config.train.accumulation=2

After an interruption the same command resumes from the last checkpoint in --out.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser.description = (
        "Trains by a recipe of configs/; --config.KEY=VALUE overrides any of its values."
    )
    parser.epilog = EXAMPLES
    add_recipe_option(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="RUN",
        help="folder of the run, new or to resume (runs/NAME of the recipe)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="datasets made by `pixellm prepare` (shapes need none)",
    )
    parser.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="initial weights (random without it)"
    )
    parser.add_argument(
        "--model-dtype",
        choices=DTYPES,
        help="dtype of the weights in RUN/model (as in --init, else float32)",
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases, too")
    add_distributed_option(parser)


def run(options: argparse.Namespace) -> None:
    """Train and export the model to RUN/model."""
    keep_freed_memory_on_cpu()
    options.when_interrupted = "run the same command to resume from the last checkpoint"
    recipe, _ = read_recipe(options.config, options.overrides)
    if options.init is not None:
        recipe = with_checkpoint_model(recipe, options.init, options.overrides)
    if options.distributed:
        initialize_distributed()
    model = train_recipe(
        recipe,
        options.out or Path("runs") / options.config.stem,
        data=options.data,
        init=options.init,
        model_dtype=options.model_dtype,
        wandb_project=options.wandb,
    )
    if model is not None and jax.process_index() == 0:
        print(f"{model}: the model; ask it with `pixellm segment --checkpoint {model} ...`")
