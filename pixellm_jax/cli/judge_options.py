"""Judge options that `pixellm evaluate` and `pixellm judge` share, and the printed report."""

from __future__ import annotations

import argparse
from pathlib import Path

from pixellm_jax.cli.console import format_table
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.judge.client import ServerConfig, ServerJudge
from pixellm_jax.evaluation.judge.judge import THRESHOLD, Judge
from pixellm_jax.evaluation.judge.offline import WordJudge
from pixellm_jax.evaluation.judge.report import CACHE, JudgedScores, JudgeReport, Price

DEFAULT_TEMPERATURE = "own"
"""Value of `--judge-temperature` that leaves the temperature to the server."""


def add_judge_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that choose the judge."""
    group = parser.add_argument_group("judge of the answers' words")
    group.add_argument(
        "--judge-url", metavar="URL", help="server that implements the OpenAI protocol"
    )
    group.add_argument("--judge-model", metavar="NAME", help="the model that judges")
    group.add_argument(
        "--judge-offline",
        action="store_true",
        help="compare words instead, without network and model",
    )
    group.add_argument(
        "--threshold", type=int, default=THRESHOLD, help=f"lowest score that counts ({THRESHOLD})"
    )
    group.add_argument(
        "--judge-temperature",
        default="0",
        metavar="T",
        help=f"sampling temperature (0); `{DEFAULT_TEMPERATURE}` for models that accept none",
    )
    group.add_argument(
        "--judge-workers", type=int, default=8, metavar="N", help="concurrent requests (8)"
    )
    group.add_argument(
        "--judge-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to wait for a reply (60)",
    )
    group.add_argument(
        "--judge-price",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="price of a million prompt and completion tokens, to print the cost of the scores",
    )
    group.add_argument(
        "--judge-cache",
        type=Path,
        metavar="DIR",
        help=f"folder of cached replies ({CACHE} in the report)",
    )


def names_judge(options: argparse.Namespace) -> bool:
    """Whether the options choose a judge at all."""
    return bool(options.judge_offline or options.judge_url or options.judge_model)


def make_judge(options: argparse.Namespace, folder: Path) -> Judge:
    """Create the judge that the options choose, for the evaluation in `folder`.

    Raises:
        InputError: the options contradict each other or are incomplete.
    """
    server = (options.judge_url, options.judge_model)
    if options.judge_offline:
        if any(server):
            raise InputError(
                "--judge-offline uses no server: leave out --judge-url and --judge-model"
            )
        return WordJudge()
    if not all(server):
        raise InputError("no judge: give --judge-url and --judge-model, or --judge-offline")
    config = ServerConfig(
        url=options.judge_url,
        model=options.judge_model,
        temperature=_temperature(options.judge_temperature),
        timeout=options.judge_timeout,
        workers=options.judge_workers,
    )
    return ServerJudge(config, options.judge_cache or folder / CACHE)


def token_price(options: argparse.Namespace) -> Price | None:
    """Return the prices of the tokens, if they were given."""
    return Price(*options.judge_price) if options.judge_price else None


def print_judge_report(report: JudgeReport) -> None:
    """Print the scores of all groups, the judge, its request counts and the cost."""
    rows = [[name, *map(_cell, part)] for name, part in report.scores.items()]
    print(format_table([["questions of", *JudgedScores._fields], *rows], names=1))
    print(f"judge: {report.judge}; targets below {report.threshold} count with intersection 0")
    if report.counts:
        print(", ".join(f"{name} {count}" for name, count in report.counts.items()))
    if report.cost is not None:
        print(f"cost: {report.cost['run']:.4f} now, {report.cost['scores']:.4f} for all scores")


def _temperature(text: str) -> float | None:
    if text == DEFAULT_TEMPERATURE:
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"--judge-temperature {text}: expected a number or `{DEFAULT_TEMPERATURE}`"
        ) from None


def _cell(value: int | float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
