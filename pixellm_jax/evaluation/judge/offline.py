"""Offline judge: scores a target by the words its name shares with the true description.

For tests and for work without a network. It knows no synonyms, so its scores cannot be compared
with any other judge's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pixellm_jax.evaluation.judge.prompt import JudgeQuestion
from pixellm_jax.text.answer import MARKER, find_phrases

_WORD = re.compile(r"[^\W_]+")
# Function words, and the words of every question of this task.
_STOP_WORDS = frozenset(
    _WORD.findall(
        "a an and are as at be been being by can could do does for from had has have he her here "
        "him his i image in is it its me of on one or photo picture please s segment segmentation "
        "she so that the their them there these they this those to was were what where which who "
        "whose will with would you"
    )
)


class WordJudge:
    """Deterministic judge by word overlap.

    Compares the words that name a target in the answer (`text.answer.find_phrases`; of all its
    markers together) with the true description. If nothing names the target, the words of the
    question are compared instead. Let A and B be the two sets of words without stop words:

        score = 1 + 9 |A & B| / min(|A|, |B|), rounded half up;    1 if a set is empty.

        "the red cup" and "red cup on the left" -> 10, "the red cup" and "red apple" -> 6
    """

    name = "shared words (offline, comparable with no other judge)"
    workers = 1

    def score(self, question: JudgeQuestion) -> list[int]:
        """Return a score from 1 to 10 for each target."""
        markers = [match.span() for match in re.finditer(re.escape(MARKER), question.raw_answer)]
        naming_words: list[set[str]] = [set() for _ in question.descriptions]
        for target, (begin, end) in zip(
            question.marker_targets, find_phrases(question.raw_answer, markers), strict=True
        ):
            if target is not None:
                naming_words[target] |= _words(question.raw_answer[begin:end])
        question_words = _words(question.question)
        return [
            _score(words or question_words, _words(description))
            for words, description in zip(naming_words, question.descriptions, strict=True)
        ]

    def describe(self) -> dict[str, object]:
        """Return the judge's settings, to be recorded in the report."""
        return {"kind": "words"}

    def counts(self) -> Mapping[str, int]:
        """Return an empty mapping, because no requests are sent."""
        return {}


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.replace(MARKER, " ").casefold())) - _STOP_WORDS


def _score(a: set[str], b: set[str]) -> int:
    size = min(len(a), len(b))
    # Round half up, in integers.
    return 1 + ((18 * len(a & b) + size) // (2 * size) if size else 0)
