"""Where the time of an evaluation goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

REST = "model"
"""What is spent on nothing else that has a name."""


class Stopwatch:
    """Seconds by name since it was made; names do not overlap, and the rest is the model's."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._spent = {"matching": 0.0, "io": 0.0}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts what happens inside for `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - begin

    def restart(self) -> None:
        """Forgets what went by so far."""
        self._begin = time.perf_counter()
        self._spent = dict.fromkeys(self._spent, 0.0)

    def read(self) -> dict[str, float]:
        """Seconds of every name; together all that went by."""
        whole = time.perf_counter() - self._begin
        return {REST: whole - sum(self._spent.values()), **self._spent}
