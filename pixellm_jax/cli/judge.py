"""`pixellm judge`: score how well answers name their targets, with a language model or offline."""

from __future__ import annotations

import argparse
from pathlib import Path

from pixellm_jax.cli.judge_options import (
    add_judge_options,
    make_judge,
    print_judge_report,
    token_price,
)
from pixellm_jax.evaluation.judge.client import KEY
from pixellm_jax.evaluation.judge.report import check_complete, judge_folder
from pixellm_jax.experiments.question_images import image_reader
from pixellm_jax.report.page import PAGE, write_report

EXAMPLES = f"""examples:
  pixellm judge --report out/muse --judge-url http://localhost:8000/v1 --judge-model NAME
  pixellm judge --report out/muse --judge-offline

The API key of the server, if it requires one, is read from the environment variable {KEY}.
Replies are cached: run the same command again to retry only what failed.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options and the help text."""
    parser.description = (
        "Each mask in an answer is replaced by the description of its matched true mask (or by "
        "<nothing>). A language model then scores from 1 to 10 how well each description fits the "
        "words. For a target below the threshold, the intersection is set to 0."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--report",
        type=Path,
        required=True,
        metavar="DIR",
        help="output folder of `pixellm evaluate`",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the images, to show them on the page"
    )
    add_judge_options(parser)


def run(options: argparse.Namespace) -> None:
    """Judge the answers and update the report.

    Raises:
        InputError: a question could not be judged.
    """
    options.when_interrupted = "replies are cached; run the same command again"
    judge = make_judge(options, options.report)
    report = judge_folder(options.report, judge, options.threshold, price=token_price(options))
    write_report(options.report, image_reader(options.data))
    print_judge_report(report)
    print(options.report / PAGE)
    check_complete(report)
