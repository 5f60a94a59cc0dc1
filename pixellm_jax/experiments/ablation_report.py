"""Ablation results: one JSON line per run, a Markdown table and a plot over all runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pixellm_jax.errors import InputError
from pixellm_jax.files import whole_file, write_whole
from pixellm_jax.images.overlay import colours

RESULTS, TABLE, PLOT = "ablations.jsonl", "ablations.md", "ablations.png"
NO_MATPLOTLIB = "the plot needs matplotlib: pip install 'pixellm_jax[figures]'"


class Result(NamedTuple):
    """Result of one run; scores and losses are teacher-forced, on held-out scenes.

    Attributes:
        name: setting of the grid.
        seed: seed of the initial weights and of the data order.
        changes: dotted key of the recipe -> value.
        parameters: number of parameters of the model.
        steps: optimiser steps.
        giou: mean IoU over targets, 0 to 1.
        ciou: cumulative IoU, 0 to 1.
        loss: sum of the three losses below.
        text: cross-entropy of the answer tokens.
        mask_bce: weighted binary cross-entropy of the masks.
        mask_dice: weighted dice loss of the masks.
        seconds_per_step: median.
        seconds: wall time of the run, compilation included; of an interrupted run, since its last
            resume.
        left_out: conversations over a budget, never trained on.
    """

    name: str
    seed: int
    changes: Mapping[str, Any]
    parameters: int
    steps: int
    giou: float
    ciou: float
    loss: float
    text: float
    mask_bce: float
    mask_dice: float
    seconds_per_step: float
    seconds: float
    left_out: int


class Group(NamedTuple):
    """The runs of one setting, which differ in their seed only."""

    name: str
    results: tuple[Result, ...]

    def mean(self, field: str) -> float:
        return statistics.fmean(self.values(field))

    def values(self, field: str) -> list[float]:
        return [float(getattr(result, field)) for result in self.results]


def read_results(folder: Path) -> list[Result]:
    """Return the results so far; an empty list where there is no file.

    Raises:
        InputError: a line is not a result.
    """
    path = folder / RESULTS
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            results.append(Result(**json.loads(line)))
        except (ValueError, TypeError):
            raise InputError(
                f"{path}: line {number} is no result of a run; remove the line to repeat the run"
            ) from None
    return results


def append_result(folder: Path, result: Result) -> None:
    """Append a line in a single write, so that several processes may share the file."""
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(result._asdict()) + "\n")


def group_results(results: Sequence[Result]) -> list[Group]:
    """Group results by setting, the best mean gIoU first, with seeds in ascending order."""
    names = dict.fromkeys(result.name for result in results)
    ordered = sorted(results, key=lambda result: result.seed)
    groups = [Group(name, tuple(r for r in ordered if r.name == name)) for name in names]
    return sorted(groups, key=lambda group: group.mean("giou"), reverse=True)


def write_report(folder: Path) -> None:
    """Write the table and the plot of a folder's results, each atomically.

    Raises:
        InputError: matplotlib is not installed, or a line of the results is damaged.
    """
    groups = group_results(read_results(folder))
    if not groups:
        return
    write_whole(folder / TABLE, format_groups(groups))
    with whole_file(folder / PLOT) as path:
        draw_groups(groups).savefig(path, format="png", dpi=150)


def format_groups(groups: Sequence[Group]) -> str:
    """Return a Markdown table; spreads are sample standard deviations over the seeds."""
    head = "setting | changes | parameters | gIoU | cIoU | text loss | steps | s/step | seeds"
    lines = [f"| {head} |", "|---|---|" + "---:|" * 7]
    for group in groups:
        first = group.results[0]
        cells = (
            group.name,
            format_changes(first.changes),
            f"{first.parameters:,}",
            *(_format_spread(group.values(field)) for field in ("giou", "ciou", "text")),
            str(first.steps),
            f"{group.mean('seconds_per_step'):.3f}",
            ", ".join(str(result.seed) for result in group.results),
        )
        lines.append(f"| {' | '.join(cells)} |")
    left_out = {group.name: int(sum(group.values("left_out"))) for group in groups}
    if any(left_out.values()):
        counts = ", ".join(f"{name} {count}" for name, count in left_out.items() if count)
        lines += ["", f"Conversations over budget, never trained on: {counts}."]
    return "\n".join(lines) + "\n"


def format_changes(changes: Mapping[str, Any]) -> str:
    """Return changes as Markdown code: `model.vision.taps=-2,-4`."""
    texts = [
        f"`{key}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}`"
        for key, value in changes.items()
    ]
    return " ".join(texts) or "none"


def draw_groups(groups: Sequence[Group]) -> Any:
    """Return a figure with a row per setting: a dot for every seed's gIoU, a bar for their mean.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = figure_class()(figsize=(7, 1.1 + 0.42 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    colour = tuple(colours(1)[0] / 255)
    for row, group in enumerate(reversed(groups)):
        values = group.values("giou")
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.6, markersize=6)
        axes.plot([group.mean("giou")], [row], "|", color="black", markersize=16)
    axes.set_yticks(range(len(groups)), [group.name for group in reversed(groups)])
    axes.set_xlabel("gIoU on held-out scenes; bar: mean over seeds")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def figure_class() -> Any:
    """Return matplotlib's `Figure`, which needs no display.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(NO_MATPLOTLIB) from None
    return Figure


def _format_spread(values: Sequence[float]) -> str:
    """Format mean and deviation, "0.612 ± 0.012"; a single value has no deviation."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"
