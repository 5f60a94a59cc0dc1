"""Parsed HTML pages, and the images inside them."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID_TAGS = {"meta", "img", "br"}


class Page(HTMLParser):
    """A parsed page; parsing fails unless tags are closed in order.

    Attributes:
        elements: name and attributes of every element, in order.
        links: what the page refers to.
        rows: text of the cells of all tables.
        text: all text outside of style and script.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.links: list[str | None] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    @property
    def tags(self) -> list[str]:
        return [name for name, _ in self.elements]

    @property
    def classes(self) -> list[str]:
        return [attributes.get("class") or "" for _, attributes in self.elements]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of all elements with this name."""
        return [attributes for name, attributes in self.elements if name == tag]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside in ("style", "script"):
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


def decode_image(link: str) -> np.ndarray:
    """Decode an RGB image from a data URI."""
    scheme, _, data = link.partition(",")
    assert scheme in ("data:image/jpeg;base64", "data:image/webp;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
