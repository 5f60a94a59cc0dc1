"""A judge without a network: how many words do a target's name and its description share?

It is for tests and for work offline. It knows no synonyms, so that its numbers are comparable with
no other judge's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pixellm_jax.evaluation.judge.question import JudgeQuestion
from pixellm_jax.text.answer import MARKER, find_phrases

_WORD = re.compile(r"[^\W_]+")
_EMPTY = frozenset(
    _WORD.findall(
        "a an and are as at be been being by can could do does for from had has have he her here "
        "him his i image in is it its me of on one or photo picture please s segment segmentation "
        "she so that the their them there these they this those to was were what where which who "
        "whose will with would you"
    )
)


class WordJudge:
    """The judge. Deterministic; asks nobody.

    The words that name a target in the answer (`answer.find_phrases`), or those of the question
    where nothing names it, are compared with the true description. Words that say nothing, such as
    "the" and "which", do not count. With A and B the two sets of words,

        score = 1 + round(9 |A & B| / min(|A|, |B|)),    and 1 where a set is empty.

        "the red cup" and "red cup on the left" -> 10, "the red cup" and "red apple" -> 6
    """

    name = "shared words (offline, comparable with no other judge)"
    workers = 1

    def score(self, question: JudgeQuestion) -> list[int]:
        """A score from 1 to 10 for each target."""
        markers = [match.span() for match in re.finditer(re.escape(MARKER), question.written)]
        names: list[set[str]] = [set() for _ in question.descriptions]
        for place, (begin, end) in zip(
            question.owners, find_phrases(question.written, markers), strict=True
        ):
            if place is not None:
                names[place] |= _words(question.written[begin:end])
        asked = _words(question.question)
        return [
            _score(name or asked, _words(description))
            for name, description in zip(names, question.descriptions, strict=True)
        ]

    def describe(self) -> dict[str, object]:
        """What a report says about the judge."""
        return {"kind": "words"}

    def counts(self) -> Mapping[str, int]:
        """Nothing was sent."""
        return {}


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.replace(MARKER, " ").casefold())) - _EMPTY


def _score(first: set[str], second: set[str]) -> int:
    smaller = min(len(first), len(second))
    # Halves are rounded up, in integers.
    return 1 + ((18 * len(first & second) + smaller) // (2 * smaller) if smaller else 0)
