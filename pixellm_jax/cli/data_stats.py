"""`pixellm data-stats`: what is in prepared data, as a table and as a figure for a paper."""

from __future__ import annotations

import argparse
import io
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco
from tqdm import tqdm

from data_pipeline.example import Example
from data_pipeline.storage.stored import StoredSplit, find_splits
from pixellm_jax.cli.console import format_table
from pixellm_jax.errors import InputError
from pixellm_jax.images.overlay import colours

FORMATS = (".png", ".pdf", ".svg")
SHADES = "Blues"
NO_MATPLOTLIB = "a figure needs matplotlib: pip install 'pixellm_jax[figures]', or leave out --out"

EXAMPLES = """examples:
  pixellm data-stats --data prepared/muse --out muse.png
  pixellm data-stats --data prepared --split train

The data is a folder that `pixellm prepare` made: everything, one dataset or one split. The figure
shows, for each dataset: targets per question (per picture where questions are drawn in training),
words per phrase, words per question and answer, the share of the picture that a mask covers, the
most frequent names, and where the targets are.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the options."""
    parser = commands.add_parser(
        "data-stats",
        help="statistics of prepared data: a table and a figure",
        description="Counts what is in prepared data.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data")
    parser.add_argument("--dataset", metavar="NAME", help="only this one")
    parser.add_argument("--split", metavar="S", help="only this one")
    parser.add_argument("--out", type=Path, metavar="FIG", help="a figure, .png, .pdf or .svg")
    return parser


def run(options: argparse.Namespace) -> None:
    """Counts with a progress bar, prints the table and writes the figure."""
    out = options.out
    if out is not None:
        if out.suffix.lower() not in FORMATS:
            raise InputError(f"{out}: a figure is one of {', '.join(FORMATS)}; choose such a name")
        if not out.parent.is_dir() or out.is_dir():
            raise InputError(f"{out}: no place for a file; choose another one")
        _figure_class()
    splits = find_splits(options.data, dataset=options.dataset, split=options.split)
    statistics: dict[str, Statistics] = {}
    with tqdm(desc="reading", total=sum(map(len, splits)), disable=None, delay=0.5) as bar:
        for stored in splits:
            own = statistics.setdefault(stored.dataset, Statistics())
            for example in stored:
                own.add(example)
                bar.update()
    print(_counts(splits))
    for dataset, own in statistics.items():
        print(f"\n{own.describe(dataset)}")
    if out is not None:
        data = draw(statistics, out.suffix[1:].lower())
        try:
            out.write_bytes(data)
        except OSError as error:
            raise InputError(f"{out}: cannot write here ({error.strerror})") from None
        print(f"\n{out}")


@dataclass(kw_only=True)
class Statistics:
    """What was counted in one dataset.

    targets: per question, or per picture where there are no questions. names: the shortest phrase
    of each target. words: of preferred phrases, questions and answers. shares: area of every mask
    that is not empty, in the area of its picture. centres: y and x of the middle of its box, 0..1.
    """

    pictures: int = 0
    questions: int = 0
    empty: int = 0
    targets: Counter[int] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    words: dict[str, Counter[int]] = field(
        default_factory=lambda: {"phrase": Counter(), "question": Counter(), "answer": Counter()}
    )
    shares: array[float] = field(default_factory=lambda: array("f"))
    centres: array[float] = field(default_factory=lambda: array("f"))

    def add(self, example: Example) -> None:
        """Counts an example."""
        self.pictures += 1
        turns = [turn for conversation in example.conversations for turn in conversation]
        self.questions += len(turns)
        self.targets.update([len(t.targets) for t in turns] or [len(example.targets)])
        for turn in turns:
            self.words["question"][len(turn.question.split())] += 1
            if turn.answer is not None:
                self.words["answer"][len(turn.answer.split())] += 1
        for target in example.targets:
            if target.phrases:
                self.names[min(target.phrases, key=len).lower()] += 1
                self.words["phrase"][len(target.phrases[0].split())] += 1
        if example.masks:
            height, width = example.hw
            areas = coco.area(list(example.masks))
            for area, (x, y, w, h) in zip(areas, coco.toBbox(list(example.masks)), strict=True):
                if not area:
                    self.empty += 1
                    continue
                self.shares.append(float(area) / (height * width))
                self.centres.extend((float(y + h / 2) / height, float(x + w / 2) / width))

    @property
    def unit(self) -> str:
        return "question" if self.questions else "picture"

    def describe(self, dataset: str) -> str:
        """Histograms as text."""
        lines = [dataset, f"  targets per {self.unit}"]
        total = sum(self.targets.values())
        for number, count in _binned(self.targets).items():
            share = count / total
            lines.append(f"  {number:>6}  {'█' * round(40 * share):40}  {count} ({share:.1%})")
        for what, counter in self.words.items():
            if counter:
                lines.append(f"  words per {what}: {_spread(list(counter.elements()))}")
        if self.shares:
            percent = [100 * share for share in self.shares]
            lines.append(f"  mask area, % of the picture: {_spread(percent)}; {self.empty} empty")
        return "\n".join(lines)


def _spread(values: Sequence[int] | Sequence[float]) -> str:
    low, median, high = np.quantile(values, (0.05, 0.5, 0.95))
    return f"mean {np.mean(values):.3g}, median {median:.3g}, 5 % to 95 %: {low:.3g} to {high:.3g}"


def _binned(counter: Mapping[int, int], most: int = 15) -> dict[str, int]:
    """Counts of 0, 1, ..., and of all above `most`: {1: 3, 40: 2} -> {"1": 3, "> 15": 2}."""
    bins = {str(n): count for n, count in sorted(counter.items()) if n <= most}
    above = sum(count for n, count in counter.items() if n > most)
    return bins | ({f"> {most}": above} if above else {})


def _counts(splits: Sequence[StoredSplit]) -> str:
    head = ("dataset", "split", "pictures", "questions", "targets", "left out")
    rows = [
        (
            stored.dataset,
            stored.split,
            len(stored),
            *(stored.metadata[name] for name in ("turns", "targets")),
            stored.metadata["skipped"] + stored.metadata["parts_left_out"],
        )
        for stored in splits
    ]
    return format_table([head, *rows], names=2)


def draw(statistics: Mapping[str, Statistics], file_format: str) -> bytes:
    """The figure: bars for one dataset, a row of shades for each of several."""
    figure = _figure_class()(figsize=(10.5, 6), layout="constrained")
    panels = dict(zip("abcdef", figure.subplots(2, 3).flat, strict=True))
    several = len(statistics) > 1
    asked = {name: own for name, own in statistics.items() if own.targets.keys() - {0}}
    units = sorted({own.unit for own in asked.values()}, reverse=True)
    titles = {
        "a": f"targets per {' or '.join(units)}",
        "b": "words per phrase",
        "c": "words per question and answer",
        "d": "area of a mask, % of the picture",
        "e": "most frequent names",
        "f": "middle of a target in the picture",
    }
    _histograms(panels["a"], {name: own.targets for name, own in asked.items()}, several)
    _histograms(panels["b"], {name: own.words["phrase"] for name, own in asked.items()}, several)
    texts = {
        f"{name}, {what}" if several else what: own.words[what]
        for name, own in statistics.items()
        for what in ("question", "answer")
    }
    _histograms(panels["c"], texts, several)
    _shares(panels["d"], asked, several)
    _names(panels["e"], asked, several)
    _centres(panels["f"], asked)
    for letter, panel in panels.items():
        panel.set_title(f"({letter}) {titles[letter]}", fontsize=9, loc="left")
        panel.tick_params(labelsize=7)
        for edge in ("top", "right"):
            panel.spines[edge].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=200)
    return buffer.getvalue()


def _histograms(panel: Any, counted: Mapping[str, Counter[int]], several: bool) -> None:
    """Over whole numbers, in at most 30 bins; the last holds what is beyond 99.5 %."""
    counted = {name: counter for name, counter in counted.items() if counter}
    ends = [np.quantile(list(counter.elements()), 0.995) for counter in counted.values()]
    width = 1 + int(max(ends, default=0)) // 30
    edges = np.arange(0, max(ends, default=0) + 2 * width, width) - 0.5
    values = {
        name: np.clip(list(counter.elements()), None, edges[-1])
        for name, counter in counted.items()
    }
    _show(panel, edges, values, several)


def _shares(panel: Any, statistics: Mapping[str, Statistics], several: bool) -> None:
    edges = np.linspace(-2, 2, 33)
    logarithms = {
        name: np.log10(np.clip(100 * np.asarray(own.shares), 0.01, 100))
        for name, own in statistics.items()
    }
    _show(panel, edges, logarithms, several)
    panel.set_xticks(range(-2, 3), ["0.01", "0.1", "1", "10", "100"])


def _show(panel: Any, edges: np.ndarray, values: Mapping[str, np.ndarray], several: bool) -> None:
    """Histograms, each in % of its own sum."""
    rows = [np.histogram(own, edges)[0] * 100 / max(1, len(own)) for own in values.values()]
    if several and rows:
        shown = panel.pcolormesh(edges, np.arange(len(rows) + 1), np.array(rows), cmap=SHADES)
        panel.set_yticks(np.arange(len(rows)) + 0.5, list(values), parse_math=False)
        panel.invert_yaxis()
        panel.figure.colorbar(shown, ax=panel, pad=0.02).ax.tick_params(labelsize=7)
        return
    for row, name, colour in zip(rows, values, colours(len(rows)) / 255, strict=True):
        panel.stairs(row, edges, fill=True, color=colour, alpha=1 / len(rows) ** 0.5, label=name)
    panel.set_ylabel("%", fontsize=8)
    if len(rows) > 1:
        panel.legend(fontsize=8, frameon=False)


def _names(panel: Any, statistics: Mapping[str, Statistics], several: bool, most: int = 14) -> None:
    counted = [
        (count, f"{_short(name)} ({dataset})" if several else _short(name))
        for dataset, own in statistics.items()
        for name, count in own.names.most_common(most)
    ]
    counted = sorted(counted, reverse=True)[:most][::-1]
    panel.barh(range(len(counted)), [count for count, _ in counted], color=colours(1)[0] / 255)
    panel.set_yticks(range(len(counted)), [name for _, name in counted], parse_math=False)
    panel.set_xlabel("targets", fontsize=8)


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def _centres(panel: Any, statistics: Mapping[str, Statistics]) -> None:
    """In pictures scaled to a square."""
    flat = [np.asarray(own.centres) for own in statistics.values()]
    y, x = np.concatenate(flat or [np.zeros(0)]).reshape(-1, 2).T
    grid, _, _ = np.histogram2d(y, x, bins=20, range=[[0, 1], [0, 1]])
    shown = panel.imshow(
        100 * grid / max(1, len(y)), extent=(0, 1, 1, 0), cmap=SHADES, aspect="auto"
    )
    panel.set_xticks([0, 0.5, 1])
    panel.set_yticks([0, 0.5, 1])
    bar = panel.figure.colorbar(shown, ax=panel, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("%", fontsize=8)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(NO_MATPLOTLIB) from None
    return Figure
