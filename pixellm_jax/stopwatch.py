"""Wall-clock stopwatch that splits the elapsed time by activity."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds per activity since the start; activities must not overlap.

    Example:
        watch = Stopwatch("matching", "io", rest="model")
        with watch("io"):
            image = path.read_bytes()
        watch.read()  # {"model": 0.0, "matching": 0.0, "io": 0.002}

    Args:
        activities: names that may be timed.
        rest: name under which the time of no named activity is reported.
    """

    def __init__(self, *activities: str, rest: str) -> None:
        self._rest = rest
        self._seconds = dict.fromkeys(activities, 0.0)
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Add the duration of the block to `activity`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the duration of the block from every count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Return the seconds by activity, the rest first; they add up to the elapsed time."""
        elapsed = time.perf_counter() - self._start
        return {self._rest: elapsed - sum(self._seconds.values()), **self._seconds}

    def restart(self) -> dict[str, float]:
        """Return the reading, then count from zero again."""
        seconds = self.read()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._start = time.perf_counter()
        return seconds
