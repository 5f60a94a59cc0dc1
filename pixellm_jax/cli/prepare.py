"""`pixellm prepare`: published datasets -> ArrayRecord shards."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data_pipeline.errors import AbsentError
from data_pipeline.reading import Source
from data_pipeline.sources import SOURCES, SourceSplits
from data_pipeline.sources.coco import Coco
from data_pipeline.sources.jsonl import Jsonl
from data_pipeline.storage.builders import Prepared, prepare
from data_pipeline.storage.stored import SKIPPED, StoredSplit
from pixellm_jax.cli.console import format_table
from pixellm_jax.errors import InputError

ALL = "all"
COCO = "coco"
JSONL = "jsonl"
MAX_DEFAULT_WORKERS = 16
"""Maximum of the default of --workers: disks are seldom faster."""

COLUMNS = {
    "examples": "examples",
    "turns": "questions",
    "targets": "targets",
    "skipped": "skipped",
    "parts_left_out": "parts left out",
}
"""Counted fields of the summary, and their labels."""

MAX_REASONS = 3
"""Maximum number of reasons that are printed per split; skipped.jsonl has all of them."""

EXAMPLES = f"""datasets:
  {textwrap.fill(", ".join(SOURCES), 90, subsequent_indent="  ")}

examples:
  pixellm prepare --dataset muse --source dataset --out prepared
  pixellm prepare --dataset refcoco+ --split testA --source dataset --out prepared
  pixellm prepare --dataset all --source dataset --out prepared --workers 16
  pixellm prepare --dataset birds --format jsonl --source birds.jsonl --out prepared
  pixellm prepare --dataset all --source dataset --out prepared --runner DirectRunner \\
      --runner-option direct_running_mode=multi_processing --runner-option direct_num_workers=4

The source has the layout of the PixelLM README. Each split becomes a folder
OUT/DATASET/SPLIT/VERSION with its shards and {SKIPPED}, which lists the key and the reason
of everything that is damaged and was left out. Run an interrupted command again to resume it;
finished splits are not prepared again.
"""


class Row(NamedTuple):
    """A row of the summary: a prepared split, or the reason why its files are missing."""

    dataset: str
    split: str
    prepared: Prepared | None
    reason: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Read datasets in their published form and store them as ArrayRecord shards."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--dataset", required=True, metavar="NAME", help=f"name of a dataset (see below), or {ALL}"
    )
    parser.add_argument(
        "--source", type=Path, required=True, metavar="DIR", help="folder of the published datasets"
    )
    parser.add_argument(
        "--format",
        choices=(COCO, JSONL),
        help="format of your own data: --dataset is a name of your choice, --source the folder "
        "(or the JSONL file)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the prepared data"
    )
    parser.add_argument(
        "--split", metavar="SPLIT", help="prepare only this split (default: all in the source)"
    )
    workers = min(os.cpu_count() or 1, MAX_DEFAULT_WORKERS)
    parser.add_argument(
        "--workers",
        type=int,
        default=workers,
        metavar="N",
        help=f"number of processes ({workers})",
    )
    parser.add_argument("--strict", action="store_true", help="stop with an error at damaged data")
    parser.add_argument(
        "--runner", metavar="NAME", help="Apache Beam runner that writes (extra [beam])"
    )
    parser.add_argument(
        "--runner-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of Beam; repeatable",
    )
    parser.set_defaults(when_interrupted="finished shards are kept, run it again to resume")


def run(options: argparse.Namespace) -> None:
    """Prepare the splits with a progress bar and print a summary."""
    if options.workers < 1:
        raise InputError(f"--workers {options.workers}: expected at least 1")
    root, datasets = _datasets(options)
    rows = [
        _prepare(options, root, source, split)
        for source, splits in datasets
        for split in ([options.split] if options.split else splits)
    ]
    stored = [row.prepared.stored for row in rows if row.prepared]
    if not stored:
        raise InputError(f"nothing of {options.dataset} in {options.source}: {rows[0].reason}")
    print(_table(stored))
    for row in rows:
        for line in _notes(row):
            print(line)
    for line in _missing(rows):
        print(line)


def _datasets(options: argparse.Namespace) -> tuple[Path, list[SourceSplits]]:
    """Return the source folder and the datasets to read."""
    name = str(options.dataset)
    root = Path(options.source)
    if options.format == JSONL and re.fullmatch(r"[A-Za-z]\w*", name):
        file = root if root.is_file() else root / "data.jsonl"
        jsonl = Jsonl(dataset=name, file=file.name)
        return file.parent, [SourceSplits(jsonl, jsonl.splits)]
    if not root.is_dir():
        raise InputError(f"no folder {root}: name the folder that contains the datasets")
    if options.format == COCO and re.fullmatch(r"[A-Za-z]\w*", name):
        coco = Coco(dataset=name, folder=".")
        return root, [SourceSplits(coco, coco.splits)]
    if options.format:
        raise InputError(f"dataset name {name!r}: expected letters, digits and _, a letter first")
    if name == ALL:
        return root, list(SOURCES.values())
    if name not in SOURCES:
        close = difflib.get_close_matches(name.lower(), [*SOURCES, ALL], n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(SOURCES)}, {ALL}"
        raise InputError(f"no dataset {name!r}: {hint} (your own data needs --format)")
    return root, [SOURCES[name]]


def _prepare(options: argparse.Namespace, root: Path, source: Source, split: str) -> Row:
    """Prepare a split; missing files are an error only if the split was selected by name."""
    with _entry_bar(f"{source.dataset}/{split}") as progress:
        try:
            prepared = prepare(
                source,
                split,
                root,
                options.out,
                strict=options.strict,
                workers=options.workers,
                runner=options.runner,
                runner_options=[f"--{option}" for option in options.runner_option],
                progress=progress,
            )
        except AbsentError as error:
            if options.split and options.dataset != ALL:
                raise
            return Row(source.dataset, split, None, str(error))
    return Row(source.dataset, split, prepared)


@contextlib.contextmanager
def _entry_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal; yield a function that takes (new, total) entries."""
    with tqdm(desc=label, unit=" entries", disable=None, leave=False, delay=0.5) as bar:

        def advance(new: int, total: int) -> None:
            bar.total = total
            bar.update(new)

        yield advance


def _table(splits: Sequence[StoredSplit]) -> str:
    """Format the counts of every split and their sums."""
    counts = [[int(stored.metadata[name]) for name in COLUMNS] for stored in splits]
    names = [(stored.dataset, stored.split) for stored in splits]
    rows = [(*name, *numbers) for name, numbers in zip(names, counts, strict=True)]
    sums = ("all", "", *map(sum, zip(*counts, strict=True)))
    return format_table([("dataset", "split", *COLUMNS.values()), *rows, sums], names=2)


def _notes(row: Row) -> Iterator[str]:
    """Yield notes on a split: where it is, what was left out and why."""
    if row.prepared is None:
        return
    name = f"{row.dataset}/{row.split}"
    stored, skips, existed = row.prepared
    if existed:
        yield f"{name}: was prepared before, in {stored.folder}"
    for skip in skips[:MAX_REASONS]:
        yield f"{name}: {'skipped' if skip.whole else 'a part of'} {skip.key}: {skip.reason}"
    if len(skips) > MAX_REASONS:
        yield f"{name}: {len(skips) - MAX_REASONS} more in {stored.folder / SKIPPED}"


def _missing(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line per dataset with missing splits."""
    missing = [row for row in rows if row.prepared is None]
    for dataset in dict.fromkeys(row.dataset for row in missing):
        splits = [row for row in missing if row.dataset == dataset]
        names = ", ".join(row.split for row in splits)
        yield f"not prepared: {dataset} ({names}): {splits[0].reason}"
