"""Scores of textual answers without masks: exact match and ROUGE-L.

On data such as LLaVA-Instruct they reveal whether a model that learns to segment forgets to talk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from pixellm_jax.errors import InputError
from pixellm_jax.text.answer import MARKER


class TextScore(NamedTuple):
    """Scores of one answer.

    exact: equal to the expected answer after `normalise`. rouge_l: ROUGE-L F-measure, 0 to 1.
    words, expected_words: numbers of words of the answer and of the expected answer.
    marked: the answer contains a target (`[SEG]`), the expected answer does not.
    """

    exact: bool
    rouge_l: float
    words: int
    expected_words: int
    marked: bool


class TextSummary(NamedTuple):
    """Means over answers; NaN where there are none.

    answers: number of answers. exact, rouge_l: see `TextScore`.
    length: number of all words over the number of all expected words.
    marked: share of the answers with a target where none is expected.
    """

    answers: int
    exact: float
    rouge_l: float
    length: float
    marked: float


class TextScorer:
    """Scores answers against expected answers.

        TextScorer().score("There are two cups.", "There are 2 cups.").exact  # True

    ROUGE-L (Lin 2004) is computed by the `rouge-score` package, without stemming. The default
    tokens of the package are runs of ASCII letters and digits in lower case; here they are runs of
    any letters and digits, identical for ASCII text and not empty for other scripts.

    Raises:
        InputError: the `rouge-score` package is not installed.
    """

    def __init__(self) -> None:
        self._scorer = _rouge(_Tokens())

    def score(self, expected: str, answer: str) -> TextScore:
        """Score one answer."""
        return TextScore(
            exact=normalise(expected) == normalise(answer),
            rouge_l=float(self._scorer.score(expected, answer)["rougeL"].fmeasure),
            words=len(answer.split()),
            expected_words=len(expected.split()),
            marked=MARKER in answer and MARKER not in expected,
        )

    def score_all(self, pairs: Iterable[tuple[str, str]]) -> list[TextScore]:
        """Score pairs of an expected answer and an answer."""
        return [self.score(expected, answer) for expected, answer in pairs]


def summarise_texts(scores: Iterable[TextScore]) -> TextSummary:
    """Summarise the scores of answers, all or any part of them."""
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
    """Normalise text like the VQA evaluation (https://github.com/GT-Vision-Lab/VQA, vqaEval.py).

    Lower case, no articles, no punctuation, number words up to ten as digits, single spaces.

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
# A full stop between digits belongs to the number.
_PUNCTUATION = re.compile(r"(?!(?<=\d)\.(?=\d))[^\w\s]|_")
_TOKEN = re.compile(r"[^\W_]+")


class _Tokens:
    """Tokenizer for the ROUGE scorer."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


def _rouge(tokens: _Tokens) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError(
            "text scores need the rouge-score package: pip install 'pixellm_jax[text]'"
        ) from None
    return RougeScorer(["rougeL"], tokenizer=tokens)


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else math.nan
