"""`pixellm report`: write the report of an evaluation again, from its records."""

from __future__ import annotations

import argparse
from pathlib import Path

from pixellm_jax.experiments.question_images import image_reader
from pixellm_jax.report.page import JSON, MARKDOWN, PAGE, write_report

EXAMPLES = """example:
  pixellm report runs/7b/muse --data dataset
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser.description = (
        "Read questions.jsonl and settings.json from a folder that `pixellm evaluate` "
        f"wrote, and write {JSON}, {MARKDOWN} and {PAGE} into it. No model is needed."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("out", type=Path, metavar="DIR", help="folder of the evaluation")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the images; without it, masks on grey"
    )


def run(options: argparse.Namespace) -> None:
    """Write the report and print it as Markdown."""
    print(write_report(options.out, image_reader(options.data)), end="")
    print(f"\npage: {options.out / PAGE}")
