"""Run a benchmark: ask a model, score its masks, record every question, judge the answers.

    entries = list_images(benchmark, root, split)
    answer = load_answerer(Path("pixellm-7b"), mode=GENERATED)
    settings = RunSettings(benchmark="muse", split="val")
    evaluation = evaluate(entries, question_reader(benchmark, root, split), answer, out, settings)
    summarise(evaluation.records).giou

The images are split evenly over the hosts; sums are exact integers, so the scores are independent
of the number of hosts. An interrupted run resumes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from pixellm_jax.benchmark_question import GIVEN, BenchmarkQuestion
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.free_running import answer_free_running
from pixellm_jax.evaluation.judge.judge import THRESHOLD, Judge
from pixellm_jax.evaluation.judge.report import JudgeReport, Price, judge_folder
from pixellm_jax.evaluation.metrics import Sums, merge, merge_hosts
from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.evaluation.run_folder import RunFolder, RunSettings
from pixellm_jax.evaluation.scoring import Answered, make_record, make_released_line
from pixellm_jax.evaluation.summary import tally_record
from pixellm_jax.evaluation.teacher_forced import answer_teacher_forced
from pixellm_jax.inference.engine import Engine, EngineConfig
from pixellm_jax.inference.prepare import prepare_for_inference
from pixellm_jax.stopwatch import Stopwatch
from pixellm_jax.weights import checkpoint

Answerer = Callable[[Iterable[BenchmarkQuestion], Stopwatch, dict[str, str]], Iterator[Answered]]
"""Answers questions in any order.

It times its activity "io" with the stopwatch and adds unusable images, with the reason, to the
dictionary. `functools.partial(answer_free_running, engine, vocabulary)` is one.
"""

Reader = Callable[[Any], tuple[Sequence[BenchmarkQuestion], Sequence[str]]]
"""Reads the questions about the image of an entry, and the reasons why parts were left out."""


class Evaluation(NamedTuple):
    """Result of a benchmark run.

    records: all scored questions, sorted by id. judge: report of the judge, if there was one.
    """

    records: list[QuestionRecord]
    judge: JudgeReport | None


def evaluate(
    entries: Sequence[Any],
    read: Reader,
    answer: Answerer,
    out: Path,
    settings: RunSettings,
    *,
    judge: Judge | None = None,
    threshold: int = THRESHOLD,
    price: Price | None = None,
    host: int = 0,
    hosts: int = 1,
) -> Evaluation | None:
    """Run a benchmark, or resume it, and write its records to a folder.

    Args:
        entries: one entry per image, each with a `key`; the same on all hosts.
        read: reads the questions of an entry.
        answer: answers questions; it is not called if all of them are already scored.
        out: output folder (see `run_folder`), shared by all hosts.
        settings: settings of the run, which a resumed run must share.
        judge: scores the answers in words at the end of the run.
        threshold: lowest score of the judge that counts.
        price: prices of the judge's tokens.
        host: index of this process.
        hosts: number of processes, each of which calls this function.

    Returns:
        The result on the first host, None on the others.

    Raises:
        InputError: the folder belongs to another evaluation, cannot be written, or is not shared by
            the hosts; an input is damaged; or the judge cannot be reached.
    """
    folder = RunFolder(out, settings, host=host, hosts=hosts)
    sums = answer_share(entries, read, answer, folder)
    records = merge_shares(folder, sums)
    if records is None:
        return None
    report = None
    if judge is not None:
        report = judge_folder(out, judge, threshold, price=price)
    return Evaluation(records, report)


def load_answerer(
    folder: Path,
    *,
    mode: str,
    dtype: str | None = None,
    weights: str | None = None,
    max_batch: int = 32,
    max_new_tokens: int = 512,
) -> Answerer:
    """Return an answerer that loads a checkpoint when the first question arrives.

    Args:
        folder: the checkpoint.
        mode: `GENERATED` (free-running) or `GIVEN` (teacher-forced).
        dtype: compute dtype; by default the dtype of the checkpoint.
        weights: quantization of the language model's weights, "int8" or "int4"; free-running only.
        max_batch: questions (free-running) or images (teacher-forced) per batch.
        max_new_tokens: token budget of an answer; free-running only.
    """

    def answer(
        questions: Iterable[BenchmarkQuestion], watch: Stopwatch, left_out: dict[str, str]
    ) -> Iterator[Answered]:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        model = checkpoint.load_model(folder, dtype=dtype, sharding=sharding)
        vocabulary = checkpoint.read_vocabulary(folder, model.config)
        if mode == GIVEN:
            return answer_teacher_forced(
                model, vocabulary, questions, watch, left_out, max_batch=max_batch
            )
        config = EngineConfig(max_batch=max_batch, max_new_tokens=max_new_tokens)
        prepared = prepare_for_inference(model, weights=weights, consume=True)
        engine = Engine(prepared, vocabulary, config)
        return answer_free_running(engine, vocabulary, questions, watch, left_out)

    return answer


def answer_share(entries: Sequence[Any], read: Reader, answer: Answerer, folder: RunFolder) -> Sums:
    """Answer this host's questions that are not recorded yet, and record them.

    The host takes the images host, host + hosts, ... of `entries`. Arguments: see `evaluate`.

    Returns:
        The sums over the questions of this run.
    """
    settings = folder.settings
    make = functools.partial(make_record, given=settings.mode == GIVEN)
    make_released = functools.partial(make_released_line, given=settings.mode == GIVEN)
    watch = Stopwatch("matching", "io", rest="model")
    left_out: dict[str, str] = {}
    sums = list[Sums]()
    own_entries = entries[folder.host :: folder.hosts]
    try:
        with tqdm(total=len(own_entries), desc="evaluating", unit="image", disable=None) as bar:
            questions = _new_questions(own_entries, read, folder.completed, watch, left_out, bar)
            first = next(questions, None)
            if first is not None:
                answers = answer(itertools.chain([first], questions), watch, left_out)
                watch.restart()  # the time until here was spent on loading the model
                for answered in answers:
                    with watch("matching"):
                        record = make(answered)
                        line = make_released(answered) if settings.reference_compat else None
                        sums.append(tally_record(record))
                    with watch("io"):
                        folder.write(record, line)
                    bar.set_postfix(questions=len(sums), refresh=False)
    finally:
        folder.close(watch.read(), len(sums), left_out)
    return merge(*sums)


def merge_shares(folder: RunFolder, sums: Sums) -> list[QuestionRecord] | None:
    """Merge the records of all hosts on the first of them; every host must call it.

    Args:
        folder: this host's folder, closed.
        sums: this host's sums (`answer_share`).

    Returns:
        All records on the first host, None on the others.

    Raises:
        InputError: records of other hosts are missing.
    """
    total = merge_hosts(sums) if folder.hosts > 1 else sums  # waits for all hosts
    if folder.host:
        return None
    records = folder.merge()
    recorded = (tally_record(record) for record in records if record.id not in folder.completed)
    if merge(*recorded) != total:
        raise InputError(
            f"{folder.out}: questions of other hosts are missing; --out must be a folder that all "
            "hosts share"
        )
    return records


def _new_questions(
    entries: Sequence[Any],
    read: Reader,
    completed: set[str],
    watch: Stopwatch,
    left_out: dict[str, str],
    bar: tqdm,
) -> Iterator[BenchmarkQuestion]:
    """Yield the questions that are not recorded yet; add what was left out to `left_out`."""
    for entry in entries:
        with watch("io"):
            questions, problems = read(entry)
            if problems:
                left_out[entry.key] = "; ".join(problems)
        yield from (question for question in questions if question.id not in completed)
        bar.update()
