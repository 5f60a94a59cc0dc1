"""Shape buckets and compilation counting: few shapes, so XLA compiles few programs.

Every compilation costs seconds, so each one is counted and logged.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

CAPACITY_UNIT = 128
"""Smallest step of a cache's capacity, in positions (see `round_capacity`)."""

_log = logging.getLogger(__name__)


class CompileCounter:
    """Calls jitted functions and counts the compilations that these calls trigger.

    Attributes:
        compiled: number of compilations by function name.
    """

    def __init__(self) -> None:
        self.compiled: Counter[str] = Counter()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `function(*args, **kwargs)`, where `function` is jitted."""
        known = _num_programs(function)
        begin = time.perf_counter()
        out = function(*args, **kwargs)
        if _num_programs(function) > known:
            name, seconds = function.__name__, time.perf_counter() - begin
            self.compiled[name] += 1
            _log.info("compiled %s (#%d) in %.1f s", name, self.compiled[name], seconds)
        return out


def bucket(count: int, minimum: int = 1, factor: int = 4) -> int:
    """Return the smallest of `minimum`, `factor * minimum`, ... that is at least `count`."""
    size = minimum
    while size < count:
        size *= factor
    return size


def round_capacity(positions: int) -> int:
    """Round up to a cache capacity: CAPACITY_UNIT times 1 to 8, then 10, 12, 14, 16, 20, ..."""
    step = CAPACITY_UNIT
    while positions > 8 * step:
        step *= 2
    return -(-positions // step) * step


def _num_programs(function: Callable[..., Any]) -> int:
    return function._cache_size()  # type: ignore[attr-defined]
