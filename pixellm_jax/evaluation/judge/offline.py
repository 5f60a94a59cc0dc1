"""Offline judge: scores the words that a target's name shares with the true description.

It serves tests and work without a network. It knows no synonyms, so its scores cannot be compared
with any other judge's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pixellm_jax.evaluation.judge.prompt import JudgeQuestion
from pixellm_jax.text.answer import MARKER, find_phrases

_WORD = re.compile(r"[^\W_]+")
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

    The words that name a target in the answer (`answer.find_phrases`), or the words of the question
    where nothing names it, are compared with the true description. Stop words such as "the" and
    "which" do not count. With A and B the two sets of words,

        score = 1 + round(9 |A & B| / min(|A|, |B|)),    and 1 where a set is empty.

        "the red cup" and "red cup on the left" -> 10, "the red cup" and "red apple" -> 6
    """

    name = "shared words (offline, comparable with no other judge)"
    workers = 1

    def score(self, question: JudgeQuestion) -> list[int]:
        """Return a score from 1 to 10 for each target."""
        markers = [match.span() for match in re.finditer(re.escape(MARKER), question.raw_answer)]
        names: list[set[str]] = [set() for _ in question.descriptions]
        for target, (begin, end) in zip(
            question.marker_targets, find_phrases(question.raw_answer, markers), strict=True
        ):
            if target is not None:
                names[target] |= _words(question.raw_answer[begin:end])
        question_words = _words(question.question)
        return [
            _score(name or question_words, _words(description))
            for name, description in zip(names, question.descriptions, strict=True)
        ]

    def describe(self) -> dict[str, object]:
        """Return the settings for a report."""
        return {"kind": "words"}

    def counts(self) -> Mapping[str, int]:
        """Return no counts: nothing is sent."""
        return {}


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.replace(MARKER, " ").casefold())) - _STOP_WORDS


def _score(first: set[str], second: set[str]) -> int:
    smaller = min(len(first), len(second))
    # Round half up, in integers.
    return 1 + ((18 * len(first & second) + smaller) // (2 * smaller) if smaller else 0)
