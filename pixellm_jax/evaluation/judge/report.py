"""Judges the answers of an evaluation: scores go into its records, a summary beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.judge.judge import (
    HIGHEST,
    LOWEST,
    Judge,
    Judged,
    apply_judge,
    judge_records,
    target_scores,
)
from pixellm_jax.evaluation.record import GIVEN, QUESTIONS, SETTINGS, QuestionRecord, read_records
from pixellm_jax.evaluation.summary import group_records, summarise
from pixellm_jax.files import read_json, write_whole

JUDGE = "judge.json"
CACHE = "judge_cache"
ALL = "all"


class JudgedScores(NamedTuple):
    """Scores of questions that were judged; NaN where there is nothing to divide by.

    masks: true masks and extra predictions. giou, ciou: by masks alone, of these very questions.
    judged_giou, judged_ciou: with intersection 0 where the judge's score is below the threshold.
    score: mean score of the matched targets. rejected: their share below the threshold.
    """

    questions: int
    masks: int
    giou: float
    ciou: float
    judged_giou: float
    judged_ciou: float
    score: float
    rejected: float


class Price(NamedTuple):
    """What a million tokens costs, in the currency of the bill."""

    tokens_in: float
    tokens_out: float

    def of(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


class JudgeReport(NamedTuple):
    """What `judge.json` holds. scores: of "all" and of each group; `failures` are in none.

    judged: questions in `scores`. counts: see `judge_server.ServerJudge.counts`. cost: of this run
    and of all the scores; None without prices, or where a reply did not say its tokens.
    """

    judge: str
    threshold: int
    settings: dict[str, object]
    questions: int
    judged: int
    failures: dict[str, str]
    stopped: str | None
    scores: dict[str, JudgedScores]
    counts: dict[str, int]
    cost: dict[str, float] | None

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`; NaN is null."""
        scores = {
            name: {
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in part._asdict().items()
            }
            for name, part in self.scores.items()
        }
        return self._asdict() | {"scores": scores}


def judge_folder(
    folder: Path,
    judge: Judge,
    threshold: int,
    *,
    price: Price | None = None,
    start: Callable[[int], Callable[[], object]] = lambda questions: lambda: None,
) -> JudgeReport:
    """Judges all answers of a finished evaluation.

    Scores go into the records of `questions.jsonl`, which is replaced as a whole, and a summary
    into `judge.json`. Earlier scores, of another judge perhaps, are replaced; where the judge stops
    before its first score, nothing is. To ask again for what failed, call it again: what a server
    replied is in its cache. `start`: gets the number of questions, returns what to call after each.

    Raises:
        InputError: there is nothing that a judge could read, or a file cannot be read or written.
    """
    if not LOWEST <= threshold <= HIGHEST:
        raise InputError(
            f"threshold {threshold}: expected {LOWEST} to {HIGHEST}, the scores' range"
        )
    path = folder / f"{QUESTIONS}.jsonl"
    before = _stamp(path)
    records = read_records(path)
    _check(folder, records)
    judged = judge_records(records, judge, advance=start(len(records)))
    report = _report(judged, judge, threshold, price)
    if report.stopped is not None and not target_scores(judged.records):
        raise InputError(f"no answer was judged: {report.stopped}")
    if _stamp(path) != before:
        raise InputError(f"{path}: changed while it was judged; wait for its end, then run again")
    _replace(path, "".join(f"{record.to_json()}\n" for record in judged.records))
    _replace(folder / JUDGE, json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n")
    return report


def summarise_judged(records: Sequence[QuestionRecord], threshold: int) -> JudgedScores:
    """Scores of any part of the judged questions."""
    plain = summarise(records)
    judged = summarise([apply_judge(record, threshold) for record in records])
    scores = target_scores(records)
    return JudgedScores(
        questions=plain.questions,
        masks=plain.masks,
        giou=plain.giou,
        ciou=plain.ciou,
        judged_giou=judged.giou,
        judged_ciou=judged.ciou,
        score=sum(scores) / len(scores) if scores else math.nan,
        rejected=sum(s < threshold for s in scores) / len(scores) if scores else math.nan,
    )


def _report(judged: Judged, judge: Judge, threshold: int, price: Price | None) -> JudgeReport:
    done = [record for record in judged.records if record.judge is not None]
    parts = {ALL: done} | group_records(done)
    counts, cost = dict(judge.counts()), None
    if price is not None and not counts.get("without_tokens"):
        cost = {
            name: price.of(counts.get(f"{kind}tokens_in", 0), counts.get(f"{kind}tokens_out", 0))
            for name, kind in (("run", ""), ("scores", "scored_"))
        }
    return JudgeReport(
        judge=judge.name,
        threshold=threshold,
        settings=judge.describe(),
        questions=len(judged.records),
        judged=len(done),
        failures=judged.failures,
        stopped=judged.stopped,
        scores={name: summarise_judged(part, threshold) for name, part in parts.items()},
        counts=counts,
        cost=cost,
    )


def _check(folder: Path, records: Sequence[QuestionRecord]) -> None:
    if read_json(folder / SETTINGS).get("mode") == GIVEN:
        raise InputError(
            f"{folder}: its answers were given to the model (mode {GIVEN}), there is nothing of "
            "its own to judge; evaluate in mode generated"
        )
    if not any(record.descriptions for record in records):
        raise InputError(
            f"{folder}: no question has descriptions of its true masks, which a judge reads in "
            "their place; MUSE has them"
        )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _replace(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
