"""Statistics of prepared data: counts per dataset, as tables and as a figure for a paper.

splits = find_splits(Path("prepared"), dataset="muse")
statistics = collect(splits)
print(statistics["muse"].describe("muse"))
Path("muse.png").write_bytes(render_figure(statistics, "png"))
"""

from __future__ import annotations

import io
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.example import Example
from data_pipeline.storage.stored import StoredSplit
from pixellm_jax.errors import InputError
from pixellm_jax.images import rle
from pixellm_jax.images.overlay import colours

COLUMNS = ("dataset", "split", "pictures", "questions", "targets", "left out")
"""Header of `count_rows`."""

COLOUR_MAP = "Blues"
NO_MATPLOTLIB = "a figure needs matplotlib: pip install 'pixellm_jax[figures]', or leave out --out"


@dataclass(kw_only=True)
class Statistics:
    """Counts of one dataset."""

    images: int = 0
    questions: int = 0
    empty: int = 0
    """Number of empty masks."""

    targets: Counter[int] = field(default_factory=Counter)
    """Targets per question, or per image where there are no questions."""

    names: Counter[str] = field(default_factory=Counter)
    """Shortest phrase of each target."""

    words: dict[str, Counter[int]] = field(
        default_factory=lambda: {"phrase": Counter(), "question": Counter(), "answer": Counter()}
    )
    """Number of words of preferred phrases, questions and answers."""

    shares: array[float] = field(default_factory=lambda: array("f"))
    """Area of each mask that is not empty, as a fraction of the area of its image."""

    centres: array[float] = field(default_factory=lambda: array("f"))
    """y and x of the centre of the bounding box of such a mask, 0..1."""

    def add(self, example: Example) -> None:
        """Count an example."""
        self.images += 1
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
        height, width = example.hw
        for mask in example.masks:
            area = rle.area(mask)
            if not area:
                self.empty += 1
                continue
            x, y, w, h = rle.box(mask)
            self.shares.append(area / (height * width))
            self.centres.extend(((y + h / 2) / height, (x + w / 2) / width))

    @property
    def unit(self) -> str:
        return "question" if self.questions else "picture"

    def describe(self, dataset: str) -> str:
        """Return histograms and summaries as text."""
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


def _binned(counter: Mapping[int, int], limit: int = 15) -> dict[str, int]:
    """Group numbers above `limit` in one bin: {1: 3, 40: 2} -> {"1": 3, "> 15": 2}."""
    bins = {str(n): count for n, count in sorted(counter.items()) if n <= limit}
    above = sum(count for n, count in counter.items() if n > limit)
    return bins | ({f"> {limit}": above} if above else {})


def collect(
    splits: Sequence[StoredSplit], on_example: Callable[[], object] = lambda: None
) -> dict[str, Statistics]:
    """Return the statistics of each dataset; `on_example` is called after each example."""
    statistics: dict[str, Statistics] = {}
    for stored in splits:
        counted = statistics.setdefault(stored.dataset, Statistics())
        for example in stored:
            counted.add(example)
            on_example()
    return statistics


def count_rows(splits: Sequence[StoredSplit]) -> list[tuple[Any, ...]]:
    """Return a row of `COLUMNS` per split."""
    return [
        (
            stored.dataset,
            stored.split,
            len(stored),
            *(stored.metadata[name] for name in ("turns", "targets")),
            stored.metadata["skipped"] + stored.metadata["parts_left_out"],
        )
        for stored in splits
    ]


def render_figure(statistics: Mapping[str, Statistics], file_format: str) -> bytes:
    """Render the figure as "png", "pdf" or "svg": bars for one dataset, else heat maps.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = load_figure_class()(figsize=(10.5, 6), layout="constrained")
    panels = dict(zip("abcdef", figure.subplots(2, 3).flat, strict=True))
    several = len(statistics) > 1
    with_targets = {
        name: counts for name, counts in statistics.items() if counts.targets.keys() - {0}
    }
    units = sorted({counts.unit for counts in with_targets.values()}, reverse=True)
    titles = {
        "a": f"targets per {' or '.join(units)}",
        "b": "words per phrase",
        "c": "words per question and answer",
        "d": "area of a mask, % of the picture",
        "e": "most frequent names",
        "f": "middle of a target in the picture",
    }
    _histograms(
        panels["a"], {name: counts.targets for name, counts in with_targets.items()}, several
    )
    _histograms(
        panels["b"],
        {name: counts.words["phrase"] for name, counts in with_targets.items()},
        several,
    )
    texts = {
        f"{name}, {what}" if several else what: counts.words[what]
        for name, counts in statistics.items()
        for what in ("question", "answer")
    }
    _histograms(panels["c"], texts, several)
    _shares(panels["d"], with_targets, several)
    _names(panels["e"], with_targets, several)
    _centres(panels["f"], with_targets)
    for letter, panel in panels.items():
        panel.set_title(f"({letter}) {titles[letter]}", fontsize=9, loc="left")
        panel.tick_params(labelsize=7)
        for edge in ("top", "right"):
            panel.spines[edge].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=200)
    return buffer.getvalue()


def _histograms(panel: Any, counts: Mapping[str, Counter[int]], several: bool) -> None:
    """Show histograms of integers in at most 30 bins; the last holds values beyond 99.5 %."""
    counts = {name: counter for name, counter in counts.items() if counter}
    ends = [np.quantile(list(counter.elements()), 0.995) for counter in counts.values()]
    width = 1 + int(max(ends, default=0)) // 30
    edges = np.arange(0, max(ends, default=0) + 2 * width, width) - 0.5
    values = {
        name: np.clip(list(counter.elements()), None, edges[-1]) for name, counter in counts.items()
    }
    _show(panel, edges, values, several)


def _shares(panel: Any, statistics: Mapping[str, Statistics], several: bool) -> None:
    edges = np.linspace(-2, 2, 33)
    logarithms = {
        name: np.log10(np.clip(100 * np.asarray(counts.shares), 0.01, 100))
        for name, counts in statistics.items()
    }
    _show(panel, edges, logarithms, several)
    panel.set_xticks(range(-2, 3), ["0.01", "0.1", "1", "10", "100"])


def _show(panel: Any, edges: np.ndarray, values: Mapping[str, np.ndarray], several: bool) -> None:
    """Show histograms, each in % of its sum."""
    rows = [
        np.histogram(counts, edges)[0] * 100 / max(1, len(counts)) for counts in values.values()
    ]
    if several and rows:
        shown = panel.pcolormesh(edges, np.arange(len(rows) + 1), np.array(rows), cmap=COLOUR_MAP)
        panel.set_yticks(np.arange(len(rows)) + 0.5, list(values), parse_math=False)
        panel.invert_yaxis()
        panel.figure.colorbar(shown, ax=panel, pad=0.02).ax.tick_params(labelsize=7)
        return
    for row, name, colour in zip(rows, values, colours(len(rows)) / 255, strict=True):
        panel.stairs(row, edges, fill=True, color=colour, alpha=1 / len(rows) ** 0.5, label=name)
    panel.set_ylabel("%", fontsize=8)
    if len(rows) > 1:
        panel.legend(fontsize=8, frameon=False)


def _names(
    panel: Any, statistics: Mapping[str, Statistics], several: bool, limit: int = 14
) -> None:
    counts = [
        (count, f"{_short(name)} ({dataset})" if several else _short(name))
        for dataset, counts in statistics.items()
        for name, count in counts.names.most_common(limit)
    ]
    counts = sorted(counts, reverse=True)[:limit][::-1]
    panel.barh(range(len(counts)), [count for count, _ in counts], color=colours(1)[0] / 255)
    panel.set_yticks(range(len(counts)), [name for _, name in counts], parse_math=False)
    panel.set_xlabel("targets", fontsize=8)


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def _centres(panel: Any, statistics: Mapping[str, Statistics]) -> None:
    """Show the density of centres in images scaled to a square."""
    flat = [np.asarray(counts.centres) for counts in statistics.values()]
    y, x = np.concatenate(flat or [np.zeros(0)]).reshape(-1, 2).T
    grid, _, _ = np.histogram2d(y, x, bins=20, range=[[0, 1], [0, 1]])
    shown = panel.imshow(
        100 * grid / max(1, len(y)), extent=(0, 1, 1, 0), cmap=COLOUR_MAP, aspect="auto"
    )
    panel.set_xticks([0, 0.5, 1])
    panel.set_yticks([0, 0.5, 1])
    bar = panel.figure.colorbar(shown, ax=panel, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("%", fontsize=8)


def load_figure_class() -> Any:
    """Import matplotlib's `Figure`.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(NO_MATPLOTLIB) from None
    return Figure
