"""`pixellm train`: a recipe, its data and a mesh of devices -> a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from data_pipeline.loader import Loader, open_datasets
from pixellm_jax.cli.options import (
    add_distributed_option,
    add_recipe_option,
    initialize_distributed,
)
from pixellm_jax.config import DTYPES
from pixellm_jax.errors import InputError
from pixellm_jax.experiments.recipe import Recipe, read_recipe
from pixellm_jax.files import read_optional_json, write_whole
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import batch_share, batch_ways, make_mesh
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.export import MODEL, write_model
from pixellm_jax.training.loop import fit
from pixellm_jax.training.state import Blueprint, make_blueprint
from pixellm_jax.training.validation import Evaluation, evaluate_given
from pixellm_jax.weights.checkpoint import read_config

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
    add_recipe_option(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="RUN",
        help="folder of the run, new or to go on (runs/NAME of the recipe)",
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
    add_distributed_option(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Trains, then writes the model to RUN/model."""
    options.when_interrupted = "the same command goes on from the last checkpoint"
    recipe, values = read_recipe(options.config, options.overrides)
    options.out = options.out or Path("runs") / options.config.stem
    if options.init is not None:  # its model, as this recipe computes with it
        _refuse_model_changes(options.overrides)
        found, own = read_config(options.init), recipe.model
        model = dataclasses.replace(found, dtype=own.dtype, remat=own.remat)
        recipe = dataclasses.replace(recipe, model=model)
        values = {**values, "model": dataclasses.asdict(model)}
    if options.distributed:
        initialize_distributed()
    vocabulary = recipe.vocabulary(options.init)
    blueprint = make_blueprint(recipe.model, recipe.train)
    mesh = make_mesh(recipe.train.mesh)
    datasets = open_datasets(recipe.data, options.data)
    host, hosts = batch_share(mesh)
    evaluate = _validation(recipe, vocabulary, options.data, mesh)
    batches = Loader(recipe.data, recipe.model, vocabulary, datasets, host=host, hosts=hosts)
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
    if not outcome.finished:
        return
    folder = options.out / MODEL
    try:
        if jax.process_index() == 0:
            _export(options, folder, int(outcome.state.step), blueprint, vocabulary)
            print(f"{folder}: the model; ask it with `pixellm segment --checkpoint {folder} ...`")
    finally:
        if jax.process_count() > 1:  # nobody leaves before: the others would be taken for lost
            multihost_utils.sync_global_devices("the model is written")


def _export(
    options: argparse.Namespace,
    folder: Path,
    step: int,
    blueprint: Blueprint,
    vocabulary: Vocabulary,
) -> None:
    """Writes the model, unless it is there already; that of an earlier step goes away."""
    note = folder.with_name(f"{MODEL}.json")
    wanted = {"step": step, "dtype": options.model_dtype}
    if folder.exists() and read_optional_json(note) == wanted:
        return
    if note.exists():  # else it is not ours to remove
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        write_whole(note, "{}\n")  # killed from here on: what is there is ours, and not whole
    write_model(
        options.out,
        step,
        folder,
        blueprint,
        vocabulary,
        init=options.init,
        dtype=options.model_dtype,
    )
    write_whole(note, json.dumps(wanted) + "\n")


def _refuse_model_changes(changes: Sequence[str]) -> None:
    """`--init` brings its own model: a change of the recipe's would do nothing."""
    for change in changes:
        key = change.partition("=")[0].removeprefix("--config.")
        if key.startswith("model.") and key not in ("model.dtype", "model.remat"):
            raise InputError(
                f"--config.{key}: --init brings its own model, of which only model.dtype and "
                "model.remat can be changed; leave it"
            )


def _validation(
    recipe: Recipe, vocabulary: Vocabulary, folder: Path | None, mesh: Any
) -> Callable[[PixelLM], Evaluation] | None:
    """The first batches of the validation stream, the same every time."""
    data = recipe.validation
    if data is None or not recipe.train.evaluate_every:
        return None
    ways = batch_ways(mesh)
    if data.batch % ways:
        raise InputError(
            f"validation.batch={data.batch} is no multiple of {ways} (mesh data x fsdp); change "
            "one of them"
        )
    host, hosts = batch_share(mesh)
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
