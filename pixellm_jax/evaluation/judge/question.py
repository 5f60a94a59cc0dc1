"""What a judge reads of a question: words alone, each mask replaced by what it truly shows."""

from __future__ import annotations

from typing import NamedTuple

from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.text.answer import MARKER

NOTHING = "<nothing>"
"""Stands in the answer for a predicted mask that matches no true one."""


class NotJudgedError(Exception):
    """A question that got no scores; the message says why. Other questions may get theirs."""


class JudgeDownError(Exception):
    """The judge cannot go on with any question; the message says why and what to do."""


class JudgeQuestion(NamedTuple):
    """A question in words, with the targets to be scored.

    answer: with `<target N: description>` for each mask that matches a true one, N from 1 in the
        order of the answer, and `NOTHING` for the others.
    written: the answer as the model wrote it. owners: for each of its `[SEG]` the place in
        `descriptions` of its target, None for an unmatched one.
    descriptions: what the target numbers stand for. truths: indices of their true masks.
    """

    question: str
    answer: str
    written: str
    owners: tuple[int | None, ...]
    descriptions: tuple[str, ...]
    truths: tuple[int, ...]


def put_in_words(record: QuestionRecord) -> JudgeQuestion | None:
    """The question as a judge reads it, None where no prediction matches a true mask.

        answer "It is [SEG] on [SEG].", the second matches "a table", the first nothing
        ->  "It is <nothing> on <target 1: a table>."

    Where the predictions were united into one mask, each `[SEG]` stands for it.

    Raises:
        NotJudgedError: no descriptions, or other `[SEG]` in the answer than predicted masks.
    """
    owner = {p: t for p, t, _, _ in record.pairs if p is not None and t is not None}
    if not owner:
        return None
    if not record.descriptions:
        raise NotJudgedError("the benchmark has no descriptions of its true masks")
    pieces, masks = record.answer.split(MARKER), len(record.predicted)
    markers = len(pieces) - 1
    if markers < 1 or (markers != masks and masks != 1):
        raise NotJudgedError(f"the answer has {markers} {MARKER} for {masks} predicted masks")
    places = [owner.get(number if masks > 1 else 0) for number in range(markers)]
    truths = tuple(dict.fromkeys(truth for truth in places if truth is not None))
    owners = tuple(None if truth is None else truths.index(truth) for truth in places)
    descriptions = tuple(record.descriptions[truth] for truth in truths)
    text = pieces[0]
    for place, piece in zip(owners, pieces[1:], strict=True):
        text += NOTHING if place is None else f"<target {place + 1}: {descriptions[place]}>"
        text += piece
    return JudgeQuestion(record.question, text, record.answer, owners, descriptions, truths)
