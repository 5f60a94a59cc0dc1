"""SVG charts: points, bars and grid cells stand where their values say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from pixellm_jax.report.charts import (
    Curve,
    ReferenceLine,
    Series,
    render_bars,
    render_curves,
    render_grid,
)


def parse(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def test_curve_goes_through_its_points():
    curve = Curve([(0.0, 0.0), (50.0, 0.5), (100.0, 1.0)], "red", markers=True)
    lines = [ReferenceLine(0.25, "level")]
    svg = parse(render_curves("a < b", [curve], x_label="step", reference_lines=lines))
    assert svg.get("aria-label") == "a < b"
    (line,) = svg.findall("polyline")
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in line.get("points").split())
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    (level,) = (line for line in svg.findall("line") if line.get("stroke-dasharray"))
    assert float(level.get("y1")) == pytest.approx(y0 + 0.25 * (y2 - y0), abs=0.1)
    texts = [text.text for text in svg.findall("text")]
    assert texts[0] == "a < b" and "level 0.25" in texts and "step" in texts
    assert len(svg.findall("circle")) == 3


@pytest.mark.parametrize("largest", [0.0, 1e-3, 0.83, 1.0, 7.0, 60.0, 1000.0, 1234.0])
def test_axes_hold_every_value(largest):
    svg = parse(render_curves("", [Curve([(largest, largest)], "red")], x_label=""))
    x, y = map(float, svg.find("polyline").get("points").split(","))
    width, height = map(float, svg.get("viewBox").split()[2:])
    assert 0 < x <= width and 0 < y <= height
    assert 3 <= len(svg.findall("line")) <= 7


def test_bars_are_as_high_as_their_counts():
    edges = [0.0, 1.0, 2.0, 3.0]
    svg = parse(render_bars("a < b", [Series("x", [4, 0, 2], "red")], edges, x_label="y"))
    heights = [float(r.get("height")) for r in svg.iter("rect")]
    assert len(heights) == 2 and heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert svg.get("aria-label") == "a < b"


def test_grid_merges_counts_above_its_maximum():
    counts = {(1, 1): 5, (9, 30): 2, (30, 9): 3, (9, 9): 1}
    svg = parse(render_grid("counts", counts, max_value=9, x_label="true", y_label="written"))
    titles = [title.text for title in svg.iter("title")]
    assert titles == ["true 1, written 1: 5", "true 9+, written 9+: 6"]
