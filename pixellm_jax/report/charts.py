"""Charts as SVG elements for pages without scripts: curves, stacked histograms, count grids.

Text takes the colour of the page's text, grid lines the CSS variable `--edge`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 460.0
"""Width of a chart, in SVG user units."""

HEIGHT = 270.0
"""Height of a chart, in SVG user units."""

LEFT, RIGHT, TOP, BOTTOM = 40.0, 12.0, 34.0, 34.0
"""Margins around the plotting area, in SVG user units."""

MAX_TICKS = 6
"""Maximum number of ticks along an axis, not counting 0."""


class Curve(NamedTuple):
    """A polyline.

    Attributes:
        points: (x, y) pairs in order of increasing x.
        colour: a CSS colour.
        markers: whether every point is marked with a dot.
    """

    points: Sequence[tuple[float, float]]
    colour: str
    markers: bool = False


class ReferenceLine(NamedTuple):
    """A dashed horizontal line, labelled with its name and its value."""

    y: float
    name: str


class Series(NamedTuple):
    """One layer of a stacked histogram: a count per bin, in a CSS colour."""

    name: str
    counts: Sequence[int]
    colour: str


def render_curves(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    reference_lines: Sequence[ReferenceLine] = (),
    y_max: float = 0.0,
) -> str:
    """Render curves over axes that start at 0; the y axis reaches at least `y_max`."""
    points = [point for curve in curves for point in curve.points]
    levels = [line.y for line in reference_lines]
    x_ticks = find_ticks(max((x for x, _ in points), default=1.0))
    y_ticks = find_ticks(max([y_max, *(y for _, y in points), *levels]))

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - RIGHT) * x / x_ticks[-1]
        down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / y_ticks[-1]
        return round(right, 1), round(down, 1)

    parts = [_title(title)]
    for y in y_ticks:
        left, down = to_pixels(0.0, y)
        parts += _grid_line(left, down, y)
    for x in x_ticks:
        right, bottom = to_pixels(x, 0.0)
        anchor = "end" if x == x_ticks[-1] else "middle"
        parts.append(_text(right, bottom + 16, f"{x:g}", _faint(anchor)))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 3, x_label, _faint("end")))
    for line in reference_lines:
        left, down = to_pixels(0.0, line.y)
        parts.append(
            _line(left, down, WIDTH - RIGHT, down, "currentColor", "stroke-dasharray='4 4'")
        )
        label = f"{line.name} {line.y:.2f}"
        parts.append(_text(WIDTH - RIGHT, down - 4, label, "text-anchor='end' opacity='.8'"))
    for curve in curves:
        parts += _polyline([to_pixels(x, y) for x, y in curve.points], curve)
    return _svg(title, parts)


def render_bars(
    title: str, series: Sequence[Series], edges: Sequence[float], *, x_label: str
) -> str:
    """Render a histogram of stacked counts over bins with equally spaced `edges`."""
    totals = [sum(column) for column in zip(*(one.counts for one in series), strict=True)]
    ticks = find_ticks(float(max(totals, default=0)))
    plot_width = WIDTH - LEFT - RIGHT
    plot_height = HEIGHT - TOP - BOTTOM
    step = plot_width / len(totals)
    parts = [_title(title)]
    for tick in ticks:
        down = round(HEIGHT - BOTTOM - plot_height * tick / ticks[-1], 1)
        parts += _grid_line(LEFT, down, tick)
    heights = [0] * len(totals)
    for one in series:
        for i, count in enumerate(one.counts):
            heights[i] += count
            box = (
                LEFT + step * i + 1,
                HEIGHT - BOTTOM - plot_height * heights[i] / ticks[-1],
                step - 2,
                plot_height * count / ticks[-1],
            )
            tooltip = f"{edges[i]:g} to {edges[i + 1]:g}, {one.name}: {count}"
            if count:
                parts.append(_box(box, one.colour, tooltip))
    for i in range(0, len(edges), max(1, (len(edges) - 1) // 5)):
        right = round(LEFT + step * i, 1)
        anchor = "end" if i == len(edges) - 1 else "middle"
        parts.append(_text(right, HEIGHT - BOTTOM + 16, f"{edges[i]:g}", _faint(anchor)))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 3, x_label, _faint("end")))
    return _svg(title, [*parts, *_legend([one for one in series if any(one.counts)])])


def render_grid(
    title: str,
    counts: Mapping[tuple[int, int], int],
    *,
    max_value: int,
    x_label: str,
    y_label: str,
) -> str:
    """Render a grid of counts (a confusion matrix) of (x, y) pairs of non-negative integers.

    Values above `max_value` share its row and column. Cells on the diagonal (x = y) have the CSS
    colour `--good`, the others `--bad`.
    """
    cells: dict[tuple[int, int], int] = {}
    for (x, y), count in counts.items():
        place = min(x, max_value), min(y, max_value)
        cells[place] = cells.get(place, 0) + count
    side = max((max(place) for place in cells), default=0) + 1
    names = [f"{value}+" if value == max_value else str(value) for value in range(side)]
    left = LEFT + 8
    top = TOP + 16
    cell_width = (WIDTH - left - RIGHT) / side
    cell_height = (HEIGHT - top - 18) / side
    largest = max(cells.values(), default=1)
    parts = [_title(title)]
    parts.append(_text(WIDTH - RIGHT, top - 6, f"{x_label} →", _faint("end")))
    parts.append(_text(left, top - 6, f"{y_label} ↓", _faint("start")))
    for value, name in enumerate(names):
        centre = left + cell_width * (value + 0.5)
        parts.append(_text(centre, HEIGHT - 4, name, _faint("middle")))
        middle = top + cell_height * (value + 0.5) + 4
        parts.append(_text(left - 6, middle, name, _faint("end")))
    for (x, y), count in sorted(cells.items()):
        box = (
            left + cell_width * x + 1,
            top + cell_height * y + 1,
            cell_width - 2,
            cell_height - 2,
        )
        tooltip = f"{x_label} {names[x]}, {y_label} {names[y]}: {count}"
        opacity = round(0.15 + 0.85 * (count / largest) ** 0.5, 2)
        parts.append(_box(box, f"var(--{'good' if x == y else 'bad'})", tooltip, opacity))
        right = round(box[0] + box[2] / 2, 1)
        down = round(box[1] + box[3] / 2 + 4, 1)
        parts.append(_text(right, down, str(count), "text-anchor='middle'"))
    return _svg(title, parts)


def find_ticks(value: float) -> list[float]:
    """Return round numbers from 0 up to one not below `value`: 0.83 -> 0, 0.2, ..., 1."""
    value = value if value > 0 else 1.0
    size = 10.0 ** math.floor(math.log10(value))
    counts = ((step, math.ceil(value / (step * size) - 1e-9)) for step in (0.2, 0.25, 0.5, 1, 2))
    step, count = next(pair for pair in counts if pair[1] <= MAX_TICKS)
    return [round(step * size * i, 12) for i in range(count + 1)]


def _svg(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(title)}" '
        f'font-size="11" fill="currentColor" font-family="inherit">{"".join(parts)}</svg>'
    )


def _title(title: str) -> str:
    return _text(12.0, 16.0, title, "font-weight='600' font-size='14'")


def _grid_line(left: float, down: float, value: float) -> list[str]:
    """Return a horizontal grid line and its label on the y axis."""
    return [
        _line(left, down, WIDTH - RIGHT, down, "var(--edge, #ddd)"),
        _text(left - 6, down + 4, f"{value:g}", _faint("end")),
    ]


def _legend(series: Sequence[Series]) -> list[str]:
    """Return a legend for the upper right corner if there is more than one series."""
    parts = list[str]()
    right = WIDTH - RIGHT
    for one in reversed(series if len(series) > 1 else ()):
        parts.append(_text(right, 16.0, one.name, _faint("end")))
        right -= 6.4 * len(one.name) + 14
        parts.append(_box((right, 8.0, 9.0, 9.0), one.colour, one.name))
        right -= 10
    return parts


def _polyline(pixels: Sequence[tuple[float, float]], curve: Curve) -> list[str]:
    path = " ".join(f"{x},{y}" for x, y in pixels)
    line = f'<polyline points="{path}" fill="none" stroke-width="2" stroke-linejoin="round" '
    parts = [f'{line}style="stroke:{curve.colour}"/>']
    for x, y in pixels if curve.markers else ():
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" style="fill:{curve.colour}"/>')
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, attributes: str = "") -> str:
    ends = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    return f'<line {ends} style="stroke:{colour}" opacity=".8" {attributes}/>'


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x}" y="{y}" {attributes}>{escape(text)}</text>'


def _box(
    box: tuple[float, float, float, float], colour: str, tooltip: str, opacity: float = 1.0
) -> str:
    x, y, width, height = (round(value, 1) for value in box)
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="1.5"'
    title = f"<title>{escape(tooltip)}</title>"
    return f'<rect {place} style="fill:{colour}" opacity="{opacity:g}">{title}</rect>'


def _faint(anchor: str) -> str:
    return f"text-anchor='{anchor}' opacity='.65'"
