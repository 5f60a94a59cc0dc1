"""The judge of the MUSE protocol: a matched mask counts only where the words mean it, too.

The mask of a predicted target may be right by luck. A judge therefore reads the answer with each
mask replaced by the description of the true one it was matched with, and scores each target from 1
to 10. Below a threshold the target counts with intersection 0 (paper, evaluation on MUSE;
docs/reference_notes.md 5.6).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from pixellm_jax.evaluation.judge.question import (
    JudgeDownError,
    JudgeQuestion,
    NotJudgedError,
    put_in_words,
)
from pixellm_jax.evaluation.record import QuestionRecord

THRESHOLD = 4
"""A target with a lower score has intersection 0."""

LOWEST, HIGHEST = 1, 10

FAILURES_IN_A_ROW = 20
"""After so many the server is taken to be out of order, and the rest is not asked."""


@runtime_checkable
class Judge(Protocol):
    """Something that scores targets, in `workers` threads at a time."""

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> int: ...

    def score(self, question: JudgeQuestion) -> list[int]: ...

    def describe(self) -> dict[str, object]: ...

    def counts(self) -> Mapping[str, int]: ...


class Judged(NamedTuple):
    """Records with scores, and what is missing.

    records: all, in their order; `judge` is None in those that failed. failures: why, by the id of
        the question. stopped: why the judge did not ask the rest; None where it asked all.
    """

    records: list[QuestionRecord]
    failures: dict[str, str]
    stopped: str | None


def judge_records(
    records: Sequence[QuestionRecord], judge: Judge, *, advance: Callable[[], object] = lambda: None
) -> Judged:
    """Scores the targets of all questions; `advance` is called after each question.

    A question without a matched target has nothing to judge: its scores are None and final.
    """
    scored: dict[int, QuestionRecord] = {}
    failures: dict[str, str] = {}
    asked = list[tuple[int, JudgeQuestion]]()
    for number, record in enumerate(records):
        try:
            question = put_in_words(record)
        except NotJudgedError as failure:
            failures[record.id] = str(failure)
            advance()
            continue
        if question is None:
            scored[number] = _with_scores(record, judge.name, {})
            advance()
        else:
            asked.append((number, question))
    stopped, in_a_row = None, 0
    with contextlib.closing(_ask_all(judge, asked)) as answers:
        for (number, question), found in answers:
            record = records[number]
            advance()
            if isinstance(found, JudgeDownError):
                stopped = str(found)
            elif isinstance(found, NotJudgedError):
                failures[record.id] = str(found)
                in_a_row += 1
                if in_a_row == FAILURES_IN_A_ROW:
                    stopped = f"{in_a_row} questions failed in a row, the last with: {found}"
            else:
                in_a_row = 0
                scores = dict(zip(question.truths, found, strict=True))
                scored[number] = _with_scores(record, judge.name, scores)
            if stopped is not None:
                break
    for number, _ in asked if stopped is not None else ():
        if number not in scored:
            failures.setdefault(records[number].id, f"not asked: {stopped}")
    done = [scored.get(n, record._replace(judge=None)) for n, record in enumerate(records)]
    return Judged(done, failures, stopped)


def apply_judge(record: QuestionRecord, threshold: int) -> QuestionRecord:
    """The record with intersection 0 for each matched target whose score is below the threshold.

    Its union stays, so that it is still one mask with IoU 0 in gIoU and cIoU. For gIoU and cIoU
    alone: whether a mask was found at all (t_acc, n_acc) is no matter of words.

    Raises:
        ValueError: the record was not judged, or a matched target has no score.
    """
    if record.judge is None:
        raise ValueError(f"{record.id} was not judged")
    scores, pairs = record.judge["scores"], []
    for predicted, truth, intersection, union in record.pairs:
        if predicted is not None and truth is not None:
            if scores[truth] is None:
                raise ValueError(f"{record.id}: target {truth} was matched and has no score")
            if scores[truth] < threshold:
                # Two masks without a pixel would agree: as an extra prediction they do not.
                truth, intersection = truth if union else None, 0
        pairs.append((predicted, truth, intersection, union))
    return record._replace(pairs=tuple(pairs))


def target_scores(records: Iterable[QuestionRecord]) -> list[int]:
    """All scores of judged targets."""
    return [
        score
        for record in records
        if record.judge is not None
        for score in record.judge["scores"]
        if score is not None
    ]


def _with_scores(record: QuestionRecord, name: str, scores: Mapping[int, int]) -> QuestionRecord:
    if not all(type(s) is int and LOWEST <= s <= HIGHEST for s in scores.values()):
        raise ValueError(f"{record.id}: the judge's scores {scores} are not all from 1 to 10")
    row = [scores.get(truth) for truth in range(len(record.truth))]
    return record._replace(judge={"judge": name, "scores": row})


_Item = tuple[int, JudgeQuestion]


def _ask_all(
    judge: Judge, asked: Sequence[_Item]
) -> Generator[tuple[_Item, list[int] | NotJudgedError | JudgeDownError], None, None]:
    """Scores or what went wrong, as they come.

    The threads ask nothing more once it is closed; one that waits for a server then does not hold
    up the end of the program.
    """
    if judge.workers == 1:
        for item in asked:
            yield item, _ask(judge, item)
        return
    waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[_Item, object]] = queue.SimpleQueue()
    workers = min(judge.workers, len(asked))

    def work() -> None:
        while (item := waiting.get()) is not None:
            try:
                done.put((item, _ask(judge, item)))
            except BaseException as error:  # not the server's fault: the caller's thread raises it
                done.put((item, error))

    for item in asked[:workers]:
        waiting.put(item)
        threading.Thread(target=work, daemon=True).start()
    try:
        for place in range(len(asked)):
            item, found = done.get()
            if isinstance(found, BaseException) and not isinstance(
                found, NotJudgedError | JudgeDownError
            ):
                raise found
            yield item, found  # type: ignore[misc]
            if place + workers < len(asked):
                waiting.put(asked[place + workers])
    finally:
        for _ in range(workers):
            waiting.put(None)


def _ask(judge: Judge, item: _Item) -> list[int] | NotJudgedError | JudgeDownError:
    try:
        return judge.score(item[1])
    except (NotJudgedError, JudgeDownError) as reason:
        return reason
