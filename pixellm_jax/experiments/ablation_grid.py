"""The settings of an ablation: changes of one recipe, by its keys alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.config import DataConfig, FamilyConfig
from data_pipeline.sources.shapes.dataset import DATASETS
from data_pipeline.sources.shapes.questions import MOST_TARGETS
from data_pipeline.sources.shapes.tokenizer import FOLDER
from pixellm_jax.config import CodebookConfig, ModelConfig, from_mapping
from pixellm_jax.errors import InputError
from pixellm_jax.experiments import shapes_training
from pixellm_jax.experiments.recipe import SHAPES, Recipe
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.config import TrainConfig

BASE = "base"

LEVELS = {level: dataset for dataset, level in DATASETS.items()}
BUDGETS: dict[str, dict[str, Any]] = {
    "simple": {},
    "full": {"length": 312, "targets": shapes_training.QUESTIONS * MOST_TARGETS},
}
"""Changes of the demo's data that let every conversation of a level fit."""

FUSIONS = ("codebook.token_fusion", "codebook.mask_fusion")
COUNTS = (1, 2, 3)
"""Codebook tokens per scale, and scales, that are tried."""


def settings(base: ModelConfig) -> dict[str, dict[str, Any]]:
    """The grid: name -> changes of the recipe, by dotted key.

    A scale more takes its features from one layer before those of the scale before it. `early-tap`
    takes those of the last scale from where the first has its own, and from one layer earlier.
    """
    grid: dict[str, dict[str, Any]] = {BASE: {}}
    codebook, taps = base.codebook, base.vision.taps
    for count in COUNTS:
        if count != codebook.tokens_per_scale:
            grid[f"tokens-{count}"] = {"model.codebook.tokens_per_scale": count}
    for count in COUNTS:
        if count != codebook.scales:
            more = range(taps[-1] - 1, taps[-1] - 1 - max(0, count - len(taps)), -1)
            grid[f"scales-{count}"] = {
                "model.codebook.scales": count,
                "model.vision.taps": (*taps, *more)[:count],
            }
    for tap in (taps[0], taps[-1] - 1):
        if tap != taps[-1]:
            grid[f"early-tap{tap}"] = {"model.vision.taps": (*taps[:-1], tap)}
    grid["plain-bce"] = {"train.loss.alpha": 1.0}
    grid["constant-fusion"] = {"train.frozen": FUSIONS}
    return grid


def choose(
    grid: Mapping[str, Mapping[str, Any]], only: Sequence[str] | None
) -> dict[str, Mapping[str, Any]]:
    """The settings of some names, or all.

    Raises:
        InputError: there is no such setting.
    """
    if unknown := [name for name in only or () if name not in grid]:
        raise InputError(f"--only: no setting {', '.join(unknown)}; choose from {', '.join(grid)}")
    return {name: changes for name, changes in grid.items() if not only or name in only}


def base_recipe(level: str, steps: int) -> Recipe:
    """That of `pixellm demo --train`, on a level of the shapes, with one evaluation at the end.

    Raises:
        InputError: `steps` is not at least 1.
    """

    def data(own: DataConfig, split: str) -> DataConfig:
        family = FamilyConfig(weight=1.0, datasets=(f"{LEVELS[level]}/{split}",))
        return dataclasses.replace(own, families=(family,), **BUDGETS[level])

    size = Vocabulary.with_codebook(FOLDER, **dataclasses.asdict(shapes_training.CODEBOOK)).size
    return Recipe(
        model=shapes_training.make_model_config(size),
        data=data(shapes_training.DATA, "train"),
        train=with_steps(shapes_training.TRAIN, steps),
        validation=data(shapes_training.HELD_OUT, "val"),
        tokenizer=SHAPES,
    )


def with_steps(train: TrainConfig, steps: int) -> TrainConfig:
    """A training of another length, which logs twenty times and evaluates at the end."""
    return dataclasses.replace(
        train,
        steps=steps,
        log_every=max(1, steps // 20),
        evaluate_every=max(1, steps),
        save_every=max(1, steps // 4),
    )


def change(base: Recipe, changes: Mapping[str, Any], seed: int) -> Recipe:
    """The recipe of a run: changed, and what must follow a change of the codebook.

    The vocabulary gets the tokens of the codebook, and the budget of positions grows or shrinks by
    what they take in as many targets as fit, so that no setting loses more conversations.

    Raises:
        InputError: no such key, a value of the wrong type, or values that contradict each other.
    """
    values = dataclasses.asdict(base)
    for key, value in {**changes, "train.seed": seed, "data.seed": seed}.items():
        *groups, last = key.split(".")
        group = values
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = value
    codebook = values["model"]["codebook"]
    vocabulary = Vocabulary.with_codebook(FOLDER, **codebook)
    values["model"]["language"]["vocabulary"] = vocabulary.size
    more = len(vocabulary.group) - _tokens(base.model.codebook)
    for data in (values["data"], values["validation"]):
        data["length"] += more * data["targets"]
    return from_mapping(Recipe, values)


def _tokens(codebook: CodebookConfig) -> int:
    return codebook.tokens_per_scale * codebook.scales
