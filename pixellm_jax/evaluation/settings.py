"""What the results of a folder were made with, so that nothing else goes on in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixellm_jax.errors import InputError
from pixellm_jax.files import read_optional_json
from pixellm_jax.weights import checkpoint


def describe_model(folder: Path, dtype: str | None, weights: str | None) -> dict[str, Any]:
    """Settings that name a checkpoint and how it is computed with.

    Raises:
        InputError: it is no checkpoint.
    """
    config = checkpoint.read_config(folder)
    return {
        "checkpoint": folder.resolve().name,
        "checkpoint_hash": _digest(folder),
        "dtype": dtype or config.dtype,
        "weights": weights,
    }


def check_settings(path: Path, settings: Mapping[str, Any], *, made: str) -> bool:
    """Whether a file has these settings; False where there is no file. `made`: "an evaluation".

    Raises:
        InputError: it has others.
    """
    found = read_optional_json(path)
    for key in found.keys() | settings.keys() if found else ():
        if found.get(key) != settings.get(key):
            raise InputError(
                f"{path.parent}: {made} with {key} {found.get(key)!r}, now "
                f"{settings.get(key)!r}; choose another --out"
            )
    return bool(found)


def _digest(folder: Path) -> str:
    """Of the config, and of the names and sizes of all files of a checkpoint."""
    digest = hashlib.sha256((folder / checkpoint.CONFIG).read_bytes())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
