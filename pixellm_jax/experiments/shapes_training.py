"""Training of a shapes model from scratch, with its curves and a constant-mask baseline."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader, open_datasets
from data_pipeline.sources.shapes.dataset import Shapes
from pixellm_jax.batch import Batch
from pixellm_jax.config import ModelConfig
from pixellm_jax.evaluation.metrics import measure, merge, scores, tally
from pixellm_jax.experiments.recipe import Recipe
from pixellm_jax.experiments.shapes_recipe import DEMO_LEVEL, DEMO_QUESTIONS
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import make_mesh
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.config import TrainConfig
from pixellm_jax.training.export import write_model
from pixellm_jax.training.log import METRICS
from pixellm_jax.training.loop import fit
from pixellm_jax.training.state import initial_state, make_blueprint
from pixellm_jax.training.validation import Validation, validate

BASELINE_SCENES = 400
"""Training scenes on which the constant mask is fitted."""


class Trained(NamedTuple):
    """Outcome of a training run; curves are lists of points (step, value).

    Attributes:
        losses: total loss on training scenes.
        gious: teacher-forced gIoU on held-out scenes; the first point, at step 0, is the untrained
            model.
        constant: gIoU of the best constant mask on the same held-out scenes.
        steps: optimiser steps.
        seconds: wall time, compilation included.
    """

    losses: list[tuple[float, float]]
    gious: list[tuple[float, float]]
    constant: float
    steps: int
    seconds: float


def train(recipe: Recipe, out: Path) -> Trained:
    """Train from scratch on one device and write the model to `out`.

    Raises:
        KeyboardInterrupt: the run was interrupted before its last step.
    """
    assert recipe.validation is not None
    begin = time.perf_counter()
    config = recipe.model
    vocabulary = recipe.vocabulary(None)
    blueprint = make_blueprint(config, recipe.train)
    mesh = make_mesh(recipe.train.mesh, jax.local_devices()[:1])
    held_out = read_batches(
        recipe.validation, config, vocabulary, count=recipe.train.evaluate_batches
    )
    evaluate = partial(_evaluate, held_out, mesh, recipe.train)
    untrained = evaluate(blueprint.model(initial_state(blueprint, mesh, None)))
    batches = open_loader(recipe.data, config, vocabulary)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        run = Path(folder)
        try:
            outcome = fit(blueprint, batches, run=run, mesh=mesh, evaluate=evaluate)
        finally:
            batches.close()
        if not outcome.finished:
            raise KeyboardInterrupt
        write_model(run, recipe.train.steps, out, blueprint, vocabulary)
        records = [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]
    constant = fit_constant_mask(_target_masks())
    return Trained(
        losses=_curve(records, "loss/total"),
        gious=[(0.0, untrained.scores["giou"]), *_curve(records, "validation/giou")],
        constant=_score_constant_mask(constant, held_out),
        steps=recipe.train.steps,
        seconds=time.perf_counter() - begin,
    )


def open_loader(data: DataConfig, config: ModelConfig, vocabulary: Vocabulary) -> Loader:
    """Return a loader of shapes datasets with `DEMO_QUESTIONS` questions about each scene."""
    datasets = {
        name: dataclasses.replace(shapes, questions=DEMO_QUESTIONS)
        for name, shapes in open_datasets(data, None).items()
        if isinstance(shapes, Shapes)
    }
    return Loader(data, config, vocabulary, datasets)


def read_batches(
    data: DataConfig, config: ModelConfig, vocabulary: Vocabulary, *, count: int
) -> list[Batch]:
    """Return the first batches of `open_loader`."""
    loader = open_loader(data, config, vocabulary)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def fit_constant_mask(masks: Bool[np.ndarray, "m y x"]) -> Bool[np.ndarray, "y x"]:
    """Return the best constant mask: the one with the highest mean IoU over all of `masks`.

    Candidates are the superlevel sets of the mean mask, at 65 quantiles.
    """
    heat = masks.mean(0)
    thresholds = np.quantile(heat, np.linspace(0, 1, 65))
    return max((heat >= threshold for threshold in thresholds), key=partial(_mean_iou, masks))


def _mean_iou(masks: Bool[np.ndarray, "m y x"], constant: Bool[np.ndarray, "y x"]) -> float:
    predicted = np.broadcast_to(constant, masks.shape)
    return scores(tally(measure(predicted, masks.view(np.uint8)))).giou


def _score_constant_mask(constant: Bool[np.ndarray, "y x"], batches: Sequence[Batch]) -> float:
    """Return the gIoU of one mask on all targets of some batches."""
    parts = [
        tally(
            measure(np.broadcast_to(constant, batch.masks.shape), batch.masks),
            valid=batch.target_valid,
        )
        for batch in batches
    ]
    return scores(merge(*parts)).giou


def _target_masks() -> Bool[np.ndarray, "m y x"]:
    """Return the masks of all targets of the first training scenes."""
    shapes = Shapes(split="train", level=DEMO_LEVEL, questions=DEMO_QUESTIONS)
    scenes = map(shapes.generate, range(BASELINE_SCENES))
    return np.concatenate(
        [
            scene.scene.masks()[list(question.targets)]
            for scene in scenes
            for question in scene.questions
        ]
    )


def _evaluate(
    batches: Sequence[Batch], mesh: jax.sharding.Mesh, train: TrainConfig, model: PixelLM
) -> Validation:
    return Validation(validate(model, batches, mesh, train.loss).scores)


def _curve(records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(record["step"]), record[name]) for record in records if name in record]
