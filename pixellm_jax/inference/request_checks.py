"""What may be asked, and how an answer may be drawn: refused here before a model sees it."""

from __future__ import annotations

import math
import numbers
from typing import Any

from pixellm_jax.errors import InputError

HOTTEST = 1e6
"""The highest temperature; all tokens are equally likely long before it."""


def check_question(question: str) -> None:
    """Refuses what is no question.

    Raises:
        InputError: it is empty, or holds bytes that are no text.
    """
    if not question.strip():
        raise InputError("the question is empty; ask something about the picture")
    if any("\ud800" <= letter <= "\udfff" for letter in question):
        raise InputError(f"the question {question[:80]!a} is not UTF-8; encode it as such")


def check_draw(*, temperature: Any = 0.0, top_p: Any = 1.0, seed: Any = 0) -> None:
    """Refuses what no token can be drawn with.

    Raises:
        InputError: a number of another kind, or outside its range.
    """
    if not (_is_number(temperature) and 0 <= temperature <= HOTTEST):
        raise InputError(f"temperature={temperature!r}: expected a number from 0 to {HOTTEST:g}")
    if not (_is_number(top_p) and 0 < top_p <= 1):
        raise InputError(f"top_p={top_p!r}: expected a probability above 0, up to 1")
    if not isinstance(seed, numbers.Integral):
        raise InputError(f"seed={seed!r}: expected a whole number")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not math.isnan(value)
