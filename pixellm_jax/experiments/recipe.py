"""A recipe file of configs/ -> what it configures, with changes given on the command line."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data_pipeline.config import DataConfig
from data_pipeline.sources.shapes.tokenizer import FOLDER as SHAPES_TOKENIZER
from pixellm_jax.config import ModelConfig, from_mapping
from pixellm_jax.errors import InputError
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.config import TrainConfig
from pixellm_jax.weights.checkpoint import read_config, read_vocabulary

SHAPES = "shapes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `get_config()` of a file in configs/ gives.

    `validation`: the stream that is evaluated on, None to leave that out. `tokenizer`: "shapes" is
    the one in the package, another name is a folder; "" takes that of the checkpoint a run begins
    from.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    validation: DataConfig | None = None
    tokenizer: str = ""

    def vocabulary(self, init: Path | None) -> Vocabulary:
        """The tokenizer with the codebook of the model.

        Raises:
            InputError: there is none, or it is that of another model.
        """
        if self.tokenizer:
            folder = SHAPES_TOKENIZER if self.tokenizer == SHAPES else Path(self.tokenizer)
            codebook = self.model.codebook
            vocabulary = Vocabulary.with_codebook(
                folder, tokens_per_scale=codebook.tokens_per_scale, scales=codebook.scales
            )
            if vocabulary.size > self.model.language.vocabulary:
                raise InputError(
                    f"{folder}: {vocabulary.size} ids, but model.language.vocabulary="
                    f"{self.model.language.vocabulary}; make them equal"
                )
            return vocabulary
        if init is None:
            raise InputError(
                "this recipe begins from trained weights: give --init CHECKPOINT (made by "
                "`pixellm convert`), or set tokenizer in the recipe to train from nothing"
            )
        return read_vocabulary(init, read_config(init))


def read_recipe(path: Path, changes: Sequence[str]) -> tuple[Recipe, dict[str, Any]]:
    """Runs a recipe file and applies changes such as `--config.train.steps=100`.

    Returns the recipe, and the same as plain values, to be kept beside the run.

    Raises:
        InputError: no such file or key, or a value of the wrong type; each is named.
    """
    values = _run(path)
    for change in changes:
        key, equals, text = change.removeprefix("--config.").partition("=")
        if not change.startswith("--config.") or not equals:
            raise InputError(
                f"{change!r}: expected --config.KEY=VALUE, such as --config.train.steps=9"
            )
        _set(values, key.split("."), text, change)
    recipe = from_mapping(Recipe, values, where=path.stem)
    return recipe, dataclasses.asdict(recipe)


def _run(path: Path) -> ConfigDict:
    if not path.is_file():
        raise InputError(f"{path}: no such recipe; those of the project are in configs/")
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
            f"{path}: get_config() gave {type(values).__name__}, expected a ConfigDict"
        )
    return values


def _set(values: ConfigDict, keys: list[str], text: str, change: str) -> None:
    """Changes one value; strings need no quotes."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    group: Any = values
    for key in keys[:-1]:
        group = group.get(key) if isinstance(group, ConfigDict) else None
    if not isinstance(group, ConfigDict):
        raise InputError(f"{change}: the recipe has no group {'.'.join(keys[:-1])!r}")
    if isinstance(group.get(keys[-1]), str):
        value = text
    with group.unlocked(), group.ignore_type():
        group[keys[-1]] = value  # types and unknown keys are checked when it is converted
