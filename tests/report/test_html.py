"""The page kit: self-contained pages, escaped text, and style sheets that are installed."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import numpy as np
import pytest

from pixellm_jax.images.overlay import colours
from pixellm_jax.report.html import (
    Tile,
    embed_image,
    grade_iou,
    render_chip,
    render_page,
    render_table,
    render_tile,
)
from tests.support.pages import Page, decode_image

ROOT = Path(__file__).parents[2]
SHEETS = ROOT / "pixellm_jax" / "report"


@pytest.mark.parametrize("style", [None, "report", "samples"])
def test_page_inlines_its_style_sheets(style):
    page = render_page("a < b", "<p>text</p>", style=style)
    for name in ("page", style) if style else ("page",):
        assert (SHEETS / f"{name}.css").read_text(encoding="utf-8") in page
    assert Page(page).text.count("a < b") == 2  # title and heading
    assert Page(page).links == [] and "script" not in Page(page).tags


def policies(script: str) -> list[str | None]:
    page = Page(render_page("title", "", script=script, restricted=True))
    return [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]


def test_restricted_page_runs_its_script_only():
    (with_script,) = policies("run()")
    (without,) = policies("")
    assert with_script.startswith("default-src 'none'") and "script-src 'sha256-" in with_script
    assert without.startswith("default-src 'none'") and "script-src" not in without


def test_style_sheets_are_installed():
    patterns = re.search(r'package_data=\{\s*"": \[([^]]*)\]', (ROOT / "setup.py").read_text())
    assert patterns is not None
    known = re.findall(r'"([^"]+)"', patterns.group(1))
    files = [path.name for path in SHEETS.iterdir() if path.is_file() and path.suffix != ".py"]
    assert {"page.css", "published.json"} <= set(files)
    assert all(any(fnmatch.fnmatch(name, one) for one in known) for name in files)


def test_table_sets_intervals_small_and_escapes():
    table = render_table([["name", "a < b"], ["<i>", "0.5000 [0.4000, 0.6000]"]])
    page = Page(table)
    assert page.rows == [["name", "a < b"], ["<i>", "0.5000 [0.4000, 0.6000]"]]
    assert "<small>[0.4000, 0.6000]</small>" in table and "i" not in page.tags


def test_tile_is_escaped():
    page = Page(render_tile(Tile("1 < 2", "a & b")))
    assert page.text == "1 < 2a & b"


def test_chip_has_the_colour_of_the_overlay():
    red, green, blue = colours(3)[2]
    assert f"background:rgb({red},{green},{blue})" in render_chip(2)
    assert Page(render_chip(2)).text == "3" and Page(render_chip(None)).text == "?"


@pytest.mark.parametrize(
    ("iou", "name"), [(1.0, "good"), (0.75, "good"), (0.74, "fair"), (0.5, "fair"), (0.49, "bad")]
)
def test_grades_of_iou(iou, name):
    assert grade_iou(iou) == name


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_embedded_image_decodes(kind):
    pixels = np.full((11, 13, 3), 120, np.uint8)
    link = embed_image(pixels, kind, quality=90)
    assert link.startswith(f"data:image/{kind};base64,")
    np.testing.assert_allclose(decode_image(link).astype(int), pixels, atol=4)
