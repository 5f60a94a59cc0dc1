"""Programs that XLA compiles: every one is counted and logged, for each costs seconds."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

CAPACITY = 128
"""A cache holds a multiple of so many positions (see `round_capacity`)."""

_log = logging.getLogger(__name__)


class Programs:
    """Calls jitted functions; `compiled` counts by name what had to be compiled for that."""

    def __init__(self) -> None:
        self.compiled: Counter[str] = Counter()

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """function(*arguments, **options)."""
        known, begin = _programs(function), time.perf_counter()
        out = function(*arguments, **options)
        if _programs(function) > known:
            name, seconds = function.__name__, time.perf_counter() - begin
            self.compiled[name] += 1
            _log.info("compiled %s (its number %d) in %.1f s", name, self.compiled[name], seconds)
        return out


def bucket(count: int, least: int = 1, factor: int = 4) -> int:
    """The smallest of `least`, `factor * least`, ... that is enough: few sizes, few programs."""
    while least < count:
        least *= factor
    return least


def round_capacity(positions: int) -> int:
    """The least capacity that is enough: CAPACITY times 1 to 8, then 10, 12, 14, 16, 20, ..."""
    step = CAPACITY
    while positions > 8 * step:
        step *= 2
    return -(-positions // step) * step


def _programs(function: Callable[..., Any]) -> int:
    return function._cache_size()  # type: ignore[attr-defined]
