"""Output folders appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pixellm_jax.errors import InputError


@contextmanager
def whole_folder(out: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` if the block ends without an error.

    `replaces`: a file name; a folder at `out` that holds it is an earlier result of the same kind
    and is replaced. Anything else at `out`, but for an empty folder, is left alone and refused.

    Raises:
        InputError: `out` is taken, or its parent cannot be written, or the disk is full.
    """
    out = Path(out)
    if out.exists() and not _may_replace(out, replaces):
        kind = "folder that is not empty" if out.is_dir() else "file"
        raise InputError(f"{out}: there is already a {kind}; choose another --out or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out}: cannot write here ({error.strerror}); choose another") from None
    try:
        made.chmod(0o755)
        yield made
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            os.replace(out, old)
            os.replace(made, out)
            shutil.rmtree(old)
        else:
            os.replace(made, out)
    except OSError as error:
        raise InputError(
            f"{out}: writing failed ({error.strerror or error}); nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _may_replace(out: Path, marker: str | None) -> bool:
    if not out.is_dir():
        return False
    names = [path.name for path in out.iterdir()]
    return not names or (marker is not None and marker in names)
