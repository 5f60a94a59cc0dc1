"""Training recipes: files that define `get_config()`, command-line overrides, named recipes."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data_pipeline.config import DataConfig, FamilyConfig
from data_pipeline.sources.shapes.tokenizer import FOLDER as SHAPES_TOKENIZER
from pixellm_jax.config import SIZES, ModelConfig, from_mapping
from pixellm_jax.errors import InputError
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.config import TrainConfig
from pixellm_jax.weights.checkpoint import read_config, read_vocabulary

SHAPES = "shapes"
"""Name of the tokenizer that comes with the package."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run: model, data, optimisation and validation.

    Example:
        >>> recipe, values = read_recipe(Path("configs/shapes.py"), ["--config.train.steps=100"])
        >>> recipe.train.steps
        100
    """

    model: ModelConfig
    """Architecture, and the dtype it computes in."""

    data: DataConfig
    """Stream of training batches."""

    train: TrainConfig
    """Optimiser, schedule, trainable parameters, mesh and logging."""

    validation: DataConfig | None = None
    """Stream of validation batches; None skips validation."""

    tokenizer: str = ""
    """Tokenizer folder, or "shapes" for the one in the package; "" takes that of `--init`."""

    def vocabulary(self, init: Path | None) -> Vocabulary:
        """Return the tokenizer extended by the model's codebook tokens.

        Args:
            init: checkpoint that the run starts from; used where the recipe names no tokenizer.

        Raises:
            InputError: there is no tokenizer, or it has more ids than the model.
        """
        if not self.tokenizer:
            if init is None:
                raise InputError(
                    "this recipe starts from trained weights: give --init CHECKPOINT (made by "
                    "`pixellm convert`), or set tokenizer in the recipe to train from scratch"
                )
            return read_vocabulary(init, read_config(init))
        folder = SHAPES_TOKENIZER if self.tokenizer == SHAPES else Path(self.tokenizer)
        vocabulary = Vocabulary.with_codebook(folder, **dataclasses.asdict(self.model.codebook))
        if vocabulary.size > self.model.language.vocabulary:
            raise InputError(
                f"{folder}: {vocabulary.size} ids, but model.language.vocabulary="
                f"{self.model.language.vocabulary}; make them equal"
            )
        return vocabulary

    def as_config_dict(self) -> ConfigDict:
        """Return the recipe in the form that `get_config()` of a recipe file returns."""
        return ConfigDict(dataclasses.asdict(self))


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe with some values replaced.

    Args:
        recipe: the recipe to start from.
        overrides: dotted key, such as "train.optimizer.warmup" -> value.

    Raises:
        InputError: an unknown key, a value of the wrong type, or values that contradict each other.
    """
    values = dataclasses.asdict(recipe)
    for key, value in overrides.items():
        *groups, last = key.split(".")
        group = values
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = value
    return from_mapping(Recipe, values)


def released_recipe(size: str) -> Recipe:
    """Return the recipe of the paper for a released size, "7b" or "13b".

    LoRA on the query and value projections; embeddings, head, projectors, codebook and pixel
    decoder trained in full; 5,000 updates of 160 images in 10 micro-batches.
    """
    data = DataConfig(batch=160, length=1024, targets=32, workers=8)
    validation = dataclasses.replace(
        data, families=(FamilyConfig(weight=1.0, datasets=("ReasonSeg/val",)),), batch=16, seed=1
    )
    return Recipe(
        model=SIZES[size],
        data=data,
        train=TrainConfig(steps=5000, accumulation=10),
        validation=validation,
    )


def read_recipe(path: Path, overrides: Sequence[str]) -> tuple[Recipe, dict[str, Any]]:
    """Run a recipe file and apply overrides such as `--config.train.steps=100`.

    Returns:
        The recipe, and the same as nested plain values, as it is stored next to the run.

    Raises:
        InputError: no such file or key, or a value of the wrong type; the message names it.
    """
    values = _run_file(path)
    for override in overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        if not override.startswith("--config.") or not equals:
            raise InputError(
                f"{override!r}: expected --config.KEY=VALUE, such as --config.train.steps=9"
            )
        _set_value(values, key.split("."), text, override)
    recipe = from_mapping(Recipe, values, where=path.stem)
    return recipe, dataclasses.asdict(recipe)


def _run_file(path: Path) -> ConfigDict:
    if not path.is_file():
        raise InputError(f"{path}: no such recipe; the recipes of the project are in configs/")
    spec = importlib.util.spec_from_file_location("pixellm_recipe", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file; a recipe defines get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config()
    except InputError:
        raise
    except Exception as error:  # whatever the user's file raises
        raise InputError(f"{path}: {type(error).__name__}: {error}; correct the recipe") from None
    if not isinstance(values, ConfigDict):
        raise InputError(
            f"{path}: get_config() returned {type(values).__name__}, expected a ConfigDict"
        )
    return values


def _set_value(values: ConfigDict, keys: list[str], text: str, override: str) -> None:
    """Replace one value; strings need no quotes."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    group: Any = values
    for key in keys[:-1]:
        group = group.get(key) if isinstance(group, ConfigDict) else None
    if not isinstance(group, ConfigDict):
        raise InputError(f"{override}: the recipe has no group {'.'.join(keys[:-1])!r}")
    if isinstance(group.get(keys[-1]), str):
        value = text
    with group.unlocked(), group.ignore_type():
        group[keys[-1]] = value  # `from_mapping` checks types and unknown keys
