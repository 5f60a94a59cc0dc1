"""`pixellm compare`: compare two evaluations on the questions that both have answered."""

from __future__ import annotations

import argparse
from pathlib import Path

from pixellm_jax.errors import InputError
from pixellm_jax.report.compare import as_markdown, compare, render_comparison
from pixellm_jax.report.numbers import read_run

EXAMPLES = """example:
  pixellm compare runs/7b/muse runs/13b/muse --out muse.html
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser.description = (
        "Compare two folders that `pixellm evaluate` wrote, question by question, and "
        "print a table in Markdown: both scores and their difference, with confidence intervals."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("first", type=Path, metavar="A", help="folder of the first evaluation")
    parser.add_argument("second", type=Path, metavar="B", help="folder of the second evaluation")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write a page (.html)")


def run(options: argparse.Namespace) -> None:
    """Print the table and write the page."""
    comparison = compare(read_run(options.first), read_run(options.second))
    print(as_markdown(comparison), end="")
    if options.out is not None:
        page = render_comparison(comparison)
        try:
            options.out.write_text(page, encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(
                f"{options.out}: cannot be written ({error.strerror or error}); choose another file"
            ) from None
        print(f"\npage: {options.out}")
