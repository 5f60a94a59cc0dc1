"""Scores where the model writes its answers itself, codebook tokens included (mode `generated`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from pixellm_jax.answer import read_answer
from pixellm_jax.engine import Engine
from pixellm_jax.geometry import fit, unfit
from pixellm_jax.matching import tally_question
from pixellm_jax.metrics import Sums, merge, scores
from pixellm_jax.prompt import TEMPLATES, question_ids
from pixellm_jax.question import Question, Result
from pixellm_jax.vocabulary import Vocabulary


class Asked(NamedTuple):
    """A question with its true masks, at the size of its picture (void pixels 255).

    kind: groups questions in a report. answer: the true text, with `[SEG]` at every target.
    """

    image: UInt8[np.ndarray, "y x 3"]
    question: str
    truth: UInt8[np.ndarray, "j y x"]
    kind: str = ""
    answer: str = ""


class Scored(NamedTuple):
    """What became of a question. `targets`: how many the answer has; `text`: with `[SEG]`s."""

    kind: str
    sums: Sums
    wanted: int
    targets: int
    text: str
    same_text: bool


class Summary(NamedTuple):
    """Scores over questions; shares are NaN where there is nothing to divide by.

    giou, ciou: over the true masks and the extra predictions of all questions, matched question by
    question (`matching`). right_count: share of answers with the right number of targets.
    empty_right: share of questions without a target that got none. same_text: share of answers that
    are the true one word for word.
    """

    questions: int
    masks: int
    giou: float
    ciou: float
    right_count: float
    empty_right: float
    same_text: float


def score_answers(
    engine: Engine, vocabulary: Vocabulary, asked: Iterable[Asked]
) -> Iterator[Scored]:
    """Asks everything and scores each answer at the size of its picture, as answers come."""
    config = engine.model.config
    template = TEMPLATES[config.template]
    waiting: dict[int, Asked] = {}

    def questions() -> Iterator[Question]:
        for number, item in enumerate(asked):
            waiting[number] = item
            canvas, hw = fit(item.image, config.vision.canvas)
            ids = question_ids(
                vocabulary, template, item.question, image_tokens=config.image_tokens
            )
            yield Question(ids, canvas, hw)

    for number, result in engine.answer(questions()):
        yield _score(waiting.pop(number), result, vocabulary, config.vision.canvas)


def summarise(scored: Iterable[Scored]) -> Summary:
    """The scores of any part of the questions."""
    rows = list(scored)
    found = scores(merge(*(row.sums for row in rows)))
    empty = [row.targets == 0 for row in rows if row.wanted == 0]
    return Summary(
        questions=len(rows),
        masks=sum(row.sums.masks for row in rows),
        giou=found.giou,
        ciou=found.ciou,
        right_count=_share(row.targets == row.wanted for row in rows),
        empty_right=_share(empty),
        same_text=_share(row.same_text for row in rows),
    )


def _score(item: Asked, result: Result, vocabulary: Vocabulary, canvas: int) -> Scored:
    logits = unfit(result.targets.mask_logits, item.image.shape[:2], canvas)
    text = read_answer(vocabulary, np.asarray(result.tokens)).text
    return Scored(
        kind=item.kind,
        sums=tally_question(logits, item.truth),
        wanted=len(item.truth),
        targets=len(logits),
        text=text,
        same_text=_plain(text) == _plain(item.answer),
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")
