"""Score answers with a judge, so that a matched mask counts only where the words name it, too.

This is the protocol of the paper for MUSE: the mask of a predicted target may be right by chance. A
judge therefore reads the answer with each mask replaced by the description of the true mask it was
matched with, and scores each target from 1 to 10. A target below a threshold counts with
intersection 0 (paper, evaluation on MUSE; docs/reference_notes.md 5.6).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from pixellm_jax.evaluation.judge.prompt import (
    JudgeDownError,
    JudgeQuestion,
    NotJudgedError,
    make_question,
)
from pixellm_jax.evaluation.record import QuestionRecord

THRESHOLD = 4
"""Lowest score that counts: a target below it has intersection 0."""

MIN_SCORE = 1
MAX_SCORE = 10

MAX_CONSECUTIVE_FAILURES = 20
"""Failures in a row after which the judge is considered down and no more questions are sent."""

_Item = tuple[int, JudgeQuestion]  # index of the record; its question
_Outcome = list[int] | NotJudgedError | JudgeDownError


@runtime_checkable
class Judge(Protocol):
    """Scores the targets of questions, called from `workers` threads.

    `WordJudge` (offline) and `ServerJudge` (a language model) implement it.
    """

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> int: ...

    def score(self, question: JudgeQuestion) -> list[int]: ...

    def describe(self) -> dict[str, object]: ...

    def counts(self) -> Mapping[str, int]: ...


class Judged(NamedTuple):
    """Records with their scores, and the questions without.

    records: all records in the given order; `judge` is None in those that failed.
    failures: id of a question -> reason why it has no scores.
    stopped: reason why the remaining questions were not sent; None if all were.
    """

    records: list[QuestionRecord]
    failures: dict[str, str]
    stopped: str | None


def judge_records(
    records: Sequence[QuestionRecord], judge: Judge, *, advance: Callable[[], object] = lambda: None
) -> Judged:
    """Score the targets of all questions.

    A question without a matched target has nothing to judge: its scores are None and final.

    Args:
        records: the answered questions.
        judge: the judge; its `workers` questions are scored concurrently.
        advance: called after each question, for a progress bar.
    """
    scored: dict[int, QuestionRecord] = {}
    failures: dict[str, str] = {}
    items = list[_Item]()
    for number, record in enumerate(records):
        try:
            question = make_question(record)
        except NotJudgedError as failure:
            failures[record.id] = str(failure)
            advance()
            continue
        if question is None:
            scored[number] = _with_scores(record, judge.name, {})
            advance()
        else:
            items.append((number, question))
    stopped = None
    failures_in_a_row = 0
    with contextlib.closing(_score_all(judge, items)) as outcomes:
        for (number, question), outcome in outcomes:
            record = records[number]
            advance()
            if isinstance(outcome, JudgeDownError):
                stopped = str(outcome)
            elif isinstance(outcome, NotJudgedError):
                failures[record.id] = str(outcome)
                failures_in_a_row += 1
                if failures_in_a_row == MAX_CONSECUTIVE_FAILURES:
                    stopped = f"{failures_in_a_row} questions failed in a row, the last: {outcome}"
            else:
                failures_in_a_row = 0
                scores = dict(zip(question.truths, outcome, strict=True))
                scored[number] = _with_scores(record, judge.name, scores)
            if stopped is not None:
                break
    if stopped is not None:
        for number, _ in items:
            if number not in scored:
                failures.setdefault(records[number].id, f"not sent: {stopped}")
    done = [scored.get(n, record._replace(judge=None)) for n, record in enumerate(records)]
    return Judged(done, failures, stopped)


def apply_judge(record: QuestionRecord, threshold: int) -> QuestionRecord:
    """Set the intersection of each matched target whose score is below the threshold to 0.

    The union remains, so that the target is still one mask with IoU 0. The result is meant for gIoU
    and cIoU only: whether a mask was found at all (t_acc, n_acc) does not depend on words.

    Raises:
        ValueError: the record was not judged, or a matched target has no score.
    """
    if record.judge is None:
        raise ValueError(f"{record.id} was not judged")
    scores = record.judge["scores"]
    pairs = []
    for predicted, truth, intersection, union in record.pairs:
        if predicted is not None and truth is not None:
            if scores[truth] is None:
                raise ValueError(f"{record.id}: matched target {truth} has no score")
            if scores[truth] < threshold:
                # Two empty masks would agree with IoU 1; an extra prediction has IoU 0.
                truth = truth if union else None
                intersection = 0
        pairs.append((predicted, truth, intersection, union))
    return record._replace(pairs=tuple(pairs))


def target_scores(records: Iterable[QuestionRecord]) -> list[int]:
    """Return the scores of all judged targets."""
    return [
        score
        for record in records
        if record.judge is not None
        for score in record.judge["scores"]
        if score is not None
    ]


def _with_scores(record: QuestionRecord, name: str, scores: Mapping[int, int]) -> QuestionRecord:
    if not all(type(s) is int and MIN_SCORE <= s <= MAX_SCORE for s in scores.values()):
        raise ValueError(f"{record.id}: the judge's scores {scores} are not all from 1 to 10")
    row = [scores.get(truth) for truth in range(len(record.truth))]
    return record._replace(judge={"judge": name, "scores": row})


def _score_all(
    judge: Judge, items: Sequence[_Item]
) -> Generator[tuple[_Item, _Outcome], None, None]:
    """Score questions concurrently and yield scores or failures in the order of completion.

    Closing the generator stops the threads after their current question. They are daemons: one that
    waits for a server does not delay the end of the program.
    """
    if judge.workers == 1:
        for item in items:
            yield item, _score(judge, item)
        return
    waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[_Item, object]] = queue.SimpleQueue()
    workers = min(judge.workers, len(items))

    def work() -> None:
        while (item := waiting.get()) is not None:
            try:
                done.put((item, _score(judge, item)))
            except BaseException as error:  # a bug in the judge: raised in the caller's thread
                done.put((item, error))

    for item in items[:workers]:
        waiting.put(item)
        threading.Thread(target=work, daemon=True).start()
    try:
        for number in range(len(items)):
            item, outcome = done.get()
            if isinstance(outcome, BaseException) and not isinstance(
                outcome, NotJudgedError | JudgeDownError
            ):
                raise outcome
            yield item, outcome  # type: ignore[misc]
            if number + workers < len(items):
                waiting.put(items[number + workers])
    finally:
        for _ in range(workers):
            waiting.put(None)


def _score(judge: Judge, item: _Item) -> _Outcome:
    try:
        return judge.score(item[1])
    except (NotJudgedError, JudgeDownError) as failure:
        return failure
