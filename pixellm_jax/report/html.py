"""Page kit: the skeleton of a self-contained HTML page, its style sheets and shared elements.

Pages work offline: style sheets are inlined, images are data URIs, and nothing else is loaded.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pixellm_jax.images.overlay import colours

GOOD = 0.75
"""Minimum IoU that is shown in green."""

FAIR = 0.5
"""Minimum IoU that is shown in yellow; anything below is red."""


class Tile(NamedTuple):
    """A headline number and its caption."""

    value: str
    caption: str


def render_page(
    title: str, body: str, *, style: str | None = None, script: str = "", restricted: bool = False
) -> str:
    """Render a whole page.

    Args:
        title: plain text, shown as the first heading.
        body: markup, already escaped.
        style: name of the style sheet to add to `page.css`, without its suffix.
        script: the only JavaScript of the page.
        restricted: add a Content-Security-Policy: the page can load nothing and run only `script`.
    """
    policy = ""
    if restricted:
        rules = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        if script:
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            rules += f"; script-src 'sha256-{digest}'"
        policy = f'<meta http-equiv="Content-Security-Policy" content="{rules}">\n'
    sheets = "".join(map(_read_sheet, ["page", style] if style else ["page"]))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{policy}<title>{escape(title)}</title>\n<style>{sheets}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def render_tile(tile: Tile) -> str:
    """Render a tile; the caller puts tiles into `<div class="tiles">`."""
    caption = f"<span>{escape(tile.caption)}</span>"
    return f'<div class="tile"><b>{escape(tile.value)}</b>{caption}</div>'


def render_plots(plots: Iterable[str]) -> str:
    """Render SVG charts as a grid of cards."""
    cards = "".join(f'<div class="plot">{plot}</div>' for plot in plots)
    return f'<div class="plots">{cards}</div>'


def render_table(rows: Sequence[Sequence[str]]) -> str:
    """Render a table; the first row is its head. A "[low, high]" after a number is set small."""
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(map(_render_cell, row))}</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def render_chip(number: int | None) -> str:
    """Render the number of a target, from 0, as a chip in its colour; "?" if it has no number."""
    if number is None:
        return '<span class="chip">?</span>'
    return f'<span class="chip" style="{target_style(number)}">{number + 1}</span>'


def target_style(number: int) -> str:
    """Return CSS for the colour of a target, numbered from 0, with black or white text on it."""
    red, green, blue = (int(value) for value in colours(number + 1)[number])
    luminance = (np.array([red, green, blue]) / 255) ** 2.2 @ (0.2126, 0.7152, 0.0722)
    return f"background:rgb({red},{green},{blue});color:{'#000' if luminance > 0.179 else '#fff'}"


def grade_iou(iou: float) -> str:
    """Return the CSS class of an IoU: "good", "fair" or "bad"."""
    return "good" if iou >= GOOD else "fair" if iou >= FAIR else "bad"


def embed_image(pixels: UInt8[np.ndarray, "y x 3"], kind: str = "webp", *, quality: int) -> str:
    """Encode an RGB image as a data URI.

    Args:
        pixels: RGB.
        kind: "webp" or "jpeg".
        quality: of the lossy encoder, 1 to 100.
    """
    options = {"method": 2} if kind == "webp" else {}
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind.upper(), quality=quality, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _read_sheet(name: str) -> str:
    sheet = resources.files(__package__).joinpath(f"{name}.css")
    return f"\n{sheet.read_text(encoding='utf-8')}"


def _render_cell(text: str) -> str:
    number, bracket, interval = text.partition(" [")
    if bracket and text[0] in "0123456789-+":
        small = f"<small>[{escape(interval)}</small>"
        return f'<td class="number">{escape(number)} {small}</td>'
    return f"<td>{escape(text)}</td>"
