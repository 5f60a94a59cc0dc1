"""Atomic output folders and files, and JSON objects read from files."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pixellm_jax.errors import InputError


@contextlib.contextmanager
def whole_folder(out: Path, *, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder next to `out`, which becomes `out` if the block raises no error.

    Args:
        out: an empty folder, or nothing, or an earlier result to be replaced.
        replaces: patterns of file names. A folder at `out` counts as an earlier result if it holds
            the first of them and every file matches one. Anything else is refused.

    Raises:
        InputError: `out` exists, or its parent cannot be written, or the disk is full.
    """
    made = None
    new_parents: list[Path] = []
    try:
        try:
            target = Path(out).resolve()
            if target.exists() and not _may_replace(target, replaces):
                kind = "folder that is not empty" if target.is_dir() else "file"
                raise InputError(
                    f"{out}: there is already a {kind}; choose another place or remove it"
                )
            new_parents = [parent for parent in target.parents if not parent.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a zero byte
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{out}: cannot write here ({reason}); choose another place") from None
        made.chmod(0o755)
        yield made
        _move(made, target, replaces)
    except OSError as error:
        raise InputError(
            f"{out}: writing failed ({error.strerror or error}); nothing was left behind, free "
            "some space or choose another place"
        ) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        for parent in new_parents:  # a parent that is not empty stays
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name next to `path`; the file written there becomes `path` if the block succeeds.

    An existing file is replaced. Several threads and processes may write at once. Errors of the
    operating system propagate.
    """
    made = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield made
        os.replace(made, path)
    finally:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically and durably (fsync).

    Half of a surrogate pair, which a model may generate, is written as a question mark.
    """
    with whole_file(path) as made, made.open("x", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file that must exist.

    Raises:
        InputError: the file is missing, not JSON, or not an object.
    """
    value = _read_object(path)
    if value is None:
        raise InputError(f"{path}: no such file; is {path.parent} a model folder?")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in an optional file; return {} if it does not exist.

    Raises:
        InputError: the file exists, but is not JSON, or not an object.
    """
    return _read_object(path) or {}


def _may_replace(folder: Path, patterns: Sequence[str]) -> bool:
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    known = (any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in names)
    return not names or (patterns[:1] != () and patterns[0] in names and all(known))


def _move(made: Path, target: Path, patterns: Sequence[str]) -> None:
    """Rename `made` to `target`; an earlier result is restored if that fails."""
    if not patterns or not target.exists() or not _may_replace(target, patterns):
        os.replace(made, target)  # refused by the system if `target` has appeared meanwhile
        return
    old = made.with_name(f"{made.name}.old")
    os.replace(target, old)
    try:
        os.replace(made, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_object(path: Path) -> dict[str, Any] | None:
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
