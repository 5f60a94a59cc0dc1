"""`pixellm evaluate`: score a model on a benchmark."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from data_pipeline.benchmarks import (
    BENCHMARKS,
    Benchmark,
    find_benchmark,
    list_images,
    question_reader,
)
from pixellm_jax.benchmark_question import GENERATED, GIVEN
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
from pixellm_jax.evaluation.judge.report import check_complete
from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.evaluation.run import evaluate, load_answerer
from pixellm_jax.evaluation.run_folder import RunSettings, describe_model
from pixellm_jax.evaluation.summary import Summary, group_records, summarise
from pixellm_jax.evaluation.text_scores import TextScorer
from pixellm_jax.experiments.question_images import image_reader
from pixellm_jax.files import read_json
from pixellm_jax.inference.prepare import WEIGHTS
from pixellm_jax.report.page import JSON, PAGE, write_report

EXAMPLES = """examples:
  pixellm evaluate --checkpoint runs/shapes/model --benchmark shapes --out report
  pixellm evaluate --checkpoint pixellm-7b --benchmark muse/test_many --data dataset --out many
  pixellm evaluate --checkpoint pixellm-7b --benchmark muse --data dataset --out muse \\
      --judge-url http://localhost:8000/v1 --judge-model NAME
  pixellm evaluate --checkpoint pixellm-7b --benchmark refcoco/testA --data dataset --out testA \\
      --mode given

In mode "generated" the model writes its answers, codebook tokens included (free-running). In mode
"given" the tokens are in the prompt (teacher-forced), as for the referring numbers of the paper,
and only masks count. Numbers of the two modes cannot be compared. Run the same command again to
resume an interrupted evaluation.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser.description = (
        "Asks a model the questions of a benchmark and compares its masks with the "
        "true ones, at the resolution of the annotation. OUT receives one line per question as it "
        "is scored, and the report: report.json, report.md, index.html."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--benchmark", required=True, metavar="NAME[/SPLIT]", help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--split", help="split of the benchmark (val; for shapes: test)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of all datasets (not needed for shapes)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--mode",
        choices=(GENERATED, GIVEN),
        default=GENERATED,
        help="who writes the answers (generated)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument(
        "--rows", type=int, default=32, metavar="N", help="questions per batch (32)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="compute dtype (the dtype of the checkpoint)"
    )
    parser.add_argument(
        "--weights", choices=list(WEIGHTS), help="quantize the language model's weights"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="tokens per answer (512)"
    )
    parser.add_argument(
        "--reference-compat",
        action="store_true",
        help="also compute the scores that the released code prints; not comparable with others",
    )
    add_distributed_option(parser)
    add_judge_options(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate, write the report, and print a table with a row per group of questions."""
    options.when_interrupted = "run the same command again to resume"
    benchmark, split = find_benchmark(options.benchmark, options.split)
    _check(options, benchmark)
    judge = make_judge(options, options.out) if names_judge(options) else None
    model = describe_model(options.checkpoint, options.dtype, options.weights)
    if options.distributed:
        initialize_distributed()
    root = options.data or Path()
    settings = RunSettings(
        benchmark=benchmark.name,
        split=split,
        mode=options.mode,
        data=options.data.resolve().name if options.data else "",
        **model,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens if options.mode == GENERATED else None,
        reference_compat=options.reference_compat,
    )
    answer = load_answerer(
        options.checkpoint,
        mode=options.mode,
        dtype=options.dtype,
        weights=options.weights,
        max_batch=options.rows,
        max_new_tokens=options.max_new_tokens,
    )
    evaluation = evaluate(
        list_images(benchmark, root, split)[: options.limit],
        question_reader(benchmark, root, split),
        answer,
        options.out,
        settings,
        judge=judge,
        threshold=options.threshold,
        price=token_price(options),
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    if evaluation is None:
        return
    write_report(options.out, image_reader(options.data))
    _print(options.out, evaluation.records)
    if evaluation.judge is not None:
        print_judge_report(evaluation.judge)
        check_complete(evaluation.judge)


def _check(options: argparse.Namespace, benchmark: Benchmark) -> None:
    for name in ("limit", "rows", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if options.data is None and benchmark.name != "shapes":
        raise InputError(
            f"--benchmark {benchmark.name}: give the folder of the datasets with --data"
        )
    if options.data is not None and not options.data.is_dir():
        raise InputError(f"{options.data}: no such folder; check --data")
    if names_judge(options) and options.mode == GIVEN:
        raise InputError(
            f"--mode {GIVEN}: a judge has nothing to read where answers are given; leave out the "
            "options of the judge"
        )
    if options.weights and options.mode == GIVEN:
        raise InputError(
            f"--mode {GIVEN}: --weights is only for answers that the model writes; leave it out"
        )
    if benchmark.text_only:
        if options.mode == GIVEN:
            raise InputError(f"--mode {GIVEN}: {benchmark.name} asks for words and has no masks")
        TextScorer()  # raises if its package is not installed
    if options.reference_compat and options.mode != benchmark.released:
        known = f"--mode {benchmark.released}" if benchmark.released else "other benchmarks"
        raise InputError(
            f"--reference-compat: the released code has no numbers of {benchmark.name} in mode "
            f"{options.mode}, only of {known}"
        )


def _print(out: Path, records: Sequence[QuestionRecord]) -> None:
    report = read_json(out / JSON)
    groups = {name: summarise(group) for name, group in group_records(records).items()}
    groups["all"] = summarise(records)
    cells = {name: [_cell(value) for value in summary] for name, summary in groups.items()}
    fields = Summary._fields
    shown = [i for i in range(len(fields)) if any(row[i] != "-" for row in cells.values())]
    rows = [[name, *(row[i] for i in shown)] for name, row in cells.items()]
    print(format_table([["group", *(fields[i] for i in shown)], *rows], names=1))
    left_out = len(report["left_out"])
    print(
        f"benchmark {report['benchmark']}/{report['split']}, mode {report['mode']}"
        + (f", {left_out} images left out as a whole or in part" if left_out else "")
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
