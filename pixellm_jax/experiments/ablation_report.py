"""Results of ablation runs: a line of JSON each, and the table and the plot of all of them."""

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
    """What became of one run.

    changes: dotted key of the recipe -> value. giou to mask_dice: on held-out scenes, the words of
    the answers given; `loss` is the sum of the three after it. seconds_per_step: the median.
    seconds: of all that the run took, compilation included; of a run that was broken off, its last
    part. left_out: conversations that were over a budget and never trained on.
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
    """The runs of one setting, which differ in their seed alone."""

    name: str
    results: tuple[Result, ...]

    def mean(self, field: str) -> float:
        return statistics.fmean(self.values(field))

    def values(self, field: str) -> list[float]:
        return [float(getattr(result, field)) for result in self.results]


def read_results(folder: Path) -> list[Result]:
    """What has been run so far; nothing where there is no file.

    Raises:
        InputError: a line is no result.
    """
    path, results = folder / RESULTS, []
    if not path.exists():
        return []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            results.append(Result(**json.loads(line)))
        except (ValueError, TypeError):
            raise InputError(
                f"{path}: line {number} is no result of a run; remove the line, and the run is "
                "done again"
            ) from None
    return results


def append_result(folder: Path, result: Result) -> None:
    """Adds a line in one write, so that several processes may share the file."""
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(result._asdict()) + "\n")


def group_results(results: Sequence[Result]) -> list[Group]:
    """By setting, the best mean gIoU first; seeds in order."""
    names = dict.fromkeys(result.name for result in results)
    ordered = sorted(results, key=lambda result: result.seed)
    groups = [Group(name, tuple(r for r in ordered if r.name == name)) for name in names]
    return sorted(groups, key=lambda group: group.mean("giou"), reverse=True)


def write_report(folder: Path) -> None:
    """Writes the table and the plot of the results in a folder, each whole or not at all.

    Raises:
        InputError: there is no matplotlib, or a line of the results is damaged.
    """
    groups = group_results(read_results(folder))
    if not groups:
        return
    write_whole(folder / TABLE, format_groups(groups))
    with whole_file(folder / PLOT) as made:
        draw_groups(groups).savefig(made, format="png", dpi=150)


def format_groups(groups: Sequence[Group]) -> str:
    """A Markdown table; spreads are sample standard deviations over the seeds."""
    head = "setting | changes | parameters | gIoU | cIoU | text loss | steps | s/step | seeds"
    lines = [f"| {head} |", "|---|---|" + "---:|" * 7]
    for group in groups:
        first = group.results[0]
        cells = (
            group.name,
            format_changes(first.changes),
            f"{first.parameters:,}",
            *(_spread(group.values(field)) for field in ("giou", "ciou", "text")),
            str(first.steps),
            f"{group.mean('seconds_per_step'):.3f}",
            ", ".join(str(result.seed) for result in group.results),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lost = {group.name: int(sum(group.values("left_out"))) for group in groups}
    if any(lost.values()):
        named = ", ".join(f"{name} {count}" for name, count in lost.items() if count)
        lines += ["", f"Conversations over budget, never trained on: {named}."]
    return "\n".join(lines) + "\n"


def format_changes(changes: Mapping[str, Any]) -> str:
    """As code of Markdown: `model.vision.taps=-2,-4`."""
    texts = [
        f"`{key}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}`"
        for key, value in changes.items()
    ]
    return " ".join(texts) or "none"


def draw_groups(groups: Sequence[Group]) -> Any:
    """A figure: gIoU of every seed as a dot, the mean of a setting as a bar across, best on top.

    Raises:
        InputError: there is no matplotlib.
    """
    figure = figure_class()(figsize=(7, 1.1 + 0.42 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    colour = tuple(colours(1)[0] / 255)
    for place, group in enumerate(reversed(groups)):
        values = group.values("giou")
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=6)
        axes.plot([group.mean("giou")], [place], "|", color="black", markersize=16)
    axes.set_yticks(range(len(groups)), [group.name for group in reversed(groups)])
    axes.set_xlabel("gIoU on held-out scenes; bar: mean over seeds")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def figure_class() -> Any:
    """The class of figures that needs no screen.

    Raises:
        InputError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(NO_MATPLOTLIB) from None
    return Figure


def _spread(values: Sequence[float]) -> str:
    """Mean and deviation: "0.612 ± 0.012"; one value has no deviation."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"
