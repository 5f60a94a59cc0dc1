"""Scores of answers in words alone: exact match and ROUGE-L.

For data such as LLaVA-Instruct, so that a model that learns to segment and forgets to talk is seen.
The pairs are (expected answer, model's answer).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from pixellm_jax.errors import InputError
from pixellm_jax.text.answer import MARKER


class TextScore(NamedTuple):
    """An answer. exact: the same after `normalise`. rouge_l: F of ROUGE-L, 0 to 1.

    words, expected_words: how many both have. marked: it points at a target, unlike the expected.
    """

    exact: bool
    rouge_l: float
    words: int
    expected_words: int
    marked: bool


class TextSummary(NamedTuple):
    """Means over answers; NaN where there are none. length: all words over all expected words.

    marked: share of the answers that point at a target where none is expected.
    """

    answers: int
    exact: float
    rouge_l: float
    length: float
    marked: float


class TextScorer:
    """Scores answers.

    ROUGE-L (Lin 2004) is that of the `rouge-score` package, without stemming. Its own tokens are
    runs of ASCII letters and digits in lower case; ours are runs of any letters and digits, which
    are the same for ASCII text and are not nothing for other scripts.

    Raises:
        InputError: the package is not there.
    """

    def __init__(self) -> None:
        self._scorer = _rouge(_Tokens())

    def score(self, expected: str, answer: str) -> TextScore:
        """The scores of one answer."""
        return TextScore(
            exact=normalise(expected) == normalise(answer),
            rouge_l=float(self._scorer.score(expected, answer)["rougeL"].fmeasure),
            words=len(answer.split()),
            expected_words=len(expected.split()),
            marked=MARKER in answer and MARKER not in expected,
        )

    def score_all(self, pairs: Iterable[tuple[str, str]]) -> list[TextScore]:
        """The scores of each pair."""
        return [self.score(expected, answer) for expected, answer in pairs]


def summarise_texts(scores: Iterable[TextScore]) -> TextSummary:
    """The scores of any part of the answers."""
    rows = list(scores)
    expected = sum(row.expected_words for row in rows)
    return TextSummary(
        answers=len(rows),
        exact=_mean([row.exact for row in rows]),
        rouge_l=_mean([row.rouge_l for row in rows]),
        length=sum(row.words for row in rows) / expected if expected else math.nan,
        marked=_mean([row.marked for row in rows]),
    )


def normalise(text: str) -> str:
    """Text as the evaluation of VQA compares it (https://github.com/GT-Vision-Lab/VQA, vqaEval.py).

    Lower case, no articles, no punctuation, number words up to ten as digits, single blanks.

        "There are two cups." -> "there are 2 cups"
    """
    kept = _PUNCTUATION.sub(" ", _INSIDE_NUMBER.sub("", text.casefold()).replace("'", ""))
    return " ".join(_NUMBERS.get(word, word) for word in kept.split() if word not in _ARTICLES)


_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
_INSIDE_NUMBER = re.compile(r"(?<=\d),(?=\d)")
# A full stop between digits is part of the number.
_PUNCTUATION = re.compile(r"(?!(?<=\d)\.(?=\d))[^\w\s]|_")
_TOKEN = re.compile(r"[^\W_]+")


class _Tokens:
    """The tokenizer that the ROUGE scorer calls."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


def _rouge(tokens: _Tokens) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError(
            "scores of text need the rouge-score package: pip install 'pixellm_jax[text]'"
        ) from None
    return RougeScorer(["rougeL"], tokenizer=tokens)


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else math.nan
