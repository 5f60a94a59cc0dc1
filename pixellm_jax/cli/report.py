"""`pixellm report`: makes the report of an evaluation anew, from the records that it left."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pixellm_jax.cli.report_page import draw_report
from pixellm_jax.errors import InputError
from pixellm_jax.files import write_whole
from pixellm_jax.report.numbers import make_report, read_run
from pixellm_jax.report.tables import as_json, as_markdown

JSON, MARKDOWN, PAGE = "report.json", "report.md", "index.html"
EXAMPLES = """example:
  pixellm report runs/7b/muse --data dataset
"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="make the report of an evaluation anew",
        description="Reads questions.jsonl and settings.json of a folder that `pixellm evaluate` "
        f"wrote, and writes {JSON}, {MARKDOWN} and {PAGE} beside them. No model is needed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="DIR", help="what `pixellm evaluate` wrote")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the pictures are")
    return parser


def run(options: argparse.Namespace) -> None:
    """Writes the report and prints its Markdown."""
    print(write_report(options.out, options.data), end="")
    print(f"\npage: {options.out / PAGE}")


def write_report(out: Path, data: Path | None) -> str:
    """Writes report.json, report.md and index.html; returns the Markdown.

    out: a folder with the questions.jsonl and settings.json of an evaluation. data: the folder that
    the pictures' paths are relative to; without it the page shows masks alone.

    Raises:
        InputError: the records are missing or damaged, or the folder cannot be written.
    """
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data}: no such folder; leave it out for masks without pictures")
    report = make_report(read_run(out))
    text = as_markdown(report)
    files = {
        JSON: json.dumps(as_json(report), indent=2, ensure_ascii=False) + "\n",
        MARKDOWN: text,
        PAGE: draw_report(report, data),
    }
    try:
        for name, content in files.items():
            write_whole(out / name, content)
    except OSError as error:
        raise InputError(
            f"{out}: cannot write here ({error.strerror or error}); free some space or its rights"
        ) from None
    return text
