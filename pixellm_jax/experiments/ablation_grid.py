"""Ablation grid: named settings, each a few changes of one base recipe by dotted key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.sources.shapes.dataset import DATASETS
from data_pipeline.sources.shapes.questions import MAX_TARGETS
from data_pipeline.sources.shapes.tokenizer import FOLDER
from pixellm_jax.config import CodebookConfig, ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.experiments.recipe import Recipe, with_overrides
from pixellm_jax.experiments.shapes_recipe import DEMO_QUESTIONS, demo_recipe
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.config import TrainConfig

Changes = Mapping[str, Any]
"""Dotted key of a recipe -> value."""

Grid = Mapping[str, Changes]
"""Name of a setting -> its changes."""

BASE = "base"
"""Name of the setting without changes."""

LEVELS = {level: dataset for dataset, level in DATASETS.items()}
"""Level of the scenes -> dataset."""

BUDGETS: dict[str, dict[str, int]] = {
    "simple": {},
    "full": {"length": 312, "targets": DEMO_QUESTIONS * MAX_TARGETS},
}
"""Fields of the demo's data config that must grow for every conversation of a level to fit."""

FUSIONS = ("codebook.token_fusion", "codebook.mask_fusion")
COUNTS = (1, 2, 3)
"""Numbers of codebook tokens per scale, and of scales, in the grid."""


def make_grid(base: ModelConfig) -> dict[str, dict[str, Any]]:
    """Return the settings: name -> changes of the recipe.

    An additional scale takes its features one layer below the previous scale. `early-tap*` moves
    the last scale's features to the layer of the first scale, or one layer down.
    """
    grid: dict[str, dict[str, Any]] = {BASE: {}}
    codebook = base.codebook
    taps = base.vision.taps
    for count in COUNTS:
        if count != codebook.tokens_per_scale:
            grid[f"tokens-{count}"] = {"model.codebook.tokens_per_scale": count}
    for count in COUNTS:
        if count != codebook.scales:
            added = range(taps[-1] - 1, taps[-1] - 1 - max(0, count - len(taps)), -1)
            grid[f"scales-{count}"] = {
                "model.codebook.scales": count,
                "model.vision.taps": (*taps, *added)[:count],
            }
    for tap in (taps[0], taps[-1] - 1):
        if tap != taps[-1]:
            grid[f"early-tap{tap}"] = {"model.vision.taps": (*taps[:-1], tap)}
    grid["plain-bce"] = {"train.loss.alpha": 1.0}
    grid["constant-fusion"] = {"train.frozen": FUSIONS}
    return grid


def select_settings(grid: Grid, names: Sequence[str] | None) -> dict[str, Changes]:
    """Return the named settings in the order of the grid, or all of them.

    Raises:
        InputError: an unknown name.
    """
    if unknown := [name for name in names or () if name not in grid]:
        raise InputError(f"--only: no setting {', '.join(unknown)}; choose from {', '.join(grid)}")
    return {name: changes for name, changes in grid.items() if not names or name in names}


def base_recipe(level: str, steps: int) -> Recipe:
    """Return the recipe of `pixellm demo --train` on a level of the shapes, validated at the end.

    Raises:
        InputError: `steps` is below 1.
    """
    overrides = dict[str, Any]()
    for stream, split in (("data", "train"), ("validation", "val")):
        family = {"weight": 1.0, "datasets": (f"{LEVELS[level]}/{split}",)}
        overrides[f"{stream}.families"] = (family,)
        overrides |= {f"{stream}.{field}": value for field, value in BUDGETS[level].items()}
    recipe = with_overrides(demo_recipe(), overrides)
    return dataclasses.replace(recipe, train=with_steps(recipe.train, steps))


def with_steps(train: TrainConfig, steps: int) -> TrainConfig:
    """Return a training of `steps` steps that logs twenty times and validates at the end."""
    return dataclasses.replace(
        train,
        steps=steps,
        log_every=max(1, steps // 20),
        evaluate_every=max(1, steps),
        save_every=max(1, steps // 4),
    )


def apply_changes(base: Recipe, changes: Changes, seed: int) -> Recipe:
    """Return the recipe of one run: a setting's changes and a seed, applied to the base recipe.

    A change of the codebook changes the vocabulary with it, and the sequence length by what the
    codebook tokens of all targets of an image take up, so that no setting drops more conversations.

    Raises:
        InputError: an unknown key, a value of the wrong type, or values that contradict each other.
    """
    codebook = dataclasses.asdict(base.model.codebook)
    for field in codebook:
        codebook[field] = changes.get(f"model.codebook.{field}", codebook[field])
    vocabulary = Vocabulary.with_codebook(FOLDER, **codebook)
    added = len(vocabulary.group) - _group_size(base.model.codebook)
    overrides: dict[str, Any] = {
        **changes,
        "train.seed": seed,
        "data.seed": seed,
        "model.language.vocabulary": vocabulary.size,
    }
    assert base.validation is not None
    for stream, data in (("data", base.data), ("validation", base.validation)):
        overrides[f"{stream}.length"] = data.length + added * data.targets
    return with_overrides(base, overrides)


def _group_size(codebook: CodebookConfig) -> int:
    return codebook.tokens_per_scale * codebook.scales
