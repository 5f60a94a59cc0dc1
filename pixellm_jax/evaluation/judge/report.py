"""Judge a finished evaluation: scores go into its records, a summary into `judge.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from pixellm_jax.benchmark_question import GENERATED, GIVEN
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.judge.judge import (
    MAX_SCORE,
    MIN_SCORE,
    THRESHOLD,
    Judge,
    Judged,
    apply_judge,
    judge_records,
    target_scores,
)
from pixellm_jax.evaluation.record import (
    QUESTIONS,
    SETTINGS,
    QuestionRecord,
    read_records,
)
from pixellm_jax.evaluation.summary import group_records, summarise
from pixellm_jax.files import read_json, write_whole

JUDGE = "judge.json"
CACHE = "judge_cache"
ALL = "all"


class JudgedScores(NamedTuple):
    """Scores of judged questions; NaN where the denominator is zero.

    questions: number of questions. masks: true masks and extra predictions.
    giou, ciou: by masks alone, of the same questions.
    judged_giou, judged_ciou: with intersection 0 where the judge's score is below the threshold.
    score: mean score of the matched targets.
    rejected: share of the matched targets whose score is below the threshold.
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
    """Price of a million prompt tokens and of a million completion tokens, in any currency."""

    tokens_in: float
    tokens_out: float

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


class JudgeReport(NamedTuple):
    """Contents of `judge.json`.

    judge: name of the judge. threshold: lowest score that counts.
    settings: see `Judge.describe`.
    questions: number of all questions. judged: number of questions in `scores`.
    failures: id of a question -> reason why it has no scores; none of them is in `scores`.
    stopped: reason why the judge stopped early, else None.
    scores: by name of the group of questions; `ALL` for all of them.
    counts: see `client.ServerJudge.counts`.
    cost: cost of this run ("run") and of all scores ("scores"); None without prices, or where a
        reply did not report its tokens.
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
        """Return the value for `json.dumps`; NaN becomes null."""
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
    threshold: int = THRESHOLD,
    *,
    price: Price | None = None,
    start: Callable[[int], Callable[[], object]] | None = None,
) -> JudgeReport:
    """Judge all answers of a finished evaluation.

    Scores go into the records of `questions.jsonl`, which is replaced atomically, and a summary
    into `judge.json`. Earlier scores, possibly of another judge, are replaced; if the judge stops
    before its first score, nothing is. Call it again to retry failed questions: the replies of a
    server are cached.

    Args:
        folder: the output folder of the evaluation.
        judge: `offline.WordJudge` or `client.ServerJudge`.
        threshold: lowest score that counts, 1 to 10.
        price: prices of the tokens, to compute the cost.
        start: receives the number of questions and returns a function to call after each of them.
            By default a progress bar on standard error, if that is a terminal.

    Raises:
        InputError: there is nothing to judge, or a file cannot be read or written.
    """
    if not MIN_SCORE <= threshold <= MAX_SCORE:
        raise InputError(f"threshold {threshold}: expected a score from {MIN_SCORE} to {MAX_SCORE}")
    path = folder / f"{QUESTIONS}.jsonl"
    stamp = _stamp(path)
    records = read_records(path)
    _check(folder, records)
    with tqdm(desc="judging", unit="question", disable=None if start is None else True) as bar:
        bar.reset(len(records))
        advance = bar.update if start is None else start(len(records))
        judged = judge_records(records, judge, advance=advance)
    report = _report(judged, judge, threshold, price)
    if report.stopped is not None and not target_scores(judged.records):
        raise InputError(f"no answer was judged: {report.stopped}")
    if _stamp(path) != stamp:
        raise InputError(
            f"{path}: the file changed while it was judged; wait until the evaluation has ended, "
            "then run the command again"
        )
    _replace(path, "".join(f"{record.to_json()}\n" for record in judged.records))
    _replace(folder / JUDGE, json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n")
    return report


def check_complete(report: JudgeReport) -> None:
    """Raise `InputError` if a question has no score."""
    if not report.failures:
        return
    name, failure = next(iter(report.failures.items()))
    reason = report.stopped or f"the first is {name}: {failure}"
    raise InputError(
        f"{len(report.failures)} of {report.questions} questions have no score and are missing "
        f"from the numbers above; {reason}; run the same command again"
    )


def summarise_judged(records: Sequence[QuestionRecord], threshold: int) -> JudgedScores:
    """Summarise judged questions, all or any part of them."""
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
    counts = dict(judge.counts())
    cost = None
    if price is not None and not counts.get("without_tokens"):
        cost = {
            name: price.cost(counts.get(f"{kind}tokens_in", 0), counts.get(f"{kind}tokens_out", 0))
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
            f"{folder}: the answers were given to the model (mode {GIVEN}), so there is nothing to "
            f"judge; run the evaluation in mode {GENERATED}"
        )
    if not any(record.descriptions for record in records):
        raise InputError(
            f"{folder}: no question has descriptions of its true masks, which a judge reads in "
            "place of the masks; choose a benchmark that has them, such as MUSE"
        )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _replace(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
