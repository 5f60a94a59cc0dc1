"""The judge that the options of a command name, and what it found."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from pixellm_jax.cli.console import format_table
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.judge.client import ServerConfig, ServerJudge
from pixellm_jax.evaluation.judge.judge import THRESHOLD, Judge
from pixellm_jax.evaluation.judge.offline import WordJudge
from pixellm_jax.evaluation.judge.report import (
    CACHE,
    JudgedScores,
    JudgeReport,
    Price,
    judge_folder,
)


def add_judge_options(parser: argparse._ActionsContainer) -> None:
    """Which judge, and how it is asked."""
    parser = parser.add_argument_group("judge of the answers' words")
    parser.add_argument("--judge-url", metavar="URL", help="server that speaks the OpenAI protocol")
    parser.add_argument("--judge-model", metavar="NAME", help="the model that judges")
    parser.add_argument(
        "--judge-offline", action="store_true", help="compare words instead; no network, no model"
    )
    parser.add_argument(
        "--threshold", type=int, default=THRESHOLD, help=f"lowest score that counts ({THRESHOLD})"
    )
    parser.add_argument(
        "--judge-temperature",
        default="0",
        metavar="T",
        help="0 by default; `own` for models that take none",
    )
    parser.add_argument(
        "--judge-workers", type=int, default=8, metavar="N", help="requests at a time (8)"
    )
    parser.add_argument(
        "--judge-timeout", type=float, default=60.0, metavar="S", help="seconds for a reply (60)"
    )
    parser.add_argument(
        "--judge-price",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="price of a million tokens read and written, to print what the scores cost",
    )
    parser.add_argument(
        "--judge-cache",
        type=Path,
        metavar="DIR",
        help=f"where replies are kept ({CACHE} in the report)",
    )


def judge_report(options: argparse.Namespace, folder: Path) -> JudgeReport:
    """Judges a folder as the options of `add_judge_options` say.

    Raises:
        InputError: options that do not go together, or as `judge_folder`.
    """
    judge = make_judge(options, folder)
    price = Price(*options.judge_price) if options.judge_price else None
    with tqdm(desc="judging", unit="question", disable=None) as bar:

        def start(questions: int) -> Callable[[], object]:
            bar.reset(questions)
            return bar.update

        return judge_folder(folder, judge, options.threshold, price=price, start=start)


def names_judge(options: argparse.Namespace) -> bool:
    """Whether a judge is asked for at all."""
    return bool(options.judge_offline or options.judge_url or options.judge_model)


def refuse_failures(report: JudgeReport) -> None:
    """Raises `InputError` where a question has no score."""
    if not report.failures:
        return
    name, reason = next(iter(report.failures.items()))
    first = report.stopped or f"the first is {name}: {reason}"
    raise InputError(
        f"{len(report.failures)} of {report.questions} questions have no score and are in no "
        f"number above; {first}; run the same command again"
    )


def make_judge(options: argparse.Namespace, folder: Path) -> Judge:
    """The judge that the options name."""
    server = (options.judge_url, options.judge_model)
    if options.judge_offline:
        if any(server):
            raise InputError("--judge-offline asks no server: leave out --judge-url and -model")
        return WordJudge()
    if not all(server):
        raise InputError("which judge? give --judge-url and --judge-model, or --judge-offline")
    try:
        own = options.judge_temperature == "own"
        temperature = None if own else float(options.judge_temperature)
    except ValueError:
        raise InputError(
            f"--judge-temperature {options.judge_temperature}: expected a number or `own`"
        ) from None
    config = ServerConfig(
        url=options.judge_url,
        model=options.judge_model,
        temperature=temperature,
        timeout=options.judge_timeout,
        workers=options.judge_workers,
    )
    return ServerJudge(config, options.judge_cache or folder / CACHE)


def print_report(report: JudgeReport) -> None:
    """The scores of all groups, the judge, and what it took."""
    rows = [[name, *map(_cell, part)] for name, part in report.scores.items()]
    print(format_table([["questions of", *JudgedScores._fields], *rows], names=1))
    print(f"judge: {report.judge}; targets below {report.threshold} count with intersection 0")
    if report.counts:
        print(", ".join(f"{name} {count}" for name, count in report.counts.items()))
    if report.cost is not None:
        print(f"cost: {report.cost['run']:.4f} now, {report.cost['scores']:.4f} for all scores")


def _cell(value: int | float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
