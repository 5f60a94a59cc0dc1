"""JSON objects in files, and the two rules for a file that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pixellm_jax.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that must be there.

    Raises:
        InputError: the file is not there, not JSON, or not an object.
    """
    found = _read(path)
    if found is None:
        raise InputError(f"{path}: no such file; is {path.parent} a model folder?")
    return found


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that may be left out: empty where it is not there.

    Raises:
        InputError: the file is there, but not JSON, or not an object.
    """
    return _read(path) or {}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        again = "copy or download it again"
        raise InputError(f"{path}: not readable as JSON ({error}); {again}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
