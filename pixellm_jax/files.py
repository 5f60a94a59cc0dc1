"""Output folders and files that appear whole or not at all, and JSON objects read from files."""

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
    """A temporary folder beside `out` that becomes `out` if the block ends without an error.

    `replaces`: patterns of file names. A folder at `out` that holds the first of them, and no file
    that none of them matches, is an earlier result of the same kind and is replaced. Anything else
    at `out`, but for an empty folder, is left alone and refused.

    Raises:
        InputError: `out` is taken, or its parent cannot be written, or the disk is full.
    """
    made, new_parents = None, list[Path]()
    try:
        try:
            place = Path(out).resolve()
            if place.exists() and not _may_replace(place, replaces):
                kind = "folder that is not empty" if place.is_dir() else "file"
                raise InputError(
                    f"{out}: there is already a {kind}; choose another place or remove it"
                )
            new_parents = [parent for parent in place.parents if not parent.exists()]
            place.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a zero byte
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{out}: cannot write here ({reason}); choose another place") from None
        made.chmod(0o755)
        yield made
        _move(made, place, replaces)
    except OSError as error:
        raise InputError(
            f"{out}: writing failed ({error.strerror or error}); nothing was left behind, free "
            "some space or choose another place"
        ) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        for parent in new_parents:  # stays where something is in it
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it becomes `path` if the block ends without an error.

    What was at `path` is replaced. Several threads and processes may do so at once. Errors of the
    system come as they are.
    """
    made = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield made
        os.replace(made, path)
    finally:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file as `whole_file` does; it outlives a loss of power.

    A half of a surrogate pair, which a model may say, is written as a question mark.
    """
    with whole_file(path) as made, made.open("x", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that must be there.

    Raises:
        InputError: the file is not there, not JSON, or not an object.
    """
    found = _read_object(path)
    if found is None:
        raise InputError(f"{path}: no such file; is {path.parent} a model folder?")
    return found


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that may be left out: empty where it is not there.

    Raises:
        InputError: the file is there, but not JSON, or not an object.
    """
    return _read_object(path) or {}


def _may_replace(place: Path, patterns: Sequence[str]) -> bool:
    if not place.is_dir():
        return False
    names = [path.name for path in place.iterdir()]
    known = (any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in names)
    return not names or (patterns[:1] != () and patterns[0] in names and all(known))


def _move(made: Path, place: Path, patterns: Sequence[str]) -> None:
    """Renames; an earlier result makes way, and comes back if that fails."""
    if not patterns or not place.exists() or not _may_replace(place, patterns):
        os.replace(made, place)  # the system refuses if there is something by now
        return
    old = made.with_name(f"{made.name}.old")
    os.replace(place, old)
    try:
        os.replace(made, place)
    except OSError:
        os.replace(old, place)
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
