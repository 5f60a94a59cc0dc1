"""The items of a large JSON file, one after the other, and where each lies, to read it again.

Published indices reach gigabytes, most of it polygons. A reader goes through such a file once,
keeps the few numbers that it needs of every item, and fetches the item again when its turn comes.
Only a buffer is in memory, never the file.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DamagedError
from pixellm_jax.errors import InputError

ITEM_LIMIT = 64 * 2**20
"""Longest item, in characters."""

_CHUNK = 2**20
_SPACE = " \t\n\r"


class Span(NamedTuple):
    """Byte range of an item in its file."""

    start: int
    length: int


class Item(NamedTuple):
    """An element of the list `key` of the top-level object; `key` is "" if the file is a list.

    A member of the top-level object that is not a list counts as one item.
    """

    key: str
    value: Any
    span: Span


def items(path: Path) -> Iterator[Item]:
    """All items of a JSON file, in the order of the file.

        {"info": 1, "images": [{"id": 7}, {"id": 8}]}
            ->  ("info", 1, ...)  ("images", {"id": 7}, ...)  ("images", {"id": 8}, ...)

    Raises:
        InputError: no such file, not JSON in UTF-8, cut off, or an item beyond `ITEM_LIMIT`. The
            items before the damage have been given out by then.
    """
    try:
        with path.open("rb") as file:
            yield from _Scanner(file, path).document()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror})") from None


def fetch(path: Path, span: Span) -> Any:
    """One item again, by its place in the file.

    Raises:
        DamagedError: there is no such item any more: the file has changed since it was listed.
    """
    try:
        with path.open("rb") as file:
            file.seek(span.start)
            return json.loads(file.read(span.length))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"item at byte {span.start} of {path.name!r}: {error}") from None


class _Scanner:
    """A window on the text of a file: `text[at:]` is unread.

    known: a place in the window, at or before `at`, and its byte in the file.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.known = "", 0, (0, 0)
        self.ended = False
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.decoder = json.JSONDecoder()

    def document(self) -> Iterator[Item]:
        match self.peek():
            case "[":
                yield from self.elements("")
            case "{":
                yield from self.members()
            case _:
                raise self.damage("expected a list or an object")
        if self.peek():
            raise self.damage("expected the end of the file")

    def members(self) -> Iterator[Item]:
        self.at += 1
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            key, _ = self.value()
            if not isinstance(key, str) or self.peek() != ":":
                raise self.damage("expected a key and a colon")
            self.at += 1
            if self.peek() == "[":
                yield from self.elements(key)
            else:
                yield Item(key, *self.value())
            if self.separator("}"):
                return

    def elements(self, key: str) -> Iterator[Item]:
        self.at += 1
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield Item(key, *self.value())
            if self.separator("]"):
                return

    def separator(self, end: str) -> bool:
        """Steps over a comma (False) or over the end of a list or object (True)."""
        found = self.peek()
        if found not in (",", end) or not found:
            raise self.damage(f"expected a comma or {end!r}")
        self.at += 1
        return found == end

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text) or not self.more(_CHUNK):
                return self.text[self.at : self.at + 1]

    def value(self) -> tuple[Any, Span]:
        """Reads one value; more of the file until it is whole."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                unread = len(self.text) - self.at
                if isinstance(error, RecursionError) or unread > ITEM_LIMIT:
                    raise self.damage("an item that is not JSON, or too long or deep") from None
                if not self.more(max(_CHUNK, unread)):
                    raise self.damage("not JSON, or cut off") from None
                continue
            # A number near the end of the window may go on: 1 of 1e+5.
            if end + 3 > len(self.text) and self.more(_CHUNK):
                continue
            start = self.byte(self.at)
            self.at = end
            return value, Span(start, self.byte(end) - start)

    def more(self, size: int) -> bool:
        """Reads on, and forgets the text that has been read. False at the end of the file."""
        if self.ended:
            return False
        data = self.file.read(size)
        self.ended = not data
        try:
            text = self.utf8.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise self.damage(f"not UTF-8 ({error.reason})") from None
        self.known = 0, self.byte(self.at)
        self.text, self.at = self.text[self.at :] + text, 0
        return True

    def byte(self, at: int) -> int:
        """Place in the file of a place in the window, not before the last one asked for."""
        known, byte = self.known
        passed = self.text[known:at]
        self.known = at, byte + (len(passed) if passed.isascii() else len(passed.encode("utf-8")))
        return self.known[1]

    def damage(self, what: str) -> InputError:
        return InputError(
            f"{str(self.path)!r} near byte {self.byte(self.at)}: {what}; download the file again"
        )
