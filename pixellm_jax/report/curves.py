"""A chart of curves as an SVG element, for a page without scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 460.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 12.0, 34.0, 34.0
"""Size of a chart, and the margins around its curves."""


MOST_TICKS = 6
"""Numbers along an axis, 0 left out."""


class Curve(NamedTuple):
    """Points (x, y) of rising x. `colour`: of CSS. `dots`: every point is marked."""

    points: Sequence[tuple[float, float]]
    colour: str
    dots: bool = False


class Level(NamedTuple):
    """A dashed line across the chart, with its name."""

    y: float
    name: str


def draw_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    across: str,
    levels: Sequence[Level] = (),
    top: float = 0.0,
) -> str:
    """Curves over x from 0, y from 0 to `top` at least. `across`: what x is.

    Text is in the colour of the page's text, lines of the grid in CSS variable `--edge`.
    """
    points = [point for curve in curves for point in curve.points]
    x_ticks = find_ticks(max((x for x, _ in points), default=1.0))
    y_ticks = find_ticks(max([top, *(y for _, y in points), *(level.y for level in levels)]))

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - RIGHT) * x / x_ticks[-1]
        down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / y_ticks[-1]
        return round(right, 1), round(down, 1)

    parts = [draw_text(12.0, 16.0, title, "font-weight='600' font-size='14'")]
    for y in y_ticks:
        left, down = place(0.0, y)
        parts.append(draw_line(left, down, WIDTH - RIGHT, down, "var(--edge, #ddd)"))
        parts.append(draw_text(left - 6, down + 4, f"{y:g}", "text-anchor='end' opacity='.65'"))
    for x in x_ticks:
        right, bottom = place(x, 0.0)
        anchor = "end" if x == x_ticks[-1] else "middle"
        parts.append(
            draw_text(right, bottom + 16, f"{x:g}", f"text-anchor='{anchor}' opacity='.65'")
        )
    parts.append(draw_text(WIDTH - RIGHT, HEIGHT - 3, across, "text-anchor='end' opacity='.65'"))
    for level in levels:
        left, down = place(0.0, level.y)
        parts.append(
            draw_line(left, down, WIDTH - RIGHT, down, "currentColor", "stroke-dasharray='4 4'")
        )
        label = f"{level.name} {level.y:.2f}"
        parts.append(draw_text(WIDTH - RIGHT, down - 4, label, "text-anchor='end' opacity='.8'"))
    for curve in curves:
        parts += _curve([place(x, y) for x, y in curve.points], curve)
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{html.escape(title)}" '
        f'font-size="11" fill="currentColor" font-family="inherit">{"".join(parts)}</svg>'
    )


def _curve(places: Sequence[tuple[float, float]], curve: Curve) -> list[str]:
    path = " ".join(f"{x},{y}" for x, y in places)
    line = f'<polyline points="{path}" fill="none" stroke-width="2" stroke-linejoin="round" '
    parts = [f'{line}style="stroke:{curve.colour}"/>']
    for x, y in places if curve.dots else ():
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" style="fill:{curve.colour}"/>')
    return parts


def draw_line(x: float, y: float, to_x: float, to_y: float, colour: str, more: str = "") -> str:
    """A line; `colour`: of CSS."""
    place = f'x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}"'
    return f'<line {place} style="stroke:{colour}" opacity=".8" {more}/>'


def draw_text(x: float, y: float, text: str, more: str) -> str:
    """Text, escaped; `more`: attributes."""
    return f'<text x="{x}" y="{y}" {more}>{html.escape(text)}</text>'


def find_ticks(most: float) -> list[float]:
    """Round numbers from 0 to one that is not below `most`: 0.83 -> 0, 0.2, ..., 1."""
    most = most if most > 0 else 1.0
    size = 10.0 ** math.floor(math.log10(most))
    counts = ((fine, math.ceil(most / (fine * size) - 1e-9)) for fine in (0.2, 0.25, 0.5, 1, 2))
    fine, count = next(pair for pair in counts if pair[1] <= MOST_TICKS)
    return [round(fine * size * i, 12) for i in range(count + 1)]
