"""`pixellm train`: a recipe, its data and a mesh of devices -> a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from data_pipeline.loader import Loader, open_datasets
from pixellm_jax.checkpoint import read_config
from pixellm_jax.cli.processes import HELP, join
from pixellm_jax.cli.recipe import Recipe, read_recipe
from pixellm_jax.config import DTYPES
from pixellm_jax.evaluate import Evaluation, evaluate_given
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.run_export import MODEL, write_model
from pixellm_jax.sharding import make_mesh
from pixellm_jax.train import fit
from pixellm_jax.train_state import make_blueprint
from pixellm_jax.vocabulary import Vocabulary

EXAMPLES = """examples:
  pixellm train --config configs/shapes.py --out runs/shapes
  pixellm train --config configs/pixellm_7b.py --init llava_start --data prepared --out runs/7b \\
      --config.train.mesh.tensor=4 --config.train.accumulation=2

The same command goes on after any interruption, from the last checkpoint in --out.
"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train a model by a recipe",
        description="Trains by a recipe of configs/; every value of it can be changed with "
        "--config.KEY=VALUE.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the recipe")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="RUN", help="folder of the run, new or to go on"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="what `pixellm prepare` made (shapes need none)"
    )
    parser.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="weights to begin from (else drawn)"
    )
    parser.add_argument(
        "--model-dtype",
        choices=DTYPES,
        help="of the weights in RUN/model (that of --init, else float32)",
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases, too")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help=HELP,
    )
    parser.set_defaults(takes_changes=True)
    return parser


def run(options: argparse.Namespace) -> None:
    """Trains, then writes the model to RUN/model."""
    options.when_interrupted = "the same command goes on from the last checkpoint"
    recipe, values = read_recipe(options.config, options.changes)
    if options.init is not None:  # its model, as this recipe computes with it
        found, own = read_config(options.init), recipe.model
        model = dataclasses.replace(found, dtype=own.dtype, remat=own.remat)
        recipe = dataclasses.replace(recipe, model=model)
    if options.distributed:
        join()
    vocabulary = recipe.vocabulary(options.init)
    blueprint = make_blueprint(recipe.model, recipe.train)
    mesh = make_mesh(recipe.train.mesh)
    datasets = open_datasets(recipe.data, options.data)
    host, hosts = jax.process_index(), jax.process_count()
    batches = Loader(recipe.data, recipe.model, vocabulary, datasets, host=host, hosts=hosts)
    evaluate = _validation(recipe, vocabulary, options.data, mesh)
    try:
        outcome = fit(
            blueprint,
            batches,
            run=options.out,
            mesh=mesh,
            init=options.init,
            recipe={**values, "init": _text(options.init), "data_folder": _text(options.data)},
            evaluate=evaluate,
            project=options.wandb,
        )
    finally:
        batches.close()
    folder = options.out / MODEL
    if outcome.finished and host == 0 and not folder.exists():
        write_model(
            options.out,
            recipe.train.steps,
            folder,
            blueprint,
            vocabulary,
            init=options.init,
            dtype=options.model_dtype,
        )
    if outcome.finished and host == 0:
        print(f"{folder}: the model; ask it with `pixellm segment --checkpoint {folder} ...`")


def _validation(
    recipe: Recipe, vocabulary: Vocabulary, folder: Path | None, mesh: Any
) -> Callable[[PixelLM], Evaluation] | None:
    """The first batches of the validation stream, the same every time."""
    data = recipe.validation
    if data is None or not recipe.train.evaluate_every:
        return None
    host, hosts = jax.process_index(), jax.process_count()
    loader = partial(
        Loader, data, recipe.model, vocabulary, open_datasets(data, folder), host=host, hosts=hosts
    )

    def evaluate(model: PixelLM) -> Evaluation:
        batches = loader()
        try:
            first = itertools.islice(batches, recipe.train.evaluate_batches)
            return evaluate_given(model, first, mesh, recipe.train.loss)
        finally:
            batches.close()

    return evaluate


def _text(path: Path | None) -> str:
    return "" if path is None else str(path)
