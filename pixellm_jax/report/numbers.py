"""Numbers of a report, from the records of an evaluation: scores, intervals, histograms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pixellm_jax.benchmark_question import GIVEN
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.bootstrap import Interval, Intervals, intervals
from pixellm_jax.evaluation.judge.judge import THRESHOLD, apply_judge
from pixellm_jax.evaluation.judge.report import JUDGE
from pixellm_jax.evaluation.metrics import IOU_UNIT
from pixellm_jax.evaluation.record import (
    QUESTIONS,
    SETTINGS,
    Pair,
    QuestionRecord,
    read_records,
)
from pixellm_jax.evaluation.run_folder import RUN
from pixellm_jax.evaluation.summary import (
    Summary,
    count_targets,
    group_records,
    summarise,
    tally_record,
)
from pixellm_jax.evaluation.text_scores import TextScorer, TextSummary, summarise_texts
from pixellm_jax.files import read_json, read_optional_json

BINS = 20
"""Number of equal bins of the IoU histogram, from 0 to 1."""

ALL = "all"
"""Name of the group of all questions."""

NO_JUDGE = "none"
"""Name of the judge where no answer was judged."""


class Run(NamedTuple):
    """A finished evaluation.

    Attributes:
        folder: where it was read from.
        settings: the contents of settings.json.
        records: its questions in the order of the file.
        work: time spent and images left out; empty if unknown.
        judging: settings of the judge; empty if unknown.
    """

    folder: Path
    settings: dict[str, Any]
    records: list[QuestionRecord]
    work: dict[str, Any]
    judging: dict[str, Any]

    @property
    def benchmark(self) -> str:
        """Benchmark and split: "muse/val"."""
        return f"{self.settings['benchmark']}/{self.settings['split']}"

    @property
    def mode(self) -> str:
        return str(self.settings["mode"])

    @property
    def judge(self) -> str:
        """Name of the judge; `NO_JUDGE` if no answer was judged."""
        names = sorted({record.judge["judge"] for record in self.records if record.judge})
        if len(names) > 1:
            raise InputError(
                f"{self.folder}: scores of several judges ({'; '.join(names)}); judge "
                "the whole run again with one of them"
            )
        return names[0] if names else NO_JUDGE

    @property
    def threshold(self) -> int:
        """Minimum score of the judge with which a target counts."""
        return int(self.judging.get("threshold", THRESHOLD))


class GroupScores(NamedTuple):
    """Scores of a group of questions.

    Attributes:
        name: the group; `ALL` for all questions.
        judge: name of the judge that decided which targets count, `NO_JUDGE` if masks alone did.
        summary: the scores.
        intervals: bootstrap intervals of the scores.
    """

    name: str
    judge: str
    summary: Summary
    intervals: Intervals


class Report(NamedTuple):
    """All numbers of a run.

    Attributes:
        run: the evaluation.
        scores: all questions, then each group; first by masks alone, then by the judge.
        unjudged: number of questions without scores of the judge; None if nothing was judged.
        iou: histogram of IoU in `BINS` bins, for matched, missed and extra masks.
        counts: number of questions by (true, written) number of targets; empty if answers were
            given.
        reasons: number of answers by the reason why they ended.
        text: scores of the words, if the benchmark asks for words alone.
    """

    run: Run
    scores: tuple[GroupScores, ...]
    unjudged: int | None
    iou: dict[str, list[int]]
    counts: dict[tuple[int, int], int]
    reasons: dict[str, int]
    text: TextSummary | None


def read_run(folder: Path) -> Run:
    """Read the folder that `pixellm evaluate --out` wrote.

    Raises:
        InputError: a file is missing or damaged, or holds no question.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a folder that `pixellm evaluate` wrote")
    settings = read_json(path)
    for key in ("benchmark", "split", "mode"):
        if not isinstance(settings.get(key), str):
            raise InputError(f"{path}: {key!r} is missing or not a string; evaluate again")
    records = read_records(folder / f"{QUESTIONS}.jsonl")
    if not records:
        raise InputError(f"{folder / QUESTIONS}.jsonl: no question in it; evaluate first")
    return Run(
        folder=folder,
        settings=settings,
        records=records,
        work=read_optional_json(folder / RUN),
        judging=read_optional_json(folder / JUDGE),
    )


def make_report(run: Run) -> Report:
    """Compute all numbers of a run.

    Raises:
        InputError: the benchmark asks for words alone, and the package that scores them is not
            installed.
    """
    scores = _score_groups(run.records, NO_JUDGE)
    unjudged = None
    if run.judge != NO_JUDGE:
        judged = [record for record in run.records if record.judge is not None]
        unjudged = len(run.records) - len(judged)
        scores += _score_groups(
            [apply_judge(record, run.threshold) for record in judged], run.judge
        )
    written = [record for record in run.records if record.reason != GIVEN]
    return Report(
        run=run,
        scores=tuple(scores),
        unjudged=unjudged,
        iou=_count_ious(run.records),
        counts=dict(sorted(Counter((len(r.truth), count_targets(r)) for r in written).items())),
        reasons=dict(Counter(record.reason for record in run.records).most_common()),
        text=_score_texts(run.records),
    )


def question_iou(record: QuestionRecord) -> float:
    """Return the mean IoU of a question as gIoU counts it; 1 for a correct empty answer."""
    sums = tally_record(record)
    return sums.iou / (sums.masks * IOU_UNIT) if sums.masks else 1.0


def pair_iou(pair: Pair) -> float:
    """Return the IoU of a pair; without any pixel it is 0 for an extra prediction and 1 else."""
    _, truth, intersection, union = pair
    return intersection / union if union else float(truth is not None)


def _score_groups(records: Sequence[QuestionRecord], judge: str) -> list[GroupScores]:
    if not records:
        return []
    groups = {ALL: list(records)} | group_records(records)
    return [_score_group(name, judge, members) for name, members in groups.items()]


def _score_group(name: str, judge: str, records: Sequence[QuestionRecord]) -> GroupScores:
    summary = summarise(records)
    bounds = intervals([tally_record(record) for record in records])
    if judge != NO_JUDGE:  # a judge decides which masks count; the other scores do not depend on it
        nan = math.nan
        undefined = Interval(nan, nan, nan, 0)
        summary = summary._replace(
            t_acc=nan, n_acc=nan, right_count=nan, empty_right=nan, same_text=nan
        )
        bounds = bounds._replace(t_acc=undefined, n_acc=undefined)
    return GroupScores(name, judge, summary, bounds)


def _score_texts(records: Sequence[QuestionRecord]) -> TextSummary | None:
    """Score answers in words; None for benchmarks with masks and for given answers."""
    pairs = [(r.expected, r.answer) for r in records if r.expected and r.reason != GIVEN]
    if not pairs or any(record.truth for record in records):
        return None
    return summarise_texts(TextScorer().score_all(pairs))


def _count_ious(records: Sequence[QuestionRecord]) -> dict[str, list[int]]:
    counts = {kind: [0] * BINS for kind in ("matched", "missed", "extra")}
    for pair in (pair for record in records for pair in record.pairs):
        kind = "extra" if pair[1] is None else "missed" if pair[0] is None else "matched"
        counts[kind][min(int(pair_iou(pair) * BINS), BINS - 1)] += 1
    return counts
