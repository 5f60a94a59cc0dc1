"""Reader of user-supplied data in JSON Lines (docs/data-format.md explains the format).

{"image": "photos/1.jpg",
 "targets": [{"phrase": "the red cup", "mask": "masks/1.png"}],
 "conversations": [[{"question": "Where is it?", "answer": "Here: {seg}.", "targets": [0]}]]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DamagedError
from data_pipeline.example import SEG, Example, Target, Turn
from data_pipeline.formats.json_items import ITEM_LIMIT, Span, fetch
from data_pipeline.formats.label_map import read_label_map
from data_pipeline.formats.masks import area, encode, to_rle
from data_pipeline.reading import (
    Reading,
    check_split,
    check_text,
    find_index,
    path_inside,
    read_image_file,
)
from pixellm_jax.benchmark_question import IMAGE, Rle
from pixellm_jax.errors import InputError

LINE_KEYS = frozenset({"image", "key", "split", "targets", "void", "conversations"})
TARGET_KEYS = frozenset({"phrase", "mask"})
TURN_KEYS = frozenset({"question", "answer", "targets"})


class JsonlEntry(NamedTuple):
    """Location of a line in the file; `fault` is non-empty if the line cannot be read at all."""

    key: str
    split: str
    file: Path
    span: Span
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """Reader of `<root>/<file>`.

    A line with conversations becomes an example of kind "ready", a line with targets only an
    example of kind "names".
    """

    dataset: str = "jsonl"
    file: str = "data.jsonl"
    splits: tuple[str, ...] = ("train", "val", "test")

    def entries(self, root: Path, split: str) -> Sequence[JsonlEntry]:
        """Return the lines of a split in file order.

        Lines without a split belong to the first split. So do lines that are not JSON or name an
        unknown split, so that each is reported exactly once.

        Raises:
            InputError: an unknown split, no such file, or a line that is too long.
        """
        check_split(self, split)
        path = find_index([root / self.file])
        entries, keys, start = [], set(), 0
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(ITEM_LIMIT), b""), 1):
                if len(line) == ITEM_LIMIT and not line.endswith(b"\n"):
                    raise InputError(f"'{path}' line {number} has more than {ITEM_LIMIT} bytes")
                span, start = Span(start, len(line)), start + len(line)
                if not line.strip():
                    continue
                key, line_split, fault = _heading(line, number, self.splits)
                if key in keys:
                    key, fault = f"line {number}", fault or f"a second line of key {key!r}"
                keys.add(key)
                if line_split == split:
                    entries.append(JsonlEntry(key, split, path, span, fault))
        return entries

    def read(self, entry: JsonlEntry) -> Reading:
        if entry.fault:
            raise DamagedError(entry.fault)
        line = _object(fetch(entry.file, entry.span), LINE_KEYS, "the line")
        folder = entry.file.parent
        image, hw = read_image_file([path_inside(folder, line.get("image"))])
        values = _list(line.get("targets", []), "targets")
        targets, masks = [], []
        for number, value in enumerate(values):
            fields = _object(value, TARGET_KEYS, f"target {number}")
            phrase = check_text(fields.get("phrase"), f"phrase of target {number}")
            masks.append(_mask(fields.get("mask"), folder, hw, f"mask of target {number}"))
            targets.append(Target((phrase,), number))
        void = None
        if line.get("void") is not None:
            void = _mask(line["void"], folder, hw, "void")
        conversations, problems = _conversations(line.get("conversations"), len(targets))
        if not targets and not conversations:
            raise DamagedError("neither targets nor conversations")
        example = Example(
            key=entry.key,
            dataset=self.dataset,
            split=entry.split,
            kind="names" if line.get("conversations") is None else "ready",
            image=image,
            hw=hw,
            masks=tuple(masks),
            targets=tuple(targets),
            void=void if void is not None and area(void) else None,
            conversations=conversations,
        )
        return Reading(example, problems)

    def image_path(self, entry: JsonlEntry) -> Path:
        """Return the path of an entry's image.

        Raises:
            DamagedError: the line is unreadable or names no valid image path.
        """
        line = _object(fetch(entry.file, entry.span), LINE_KEYS, "the line")
        return path_inside(entry.file.parent, line.get("image"))


def _heading(line: bytes, number: int, splits: Sequence[str]) -> tuple[str, str, str]:
    """Return the key and split of a line, and why it cannot be read ("" if it can)."""
    key, first = f"line {number}", splits[0]
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return key, first, f"line {number} is not JSON ({error})"
    if not isinstance(value, dict):
        return key, first, f"line {number} is a {type(value).__name__}, expected an object"
    try:
        key = check_text(value.get("key", key), f"key of line {number}")
    except DamagedError as reason:
        return key, first, str(reason)
    split = value.get("split", first)
    if split not in splits:
        return key, first, f"split {split!r}, expected one of {', '.join(splits)}"[:200]
    return key, split, ""


def _mask(value: object, folder: Path, hw: tuple[int, int], what: str) -> Rle:
    """Convert a COCO-style RLE, polygons, or the path of a PNG (0: background) to an RLE."""
    try:
        if isinstance(value, str):
            return encode(read_label_map(path_inside(folder, value), hw))
        return to_rle(value, hw)
    except DamagedError as reason:
        raise DamagedError(f"{what}: {reason}") from None


def _conversations(
    value: object, num_targets: int
) -> tuple[tuple[tuple[Turn, ...], ...], tuple[str, ...]]:
    """Return the usable conversations and the reasons for dropping the others.

    Raises:
        DamagedError: all conversations of the line are unusable.
    """
    if value is None:
        return (), ()
    conversations: list[tuple[Turn, ...]] = []
    problems: list[str] = []
    for number, turns in enumerate(_list(value, "conversations", min_length=1)):
        what = f"conversation {number}"
        try:
            conversations.append(
                tuple(_turn(turn, num_targets, what) for turn in _list(turns, what, min_length=1))
            )
        except DamagedError as reason:
            problems.append(str(reason))
    if not conversations:
        raise DamagedError(problems[0])
    return tuple(conversations), tuple(problems)


def _turn(value: object, num_targets: int, what: str) -> Turn:
    fields = _object(value, TURN_KEYS, f"a turn of {what}")
    question = check_text(fields.get("question"), f"a question of {what}")
    answer = check_text(fields.get("answer"), f"an answer of {what}")
    targets = _list(fields.get("targets", []), f"targets of {what}")
    for index in targets:
        if type(index) is not int or not 0 <= index < num_targets:
            raise DamagedError(f"{what} names target {index!r} of {num_targets}"[:200])
    if answer.count(SEG) != len(targets) or SEG in question:
        raise DamagedError(
            f"{what}: an answer holds {answer.count(SEG)} {SEG} for {len(targets)} targets, a "
            f"question {question.count(SEG)} for none"
        )
    if IMAGE in question or IMAGE in answer:
        raise DamagedError(f"{what} holds {IMAGE}: leave it out, the picture comes first anyway")
    return Turn(question, answer, tuple(targets))


def _list(value: object, what: str, min_length: int = 0) -> list[Any]:
    if not isinstance(value, list) or len(value) < min_length:
        expected = "a list that is not empty" if min_length else "a list"
        raise DamagedError(f"{what} is {repr(value)[:60]}, expected {expected}")
    return value


def _object(value: object, known: frozenset[str], what: str) -> dict[str, Any]:
    """Return an object after rejecting unknown keys, such as misspelt ones."""
    if not isinstance(value, dict):
        raise DamagedError(f"{what} is a {type(value).__name__}, expected an object")
    unknown = sorted(value.keys() - known)
    if unknown:
        raise DamagedError(
            f"{what} has the key {unknown[0]!r}, known are {', '.join(sorted(known))}"
        )
    return value
