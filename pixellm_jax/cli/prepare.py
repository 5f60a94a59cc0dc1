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
COCO, JSONL = "coco", "jsonl"
MOST_WORKERS = 16
"""By default; disks are seldom faster."""

COLUMNS = {
    "examples": "examples",
    "turns": "questions",
    "targets": "targets",
    "skipped": "skipped",
    "parts_left_out": "parts left out",
}
"""Counted fields of the summary, and their labels."""

SHOWN = 3
"""Reasons of a split that are shown; skipped.jsonl has them all."""

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
OUT/DATASET/SPLIT/VERSION with its shards, and with {SKIPPED}: the key and the reason of
everything that is damaged and was left out. An interrupted command goes on where it was when it is
run again; finished splits are left as they are.
"""


class Row(NamedTuple):
    """A line of the summary: a prepared split, or why there is none."""

    dataset: str
    split: str
    prepared: Prepared | None
    reason: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.description = (
        "Reads datasets in their published form and stores them as ArrayRecord shards."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("--dataset", required=True, metavar="NAME", help=f"see below, or {ALL!r}")
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="all datasets")
    parser.add_argument(
        "--format",
        choices=(COCO, JSONL),
        help="of your own data: --dataset is the name you give it, --source its folder (or file)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="prepared data")
    parser.add_argument("--split", metavar="S", help="only this one (default: those in the source)")
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    parser.add_argument(
        "--workers", type=int, default=workers, metavar="N", help=f"processes ({workers})"
    )
    parser.add_argument("--strict", action="store_true", help="refuse what is damaged")
    parser.add_argument("--runner", metavar="NAME", help="an Apache Beam runner (extra [beam])")
    parser.add_argument(
        "--runner-option",
        action="append",
        default=[],
        metavar="=--X=Y",
        help="for Beam; repeatable",
    )
    parser.set_defaults(when_interrupted="finished shards are kept, run it again to go on")


def run(options: argparse.Namespace) -> None:
    """Prepares with a progress bar and prints what came out."""
    if options.workers < 1:
        raise InputError(f"--workers {options.workers}: expected at least 1")
    root, datasets = _datasets(options)
    rows = [
        _prepare(options, root, source, split)
        for source, splits in datasets
        for split in ([options.split] if options.split else splits)
    ]
    done = [row.prepared.stored for row in rows if row.prepared]
    if not done:
        raise InputError(f"nothing of {options.dataset} in {options.source}: {rows[0].reason}")
    print(_table(done))
    for row in rows:
        for line in _notes(row):
            print(line)
    for line in _absent(rows):
        print(line)


def _datasets(options: argparse.Namespace) -> tuple[Path, list[SourceSplits]]:
    """Return the source folder and the datasets to read."""
    name, place = str(options.dataset), Path(options.source)
    if options.format == JSONL and re.fullmatch(r"[A-Za-z]\w*", name):
        file = place if place.is_file() else place / "data.jsonl"
        jsonl = Jsonl(dataset=name, file=file.name)
        return file.parent, [SourceSplits(jsonl, jsonl.splits)]
    if not place.is_dir():
        raise InputError(f"no folder {place}: name the one that holds the datasets")
    if options.format == COCO and re.fullmatch(r"[A-Za-z]\w*", name):
        coco = Coco(dataset=name, folder=".")
        return place, [SourceSplits(coco, coco.splits)]
    if options.format:
        raise InputError(f"dataset name {name!r}: expected letters, digits and _, a letter first")
    if name == ALL:
        return place, list(SOURCES.values())
    if name not in SOURCES:
        close = difflib.get_close_matches(name.lower(), [*SOURCES, ALL], n=1, cutoff=0.5)
        known = f"did you mean {close[0]}?" if close else f"use one of {', '.join(SOURCES)}, {ALL}"
        raise InputError(f"no dataset {name!r}: {known} (your own data needs --format)")
    return place, [SOURCES[name]]


def _prepare(options: argparse.Namespace, root: Path, source: Source, split: str) -> Row:
    """A split that is not in the source is an error only if it was asked for by name."""
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
def _entry_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal; yields a function of (new, all) entries."""
    with tqdm(desc=what, unit=" entries", disable=None, leave=False, delay=0.5) as bar:

        def advance(new: int, total: int) -> None:
            bar.total = total
            bar.update(new)

        yield advance


def _table(splits: Sequence[StoredSplit]) -> str:
    """Counts of every split, and their sums."""
    counts = [[int(stored.metadata[name]) for name in COLUMNS] for stored in splits]
    names = [(stored.dataset, stored.split) for stored in splits]
    rows = [(*name, *numbers) for name, numbers in zip(names, counts, strict=True)]
    sums = ("all", "", *map(sum, zip(*counts, strict=True)))
    return format_table([("dataset", "split", *COLUMNS.values()), *rows, sums], names=2)


def _notes(row: Row) -> Iterator[str]:
    """Yield notes on a split: where it is, what was left out and why."""
    if row.prepared is None:
        return
    name, (stored, skips, found) = f"{row.dataset}/{row.split}", row.prepared
    if found:
        yield f"{name}: was prepared before, in {stored.folder}"
    for skip in skips[:SHOWN]:
        yield f"{name}: {'skipped' if skip.whole else 'a part of'} {skip.key}: {skip.reason}"
    if len(skips) > SHOWN:
        yield f"{name}: {len(skips) - SHOWN} more in {stored.folder / SKIPPED}"


def _absent(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each dataset of which not all splits were there."""
    gone = [row for row in rows if row.prepared is None]
    for dataset in dict.fromkeys(row.dataset for row in gone):
        own = [row for row in gone if row.dataset == dataset]
        yield f"not prepared: {dataset} ({', '.join(row.split for row in own)}): {own[0].reason}"
