"""A progress bar over bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; yields a function of (new bytes, bytes in all)."""
    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def advance(new: int, total: int) -> None:
            bar.total = total
            bar.update(new)

        yield advance
