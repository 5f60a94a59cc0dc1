"""Training run of a recipe: open its data, train on a mesh of devices, export the model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_pipeline.loader import Loader, open_datasets
from pixellm_jax.errors import InputError
from pixellm_jax.experiments.recipe import Recipe
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import batch_share, batch_ways, make_mesh
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.export import MODEL, update_model
from pixellm_jax.training.loop import fit
from pixellm_jax.training.state import make_blueprint
from pixellm_jax.training.validation import Validation, validate
from pixellm_jax.weights.checkpoint import read_config


def train_recipe(
    recipe: Recipe,
    run: Path,
    *,
    data: Path | None = None,
    init: Path | None = None,
    model_dtype: str | None = None,
    wandb_project: str | None = None,
) -> Path | None:
    """Train by a recipe, resuming from the last checkpoint in `run`, and export the model.

    Args:
        recipe: the recipe; with `init`, as `with_checkpoint_model` returns it.
        run: folder of the run, new or to resume.
        data: folder of prepared datasets; shapes need none.
        init: checkpoint of the initial weights; without it they are random.
        model_dtype: dtype of the exported weights; by default the dtypes of `init`, or float32.
        wandb_project: Weights & Biases project.

    Returns:
        The folder of the exported model; None if the run was interrupted.

    Raises:
        InputError: data, checkpoint and recipe do not fit each other, or the run failed (`fit`).
    """
    vocabulary = recipe.vocabulary(init)
    blueprint = make_blueprint(recipe.model, recipe.train)
    mesh = make_mesh(recipe.train.mesh)
    datasets = open_datasets(recipe.data, data)
    host, hosts = batch_share(mesh)
    evaluate = make_validation(recipe, vocabulary, mesh, data)
    batches = Loader(recipe.data, recipe.model, vocabulary, datasets, host=host, hosts=hosts)
    try:
        outcome = fit(
            blueprint,
            batches,
            run=run,
            mesh=mesh,
            init=init,
            recipe={
                **dataclasses.asdict(recipe),
                "init": "" if init is None else str(init),
                "data_folder": "" if data is None else str(data),
            },
            evaluate=evaluate,
            project=wandb_project,
        )
    finally:
        batches.close()
    if not outcome.finished:
        return None
    try:
        if jax.process_index() == 0:
            step = int(outcome.state.step)
            update_model(run, step, blueprint, vocabulary, init=init, dtype=model_dtype)
    finally:
        # A process that left earlier would be taken for lost by the others.
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the model is written")
    return run / MODEL


def with_checkpoint_model(recipe: Recipe, init: Path, overrides: Sequence[str]) -> Recipe:
    """Return the recipe with the model of a checkpoint, keeping its compute dtype and remat.

    Args:
        recipe: the recipe.
        init: checkpoint of the initial weights.
        overrides: the `--config.KEY=VALUE` arguments that made the recipe.

    Raises:
        InputError: an override changes the model, which the checkpoint determines.
    """
    for override in overrides:
        key = override.partition("=")[0].removeprefix("--config.")
        if key.startswith("model.") and key not in ("model.dtype", "model.remat"):
            raise InputError(
                f"--config.{key}: the model comes from --init; only model.dtype and model.remat "
                "can be changed; leave it out"
            )
    model = dataclasses.replace(
        read_config(init), dtype=recipe.model.dtype, remat=recipe.model.remat
    )
    return dataclasses.replace(recipe, model=model)


def make_validation(
    recipe: Recipe, vocabulary: Vocabulary, mesh: Mesh, data: Path | None
) -> Callable[[PixelLM], Validation] | None:
    """Return a validation on the first batches of the validation stream, the same every time.

    Raises:
        InputError: the validation batch does not divide among the devices.
    """
    stream = recipe.validation
    if stream is None or not recipe.train.evaluate_every:
        return None
    ways = batch_ways(mesh)
    if stream.batch % ways:
        raise InputError(
            f"validation.batch={stream.batch} is no multiple of {ways} (mesh data x fsdp); change "
            "one of them"
        )
    host, hosts = batch_share(mesh)
    datasets = open_datasets(stream, data)

    def evaluate(model: PixelLM) -> Validation:
        batches = Loader(stream, recipe.model, vocabulary, datasets, host=host, hosts=hosts)
        try:
            first = itertools.islice(batches, recipe.train.evaluate_batches)
            return validate(model, first, mesh, recipe.train.loss)
        finally:
            batches.close()

    return evaluate
