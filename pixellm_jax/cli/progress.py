"""A progress bar over bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal; yields a function of (new, all) bytes."""
    # The delay keeps it away where the input is refused at once.
    with tqdm(
        desc=what, disable=None, delay=0.5, unit="B", unit_scale=True, unit_divisor=1024
    ) as bar:

        def advance(new: int, total: int) -> None:
            bar.total = total
            bar.update(new)

        yield advance
