"""The recipe of a run: kept beside it, and held against the one that it goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pixellm_jax.errors import InputError
from pixellm_jax.files import write_whole

RECIPE = "recipe.json"

FIXED = (
    "model",
    "data",
    "tokenizer",
    "train.seed",
    "train.lora",
    "train.trainable",
    "train.frozen",
)
FREE = ("model.dtype", "model.remat", "data.workers")
"""Keys that a run keeps to its end, and those below them that it need not."""


def keep_recipe(run: Path, recipe: Mapping[str, Any]) -> None:
    """Writes the recipe beside the run.

    Raises:
        InputError: it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / RECIPE, json.dumps(recipe, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{run}: cannot write here ({error.strerror or error}); choose another --out"
        ) from None


def refuse_other_recipe(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with what would be another run; lengths, rates and meshes may change.

    Raises:
        InputError: names the first key that differs.
    """
    old, new = dict(_flat(before)), dict(_flat(json.loads(json.dumps(now))))
    if not old or not new:  # one of them is not known
        return
    for key in sorted(old.keys() | new.keys()):
        fixed = any(f"{key}.".startswith(f"{name}.") for name in FIXED)
        if fixed and key not in FREE and old.get(key) != new.get(key):
            raise InputError(
                f"{run}: the run began with {key}={old.get(key)!r}, now it is {new.get(key)!r}: "
                "give the same, or another --out (with --init to begin from this one's model)"
            )


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
