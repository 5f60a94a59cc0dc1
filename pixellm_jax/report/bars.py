"""Histograms as SVG elements, for a page without scripts: bars, and a grid of counts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pixellm_jax.report.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    draw_line,
    draw_text,
    find_ticks,
)


class Layer(NamedTuple):
    """Counts of the bins, drawn upon the layers before. `colour`: of CSS."""

    name: str
    counts: Sequence[int]
    colour: str


def draw_bars(title: str, layers: Sequence[Layer], edges: Sequence[float], *, across: str) -> str:
    """Stacked counts of bins with these equally spaced edges. `across`: what the edges are."""
    totals = [sum(column) for column in zip(*(layer.counts for layer in layers), strict=True)]
    ticks = find_ticks(float(max(totals, default=0)))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    step = wide / len(totals)
    parts = [draw_text(12.0, 16.0, title, "font-weight='600' font-size='14'")]
    for tick in ticks:
        down = round(HEIGHT - BOTTOM - high * tick / ticks[-1], 1)
        parts.append(draw_line(LEFT, down, WIDTH - RIGHT, down, "var(--edge, #ddd)"))
        parts.append(draw_text(LEFT - 6, down + 4, f"{tick:g}", _faint("end")))
    heights = [0] * len(totals)
    for layer in layers:
        for place, count in enumerate(layer.counts):
            heights[place] += count
            box = (
                LEFT + step * place + 1,
                HEIGHT - BOTTOM - high * heights[place] / ticks[-1],
                step - 2,
                high * count / ticks[-1],
            )
            about = f"{edges[place]:g} to {edges[place + 1]:g}, {layer.name}: {count}"
            if count:
                parts.append(_box(box, layer.colour, about))
    for place in range(0, len(edges), max(1, (len(edges) - 1) // 5)):
        right = round(LEFT + step * place, 1)
        anchor = "end" if place == len(edges) - 1 else "middle"
        parts.append(draw_text(right, HEIGHT - BOTTOM + 16, f"{edges[place]:g}", _faint(anchor)))
    parts.append(draw_text(WIDTH - RIGHT, HEIGHT - 3, across, _faint("end")))
    return _svg(title, [*parts, *_names([layer for layer in layers if any(layer.counts)])])


def draw_grid(
    title: str, counts: Mapping[tuple[int, int], int], *, most: int, across: str, down: str
) -> str:
    """How often each pair (across, down) of numbers comes; `most` stands for itself and above.

    The diagonal, where both are the same, is in CSS colour `--good`, the rest in `--bad`.
    """
    cells: dict[tuple[int, int], int] = {}
    for (x, y), count in counts.items():
        place = min(x, most), min(y, most)
        cells[place] = cells.get(place, 0) + count
    side = max((max(place) for place in cells), default=0) + 1
    names = [f"{value}+" if value == most else str(value) for value in range(side)]
    left, top = LEFT + 8, TOP + 16
    wide, high = (WIDTH - left - RIGHT) / side, (HEIGHT - top - 18) / side
    largest = max(cells.values(), default=1)
    parts = [draw_text(12.0, 16.0, title, "font-weight='600' font-size='14'")]
    parts.append(draw_text(WIDTH - RIGHT, top - 6, f"{across} →", _faint("end")))
    parts.append(draw_text(left, top - 6, f"{down} ↓", _faint("start")))
    for value, name in enumerate(names):
        parts.append(draw_text(left + wide * (value + 0.5), HEIGHT - 4, name, _faint("middle")))
        middle = top + high * (value + 0.5) + 4
        parts.append(draw_text(left - 6, middle, name, _faint("end")))
    for (x, y), count in sorted(cells.items()):
        box = left + wide * x + 1, top + high * y + 1, wide - 2, high - 2
        about = f"{across} {names[x]}, {down} {names[y]}: {count}"
        strength = round(0.15 + 0.85 * (count / largest) ** 0.5, 2)
        parts.append(_box(box, f"var(--{'good' if x == y else 'bad'})", about, strength))
        spot = round(box[0] + box[2] / 2, 1), round(box[1] + box[3] / 2 + 4, 1)
        parts.append(draw_text(*spot, str(count), "text-anchor='middle'"))
    return _svg(title, parts)


def _names(layers: Sequence[Layer]) -> list[str]:
    """A legend in the upper right corner, where there is more than one layer."""
    parts, right = list[str](), WIDTH - RIGHT
    for layer in reversed(layers if len(layers) > 1 else ()):
        parts.append(draw_text(right, 16.0, layer.name, _faint("end")))
        right -= 6.4 * len(layer.name) + 14
        parts.append(_box((right, 8.0, 9.0, 9.0), layer.colour, layer.name))
        right -= 10
    return parts


def _box(
    box: tuple[float, float, float, float], colour: str, about: str, opacity: float = 1.0
) -> str:
    x, y, width, height = (round(value, 1) for value in box)
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="1.5"'
    title = f"<title>{html.escape(about)}</title>"
    return f'<rect {place} style="fill:{colour}" opacity="{opacity:g}">{title}</rect>'


def _faint(anchor: str) -> str:
    return f"text-anchor='{anchor}' opacity='.65'"


def _svg(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{html.escape(title)}" '
        f'font-size="11" fill="currentColor" font-family="inherit">{"".join(parts)}</svg>'
    )
