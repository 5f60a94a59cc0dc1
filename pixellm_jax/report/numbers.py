"""The numbers of a report, made of what an evaluation left: scores, intervals, histograms."""

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
from pixellm_jax.evaluation.record import QUESTIONS, SETTINGS, QuestionRecord, read_records
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
"""Of IoU, from 0 to 1."""

ALL = "all"
"""Name of the part that is everything."""

NO_JUDGE = "none"


class Run(NamedTuple):
    """What an evaluation left: its settings, and its records in order.

    work: where the time went and what was left out. judging: how it was judged. Empty if unknown.
    """

    folder: Path
    settings: dict[str, Any]
    records: list[QuestionRecord]
    work: dict[str, Any]
    judging: dict[str, Any]

    @property
    def benchmark(self) -> str:
        """Benchmark and split."""
        return f"{self.settings['benchmark']}/{self.settings['split']}"

    @property
    def mode(self) -> str:
        return str(self.settings["mode"])

    @property
    def judge(self) -> str:
        """The judge's name; `NO_JUDGE` where nothing was judged."""
        names = sorted({record.judge["judge"] for record in self.records if record.judge})
        if len(names) > 1:
            raise InputError(
                f"{self.folder}: scores of several judges ({'; '.join(names)}); judge "
                "the whole run again by one of them"
            )
        return names[0] if names else NO_JUDGE

    @property
    def threshold(self) -> int:
        """The least score of the judge with which a target counts."""
        return int(self.judging.get("threshold", THRESHOLD))


class Part(NamedTuple):
    """Scores of some questions. judge: what decided which targets count, `NO_JUDGE` if nothing."""

    name: str
    judge: str
    summary: Summary
    intervals: Intervals


class Report(NamedTuple):
    """All numbers of a run.

    parts: everything, then its groups; judged ones after those that masks alone decide. unjudged:
    questions that have no judge's scores, None where nothing was judged. iou: masks in each of
    `BINS` bins, for matched, missed and extra ones. counts: questions by (true, written) number of
    targets, empty where the answers were given. reasons: why answers ended. text: scores of the
    words, where nothing but words is asked for.
    """

    run: Run
    parts: tuple[Part, ...]
    unjudged: int | None
    iou: dict[str, list[int]]
    counts: dict[tuple[int, int], int]
    reasons: dict[str, int]
    text: TextSummary | None


def read_run(folder: Path) -> Run:
    """The run in a folder that `pixellm evaluate --out` wrote.

    Raises:
        InputError: a file is missing or damaged, or there is no question in it.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a folder that `pixellm evaluate` wrote")
    settings = read_json(path)
    for key in ("benchmark", "split", "mode"):
        if not isinstance(settings.get(key), str):
            raise InputError(f"{path}: {key!r} is not there as text; evaluate again")
    records = read_records(folder / f"{QUESTIONS}.jsonl")
    if not records:
        raise InputError(f"{folder / QUESTIONS}.jsonl: no question in it; evaluate first")
    work, judging = (read_optional_json(folder / name) for name in (RUN, JUDGE))
    return Run(folder, settings, records, work, judging)


def make_report(run: Run) -> Report:
    """Counts everything.

    Raises:
        InputError: words alone were asked for, and the package that scores them is not there.
    """
    parts = _parts(run.records, NO_JUDGE)
    unjudged = None
    if run.judge != NO_JUDGE:
        judged = [record for record in run.records if record.judge is not None]
        unjudged = len(run.records) - len(judged)
        parts += _parts([apply_judge(record, run.threshold) for record in judged], run.judge)
    written = [record for record in run.records if record.reason != GIVEN]
    return Report(
        run=run,
        parts=tuple(parts),
        unjudged=unjudged,
        iou=_count_ious(run.records),
        counts=dict(sorted(Counter((len(r.truth), count_targets(r)) for r in written).items())),
        reasons=dict(Counter(record.reason for record in run.records).most_common()),
        text=_score_words(run.records),
    )


def question_iou(record: QuestionRecord) -> float:
    """Mean IoU of the masks of a question, as gIoU takes it; 1 where rightly there is none."""
    sums = tally_record(record)
    return sums.iou / (sums.masks * IOU_UNIT) if sums.masks else 1.0


def pair_iou(pair: tuple[int | None, int | None, int, int]) -> float:
    """IoU of a pair; without any pixel it is 1, but 0 of an extra prediction."""
    _, truth, intersection, union = pair
    return intersection / union if union else float(truth is not None)


def _parts(records: Sequence[QuestionRecord], judge: str) -> list[Part]:
    if not records:
        return []
    groups = {ALL: list(records)} | group_records(records)
    return [_part(name, judge, rows) for name, rows in groups.items()]


def _part(name: str, judge: str, records: Sequence[QuestionRecord]) -> Part:
    summary, found = summarise(records), intervals([tally_record(record) for record in records])
    if judge != NO_JUDGE:  # it decides which masks count, and nothing else
        nan = math.nan
        summary = summary._replace(
            t_acc=nan, n_acc=nan, right_count=nan, empty_right=nan, same_text=nan
        )
        found = found._replace(t_acc=Interval(nan, nan, nan, 0), n_acc=Interval(nan, nan, nan, 0))
    return Part(name, judge, summary, found)


def _score_words(records: Sequence[QuestionRecord]) -> TextSummary | None:
    pairs = [(r.expected, r.answer) for r in records if r.expected and r.reason != GIVEN]
    if not pairs or any(record.truth for record in records):
        return None
    return summarise_texts(TextScorer().score_all(pairs))


def _count_ious(records: Sequence[QuestionRecord]) -> dict[str, list[int]]:
    found = {kind: [0] * BINS for kind in ("matched", "missed", "extra")}
    for pair in (pair for record in records for pair in record.pairs):
        kind = "extra" if pair[1] is None else "missed" if pair[0] is None else "matched"
        found[kind][min(int(pair_iou(pair) * BINS), BINS - 1)] += 1
    return found
