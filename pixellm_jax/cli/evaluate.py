"""`pixellm evaluate`: asks a model the questions of a benchmark and scores text and masks."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from data_pipeline.benchmarks import (
    BENCHMARKS,
    Benchmark,
    find_benchmark,
    list_images,
    read_questions,
)
from data_pipeline.errors import DamagedError
from pixellm_jax import __version__
from pixellm_jax.benchmark_question import GENERATED, GIVEN, BenchmarkQuestion
from pixellm_jax.cli.console import format_table
from pixellm_jax.cli.judge_options import (
    add_judge_options,
    make_judge,
    names_judge,
    print_judge_report,
    token_price,
)
from pixellm_jax.cli.options import add_distributed_option, initialize_distributed
from pixellm_jax.config import DTYPES
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.free_running import answer_generated
from pixellm_jax.evaluation.judge.report import check_complete, judge_folder
from pixellm_jax.evaluation.metrics import Sums, merge, merge_hosts
from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.evaluation.run_folder import QuestionLog
from pixellm_jax.evaluation.scoring import Answered, make_record, make_released_line
from pixellm_jax.evaluation.settings import describe_model
from pixellm_jax.evaluation.summary import Summary, group_records, summarise, tally_record
from pixellm_jax.evaluation.teacher_forced import answer_given
from pixellm_jax.evaluation.text_scores import TextScorer
from pixellm_jax.experiments.question_images import image_reader
from pixellm_jax.files import read_json
from pixellm_jax.inference.engine import Engine, EngineConfig
from pixellm_jax.inference.prepare import WEIGHTS, prepare_for_inference
from pixellm_jax.report.page import JSON, PAGE, write_report
from pixellm_jax.stopwatch import Stopwatch
from pixellm_jax.weights import checkpoint

EXAMPLES = """examples:
  pixellm evaluate --checkpoint runs/shapes/model --benchmark shapes --out report
  pixellm evaluate --checkpoint pixellm-7b --benchmark muse/test_many --data dataset --out many
  pixellm evaluate --checkpoint pixellm-7b --benchmark muse --data dataset --out muse \\
      --judge-url http://localhost:8000/v1 --judge-model NAME
  pixellm evaluate --checkpoint pixellm-7b --benchmark refcoco/testA --data dataset --out testA \\
      --mode given

In mode "generated" the model writes its answers, codebook tokens included. In mode "given" the
tokens stand in the prompt, as they did for the referring numbers of the paper: masks alone count.
Numbers of the two modes cannot be compared. The same command goes on where it was stopped.
"""


Ask = Callable[[Iterable[BenchmarkQuestion], Stopwatch, dict[str, str]], Iterator[Answered]]
"""Answers questions in any order, and tells of pictures that cannot be used."""


class Share(NamedTuple):
    """What one of `hosts` evaluates: pictures number host, host + hosts, ... of `entries`."""

    benchmark: Benchmark
    split: str
    root: Path
    entries: Sequence[Any]
    host: int = 0
    hosts: int = 1

    @property
    def own(self) -> Sequence[Any]:
        return self.entries[self.host :: self.hosts]


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="score a model on a benchmark",
        description="Asks a model the questions of a benchmark and compares its masks with the "
        "true ones, at the size of the annotation. OUT gets a line per question as it is scored, "
        "and the report: report.json, report.md, index.html.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--benchmark", required=True, metavar="NAME[/SPLIT]", help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--split", help="of the benchmark (val; of shapes: test)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of all datasets (shapes need none)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mode", choices=(GENERATED, GIVEN), default=GENERATED, help="(generated)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    parser.add_argument(
        "--rows", type=int, default=32, metavar="N", help="questions answered together (32)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="compute in it (that of the checkpoint)")
    parser.add_argument(
        "--weights", choices=list(WEIGHTS), help="fewer bits for the language model's weights"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="(512)")
    parser.add_argument(
        "--reference-compat",
        action="store_true",
        help="also what the released code would print; not comparable with anything else",
    )
    add_distributed_option(parser)
    add_judge_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Evaluates, prints a table by group of questions, writes the report."""
    options.when_interrupted = "the same command goes on where it was stopped"
    benchmark, split = find_benchmark(options.benchmark, options.split)
    _check(options, benchmark)
    model = describe_model(options.checkpoint, options.dtype, options.weights)
    if options.distributed:
        initialize_distributed()
    root = options.data or Path()
    entries = list_images(benchmark, root, split)[: options.limit]
    share = Share(benchmark, split, root, entries, jax.process_index(), jax.process_count())
    given = options.mode == GIVEN
    settings = {
        "benchmark": benchmark.name,
        "split": split,
        "mode": options.mode,
        "data": options.data.resolve().name if options.data else "",
        **model,
        "limit": options.limit,
        "max_new_tokens": None if given else options.max_new_tokens,
        "reference_compat": options.reference_compat,
        "version": __version__,
    }
    log = QuestionLog(options.out, settings, host=share.host, hosts=share.hosts)
    sums = evaluate(share, log, _Asker(options))
    records = _merge(share, log, sums)
    if records is None:
        return
    judged = None
    if names_judge(options):
        judge = make_judge(options, options.out)
        judged = judge_folder(options.out, judge, options.threshold, price=token_price(options))
    write_report(options.out, image_reader(options.data))
    _print(options.out, records)
    if judged is not None:
        print_judge_report(judged)
        check_complete(judged)


class _Asker:
    """Loads the model when there is something to ask, and asks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def __call__(
        self, asked: Iterable[BenchmarkQuestion], watch: Stopwatch, left_out: dict[str, str]
    ) -> Iterator[Answered]:
        options = self.options
        own = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        model = checkpoint.load_model(options.checkpoint, dtype=options.dtype, sharding=own)
        vocabulary = checkpoint.read_vocabulary(options.checkpoint, model.config)
        if options.mode == GIVEN:
            return answer_given(model, vocabulary, asked, watch, left_out, rows=options.rows)
        settings = EngineConfig(max_batch=options.rows, max_new_tokens=options.max_new_tokens)
        served = prepare_for_inference(model, weights=options.weights, consume=True)
        engine = Engine(served, vocabulary, settings)
        return answer_generated(engine, vocabulary, asked, watch, left_out)


def evaluate(share: Share, log: QuestionLog, ask: Ask) -> Sums:
    """Asks what is not in the log yet, and logs it; returns the sums of these questions.

    ask: gives the answers to questions in any order; it is not called if there are none.
    """
    given, compat = log.settings["mode"] == GIVEN, log.settings["reference_compat"]
    watch = Stopwatch("matching", "io", rest="model")
    left_out, sums = dict[str, str](), list[Sums]()
    try:
        with tqdm(total=len(share.own), desc="evaluating", unit="picture", disable=None) as bar:
            asked = _questions(share, log.done, watch, left_out, bar)
            first = next(asked, None)
            if first is not None:
                answers = ask(itertools.chain([first], asked), watch, left_out)
                watch.restart()  # what took long was to load the model
                for answered in answers:
                    with watch("matching"):
                        record = make_record(answered, given=given)
                        line = make_released_line(answered, given=given) if compat else None
                        sums.append(tally_record(record))
                    with watch("io"):
                        log.write(record, line)
                    bar.set_postfix(questions=len(sums), refresh=False)
    finally:
        log.close(watch.read(), len(sums), left_out)
    return merge(*sums)


def _check(options: argparse.Namespace, benchmark: Benchmark) -> None:
    for name in ("limit", "rows", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if options.data is None and benchmark.name != "shapes":
        raise InputError(f"--benchmark {benchmark.name}: name the folder of its files with --data")
    if options.data is not None and not options.data.is_dir():
        raise InputError(f"{options.data}: no such folder; check --data")
    if names_judge(options):
        make_judge(options, options.out)  # refuses options that do not go together
        if options.mode == GIVEN:
            raise InputError(f"--mode {GIVEN}: a judge has nothing to read where answers are given")
    if options.weights and options.mode == GIVEN:
        raise InputError(f"--mode {GIVEN}: --weights is for answers that the model writes")
    if benchmark.words:
        if options.mode == GIVEN:
            raise InputError(f"--mode {GIVEN}: {benchmark.name} asks for words and has no masks")
        TextScorer()  # refuses where its package is not there
    if options.reference_compat and options.mode != benchmark.released:
        known = f"--mode {benchmark.released}" if benchmark.released else "other benchmarks"
        raise InputError(
            f"--reference-compat: the released code has no numbers of {benchmark.name} in mode "
            f"{options.mode}, only of {known}"
        )


def _questions(
    share: Share, done: set[str], watch: Stopwatch, left_out: dict[str, str], bar: tqdm
) -> Iterator[BenchmarkQuestion]:
    """This host's questions that are not done; what is left out is told, with the reason."""
    for entry in share.own:
        with watch("io"):
            try:
                found = read_questions(share.benchmark, share.root, share.split, entry)
            except DamagedError as reason:
                left_out[entry.key] = str(reason)
                bar.update()
                continue
            if found.problems:
                left_out[entry.key] = "; ".join(found.problems)
        yield from (question for question in found.questions if question.id not in done)
        bar.update()


def _merge(share: Share, log: QuestionLog, own: Sums) -> list[QuestionRecord] | None:
    """The records of all hosts, on the first of them."""
    everything = merge_hosts(own) if share.hosts > 1 else own  # waits for all of them
    if share.host:
        return None
    records = log.merge()
    found = merge(*(tally_record(record) for record in records if record.id not in log.done))
    if found != everything:
        raise InputError(
            f"{log.out}: questions of other hosts are missing; --out must be a folder that all "
            "hosts share"
        )
    return records


def _print(out: Path, records: Sequence[QuestionRecord]) -> None:
    report = read_json(out / JSON)
    groups = {name: summarise(own) for name, own in group_records(records).items()}
    parts = [*groups.items(), ("all", summarise(records))]
    cells = {name: [_cell(value) for value in own] for name, own in parts}
    shown = [i for i in range(len(Summary._fields)) if any(c[i] != "-" for c in cells.values())]
    rows = [[name, *(own[i] for i in shown)] for name, own in cells.items()]
    print(format_table([["group", *(Summary._fields[i] for i in shown)], *rows], names=1))
    left_out = len(report["left_out"])
    print(
        f"benchmark {report['benchmark']}/{report['split']}, mode {report['mode']}"
        + (f", {left_out} pictures with something left out" if left_out else "")
    )
    if text := report["text"]:
        print("words: " + ", ".join(f"{name} {_cell(value)}" for name, value in text.items()))
    if report["released"]:
        giou, ciou = report["released"]["giou"], report["released"]["ciou"]
        print(f"as the released code counts, not comparable: gIoU {giou:.4f}, cIoU {ciou:.4f}")
    print(f"{out / JSON}, {out / PAGE}")


def _cell(value: float | int) -> str:
    if isinstance(value, int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.4f}"
