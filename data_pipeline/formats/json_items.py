"""Streaming JSON reader: yields the items of a large file with their byte ranges.

Published indices reach gigabytes, mostly polygons. A reader scans such a file once, keeps a few
numbers and the byte range of every item, and fetches single items again later. Only a buffer of the
file is in memory.
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
"""Maximum length of an item, in characters."""

_CHUNK = 2**20
_WHITE_SPACE = " \t\n\r"


class Span(NamedTuple):
    """Byte range of an item in its file."""

    start: int
    length: int


class Item(NamedTuple):
    """An element of the list `key` of the top-level object; `key` is "" if the file is a list.

    A member of the top-level object that is not a list is one item.
    """

    key: str
    value: Any
    span: Span


def items(path: Path) -> Iterator[Item]:
    """Yield all items of a JSON file, in file order.

        {"info": 1, "images": [{"id": 7}, {"id": 8}]}
            ->  ("info", 1, ...)  ("images", {"id": 7}, ...)  ("images", {"id": 8}, ...)

    Raises:
        InputError: the file is missing, truncated, not JSON in UTF-8, or an item exceeds
            `ITEM_LIMIT`. The items before the damage are yielded first.
    """
    try:
        with path.open("rb") as file:
            yield from _Scanner(file, path).document()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror})") from None


def fetch(path: Path, span: Span) -> Any:
    """Read one item again, by its byte range.

    Raises:
        DamagedError: the range contains no item any more: the file has changed.
    """
    try:
        with path.open("rb") as file:
            file.seek(span.start)
            return json.loads(file.read(span.length))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"item at byte {span.start} of {path.name!r}: {error}") from None


class _Scanner:
    """Incremental parser of a file with a window on its text.

    Attributes:
        text: decoded text of the window.
        position: index of the next unread character of the window.
        anchor: an index into the window, at most `position`, and its byte offset in the file.
        ended: whether the whole file has been read.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self.file = file
        self.path = path
        self.text = ""
        self.position = 0
        self.anchor = (0, 0)
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
                raise self.error("expected a list or an object")
        if self.peek():
            raise self.error("expected the end of the file")

    def members(self) -> Iterator[Item]:
        self.position += 1
        if self.peek() == "}":
            self.position += 1
            return
        while True:
            key, _ = self.value()
            if not isinstance(key, str) or self.peek() != ":":
                raise self.error("expected a key and a colon")
            self.position += 1
            if self.peek() == "[":
                yield from self.elements(key)
            else:
                yield Item(key, *self.value())
            if self.separator("}"):
                return

    def elements(self, key: str) -> Iterator[Item]:
        self.position += 1
        if self.peek() == "]":
            self.position += 1
            return
        while True:
            yield Item(key, *self.value())
            if self.separator("]"):
                return

    def separator(self, end: str) -> bool:
        """Consume a comma (False) or the end of a list or object (True)."""
        character = self.peek()
        if character not in (",", end) or not character:
            raise self.error(f"expected a comma or {end!r}")
        self.position += 1
        return character == end

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in _WHITE_SPACE:
                self.position += 1
            if self.position < len(self.text) or not self.read_more(_CHUNK):
                return self.text[self.position : self.position + 1]

    def value(self) -> tuple[Any, Span]:
        """Parse one value, and read more of the file until it is complete."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except (ValueError, RecursionError) as error:
                unread = len(self.text) - self.position
                if isinstance(error, RecursionError) or unread > ITEM_LIMIT:
                    raise self.error("an item that is not JSON, or too long or deep") from None
                if not self.read_more(max(_CHUNK, unread)):
                    raise self.error("not JSON, or cut off") from None
                continue
            # A number at the end of the window may be incomplete, such as 1 of 1e+5.
            if end + 3 > len(self.text) and self.read_more(_CHUNK):
                continue
            start = self.byte_offset(self.position)
            self.position = end
            return value, Span(start, self.byte_offset(end) - start)

    def read_more(self, size: int) -> bool:
        """Drop the consumed text and extend the window. False at the end of the file."""
        if self.ended:
            return False
        data = self.file.read(size)
        self.ended = not data
        try:
            text = self.utf8.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8 ({error.reason})") from None
        self.anchor = (0, self.byte_offset(self.position))
        self.text = self.text[self.position :] + text
        self.position = 0
        return True

    def byte_offset(self, index: int) -> int:
        """Return the byte offset in the file of an index into the window; advance the anchor."""
        anchor, offset = self.anchor
        text = self.text[anchor:index]
        offset += len(text) if text.isascii() else len(text.encode("utf-8"))
        self.anchor = (index, offset)
        return offset

    def error(self, what: str) -> InputError:
        offset = self.byte_offset(self.position)
        return InputError(f"{str(self.path)!r} near byte {offset}: {what}; download the file again")
