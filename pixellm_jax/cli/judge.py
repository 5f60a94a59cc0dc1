"""`pixellm judge`: a language model scores how well answers name their targets."""

from __future__ import annotations

import argparse
from pathlib import Path

from pixellm_jax.cli.judge_options import (
    add_judge_options,
    judge_report,
    print_report,
    refuse_failures,
)
from pixellm_jax.cli.report import PAGE, write_report
from pixellm_jax.evaluation.judge.client import KEY

EXAMPLES = f"""examples:
  pixellm judge --report out/muse --judge-url http://localhost:8000/v1 --judge-model NAME
  pixellm judge --report out/muse --judge-offline

The key of the server, if it wants one, is read from the environment variable {KEY}.
Replies are kept: the same command again asks only for what failed.
"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "judge",
        help="have the answers of a MUSE evaluation judged",
        description="Each mask in an answer is replaced by the description of the true one it was "
        "matched with, and a language model scores from 1 to 10 how well that fits. A target below "
        "the threshold counts with intersection 0.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--report", type=Path, required=True, metavar="DIR", help="what `pixellm evaluate` wrote"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="where the pictures are, for the page"
    )
    add_judge_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Judges, makes the report anew, and fails where a question has no score."""
    options.when_interrupted = "replies are kept, run the same command again"
    report = judge_report(options, options.report)
    write_report(options.report, options.data)
    print_report(report)
    print(options.report / PAGE)
    refuse_failures(report)
