"""`pixellm data-stats`: statistics of prepared data as a table and a figure."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from data_pipeline.statistics import COLUMNS, collect, count_rows, load_figure_class, render_figure
from data_pipeline.storage.stored import find_splits
from pixellm_jax.cli.console import format_table
from pixellm_jax.errors import InputError

FORMATS = (".png", ".pdf", ".svg")

EXAMPLES = """examples:
  pixellm data-stats --data prepared/muse --out muse.png
  pixellm data-stats --data prepared --split train

The data is a folder that `pixellm prepare` made: everything, one dataset or one split. The figure
shows, for each dataset: targets per question (per picture where questions are drawn in training),
words per phrase, words per question and answer, the share of the picture that a mask covers, the
most frequent names, and where the targets are.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = "Counts what is in prepared data."
    parser.epilog = EXAMPLES
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data")
    parser.add_argument("--dataset", metavar="NAME", help="only this one")
    parser.add_argument("--split", metavar="S", help="only this one")
    parser.add_argument("--out", type=Path, metavar="FIG", help="a figure, .png, .pdf or .svg")


def run(options: argparse.Namespace) -> None:
    """Count with a progress bar, print the table and write the figure."""
    out = options.out
    if out is not None:
        if out.suffix.lower() not in FORMATS:
            raise InputError(f"{out}: a figure is one of {', '.join(FORMATS)}; choose such a name")
        if not out.parent.is_dir() or out.is_dir():
            raise InputError(f"{out}: no place for a file; choose another one")
        load_figure_class()
    splits = find_splits(options.data, dataset=options.dataset, split=options.split)
    with tqdm(desc="reading", total=sum(map(len, splits)), disable=None, delay=0.5) as bar:
        statistics = collect(splits, bar.update)
    print(format_table([COLUMNS, *count_rows(splits)], names=2))
    for dataset, counted in statistics.items():
        print(f"\n{counted.describe(dataset)}")
    if out is not None:
        data = render_figure(statistics, out.suffix[1:].lower())
        try:
            out.write_bytes(data)
        except OSError as error:
            raise InputError(f"{out}: cannot write here ({error.strerror})") from None
        print(f"\n{out}")
