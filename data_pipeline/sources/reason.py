"""ReasonSeg: a few questions about one thing in a picture, which a person has outlined.

Layout (docs/reference_notes.md 1.4):
`reason_seg/<name>/<split>/<stem>.json` with `<stem>.jpg` beside it, and
`reason_seg/<name>/explanatory/train.json` with explanations for some of the training pictures.

The published masks are what OpenCV up to 4.10 makes of the outlines (4.11 changed its filling), so
`rasterise` follows that: the corners are cut to whole pixels, the outline is drawn and the inside
is filled from outline to outline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from data_pipeline.damage import AbsentError, Damaged
from data_pipeline.example import Example, Target, Turn
from data_pipeline.formats.json_items import items
from data_pipeline.formats.masks import COORDINATE_LIMIT, OUTLINE_LIMIT, check_size, encode
from data_pipeline.reading import Reading, check_split, check_text, read_picture
from pixellm_jax.errors import InputError

TARGET, VOID = 1, 255
"""Values of a rasterised map; 0 is everything else."""

_HALF = 1 << 15
"""Half a pixel, where positions between pixels are counted in units of 2**-16."""

Point = tuple[int, int]
"""x and y in pixels, from the centre of the top left one."""


class Shape(NamedTuple):
    """A closed outline and the value of the pixels on it and in it."""

    corners: tuple[Point, ...]
    value: int


class ReasonEntry(NamedTuple):
    """A label file, its picture, and the explanation of the picture (None: it has none)."""

    key: str
    split: str
    labels: Path
    picture: Path
    explanation: object


@dataclass(frozen=True, kw_only=True)
class ReasonSeg:
    """The reader. `folder`: name of the dataset below `reason_seg`.

    A target has one mask, shared by all questions of the picture; regions labelled as "ignore" are
    void. Each question is a conversation of its own. A picture for which there is an explanation
    gives it as the answer of each question.
    """

    folder: str = "ReasonSeg"

    @property
    def dataset(self) -> str:
        return self.folder

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "val", "test", "train_val")

    def entries(self, root: Path, split: str) -> Sequence[ReasonEntry]:
        """Files in the order of their names; "train_val" is "train", then "val"."""
        check_split(self, split)
        base = root / "reason_seg" / self.folder
        explanations = _explanations(base / "explanatory" / "train.json")
        entries = []
        for part in split.split("_"):
            folder = base / part
            stems = {file.stem for ending in ("json", "jpg") for file in folder.glob(f"*.{ending}")}
            if not stems:
                raise AbsentError(f"found no *.json in '{folder}': put the published files there")
            for stem in sorted(stems, key=lambda stem: f"{stem}."):
                picture = folder / f"{stem}.jpg"
                explanation = explanations.get(picture.name) if part == "train" else None
                key, labels = f"{part}/{stem}", folder / f"{stem}.json"
                entries.append(ReasonEntry(key, part, labels, picture, explanation))
        return entries

    def read(self, entry: ReasonEntry) -> Reading:
        labels = _labels(entry.labels)
        texts, problems = _texts(labels)
        image, hw = read_picture([entry.picture])
        shapes = _shapes(labels.get("shapes"))
        pixels = rasterise(shapes, hw)
        is_sentence = labels.get("is_sentence")
        if not isinstance(is_sentence, bool):
            raise Damaged(f"is_sentence is {is_sentence!r}, expected true or false")
        void = pixels == VOID
        explanation = None
        if entry.explanation is not None:
            try:
                explanation = check_text(entry.explanation, "the explanation")
            except Damaged as reason:
                problems.append(str(reason))
        example = Example(
            key=entry.key,
            dataset=self.dataset,
            split=entry.split,
            kind="long" if is_sentence else "short",
            image=image,
            hw=hw,
            masks=(encode(pixels == TARGET),),
            targets=(Target(() if is_sentence else texts, 0),),
            void=encode(void) if void.any() else None,
            conversations=tuple((Turn(text, explanation, (0,)),) for text in texts),
        )
        return Reading(example, tuple(problems))

    def picture(self, entry: ReasonEntry) -> Path:
        """The file of the entry's picture."""
        return entry.picture


def _explanations(file: Path) -> dict[str, object]:
    """Explanations, not checked yet, by the name of the picture; none without the file."""
    found = {}
    for number, item in enumerate(items(file) if file.is_file() else ()):
        name = item.value.get("image") if isinstance(item.value, dict) else None
        if not isinstance(name, str):
            raise InputError(f"'{file}': row {number} names no image; download the file again")
        found[name] = item.value.get("outputs", "")
    return found


def _labels(file: Path) -> dict[str, Any]:
    """A label file in UTF-8, or, as some of the published ones, in code page 1252."""
    try:
        data = file.read_bytes()
    except OSError:
        raise Damaged(f"no label file {str(file)!r}") from None
    try:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("cp1252")
        labels = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"label file {file.name!r} is not JSON ({error})") from None
    if not isinstance(labels, dict):
        raise Damaged(f"label file {file.name!r} is a {type(labels).__name__}, expected an object")
    return labels


def _texts(labels: dict[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """The questions, and what was left out."""
    given = labels.get("text")
    if not isinstance(given, list):
        raise Damaged(f"text is a {type(given).__name__}, expected a list of questions")
    texts, problems = [], []
    for number, text in enumerate(given):
        try:
            texts.append(check_text(text, f"question {number}"))
        except Damaged as reason:
            problems.append(str(reason))
    if not texts:
        raise Damaged("no question")
    return tuple(texts), problems


def _shapes(given: object) -> list[Shape]:
    """What is to be drawn: "flag" is a note without meaning, "...ignore..." is void."""
    if not isinstance(given, list):
        raise Damaged(f"shapes is a {type(given).__name__}, expected a list")
    shapes = []
    for number, shape in enumerate(given):
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str):
            raise Damaged(f"shape {number} has no label")
        if label.lower() != "flag":
            value = VOID if "ignore" in label.lower() else TARGET
            shapes.append(Shape(_corners(shape.get("points"), number), value))
    return shapes


def _corners(points: object, number: int) -> tuple[Point, ...]:
    """Whole pixels: [[3.9, -0.5], [4, 7]]  ->  (3, 0), (4, 7)."""
    corners = []
    for point in points if isinstance(points, list) else ():
        if not isinstance(point, list) or len(point) != 2:
            raise Damaged(f"shape {number}: corner {point!r}, expected [x, y]"[:200])
        for value in point:
            # Not a number compares false, too.
            if type(value) not in (int, float) or not abs(value) <= COORDINATE_LIMIT:
                raise Damaged(f"shape {number}: corner {point!r}, expected two numbers"[:200])
        corners.append((int(point[0]), int(point[1])))
    if not corners:
        raise Damaged(f"shape {number} has no corners")
    return tuple(corners)


def rasterise(shapes: Sequence[Shape], hw: tuple[int, int]) -> UInt8[np.ndarray, "y x"]:
    """Draws shapes one over the other, those that cover more pixels first.

    Of shapes that cover equally many, the one listed later is drawn first. Everything outside the
    picture is cut off.

        a triangle (0, 0) (4, 0) (0, 4) of value 1 and      2 1 1 1 1
        a point (0, 0) of value 2, in a 5 x 5 picture  ->   1 1 1 1 0
                                                            1 1 1 0 0
                                                            1 1 0 0 0
                                                            1 0 0 0 0

    Raises:
        Damaged: a size that no mask can have, or outlines longer than `OUTLINE_LIMIT` together.
    """
    check_size(*hw)
    if sum(_length(shape.corners) for shape in shapes) > OUTLINE_LIMIT:
        raise Damaged(f"shapes with outlines of more than {OUTLINE_LIMIT} pixels")
    areas = [int(_fill(shape.corners, hw)[1].sum()) for shape in shapes]
    pixels = np.zeros(hw, np.uint8)
    for i in sorted(range(len(shapes)), key=lambda i: (-areas[i], -i)):
        rows, inside = _fill(shapes[i].corners, hw)
        pixels[rows][inside] = shapes[i].value
    return pixels


def _fill(corners: Sequence[Point], hw: tuple[int, int]) -> tuple[slice, Bool[np.ndarray, "y x"]]:
    """The rows of a shape, and in them its pixels: its outline, and every second stretch between.

    A row meets an edge, except at the edge's lower end, so that it meets the outline evenly often.
    """
    height, width = hw
    ys = [y for _, y in corners]
    top, bottom = max(min(ys), 0), max(min(max(ys) + 1, height), 0)
    outline = np.zeros((max(bottom - top, 0), width), bool)
    met_rows, met_columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, end in zip((corners[-1], *corners[:-1]), corners, strict=True):
        first, last, visible = _clip(start, end, hw)
        if visible:
            rows, columns = _line(first, last)
            outline[rows - top, columns] = True
        if start[1] == end[1]:
            continue
        half = _HALF if visible and (first, last) == (start, end) else 0  # cut lines: left pixel
        if first[1] == last[1]:
            first, last = start, end
        (x, y), (x_end, y_end) = sorted((first, last), key=lambda point: point[1])
        slope = math.trunc((x_end - x << 16) / (y_end - y))
        rows = np.arange(max(min(start[1], end[1]), 0), min(max(start[1], end[1]), height))
        met_rows.append(rows)
        met_columns.append((x << 16) + half + (rows - y) * slope >> 16)
    rows, columns = np.concatenate(met_rows), np.concatenate(met_columns)
    order = np.lexsort((columns, rows))
    rows, left, right = rows[order][::2] - top, columns[order][::2], columns[order][1::2]
    seen = (left < width) & (right >= 0)
    change = np.zeros((len(outline), width + 1), np.int32)
    np.add.at(change, (rows[seen], left[seen].clip(min=0)), 1)
    np.add.at(change, (rows[seen], right[seen].clip(max=width - 1) + 1), -1)
    np.cumsum(change, axis=1, out=change)
    return slice(top, bottom), outline | (change[:, :-1] > 0)


def _line(start: Point, end: Point) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a line, one pixel for each step along its longer side.

    From its left end it moves across by steps / longer * shorter, with exact halves rounded down.
    """
    (x, y), (x_end, y_end) = sorted((start, end))
    width, height = x_end - x, abs(y_end - y)
    longer, shorter = max(width, height), min(width, height)
    along = np.arange(longer + 1)
    across = (2 * shorter * along + max(longer - 1, 0)) // max(2 * longer, 1)
    right, down = (along, across) if width >= height else (across, along)
    return y + (down if y_end >= y else -down), x + right


def _clip(start: Point, end: Point, hw: tuple[int, int]) -> tuple[Point, Point, bool]:
    """The part of a line inside the picture, and whether there is any.

    Ends above or below are moved along the line to the border first, then those left or right;
    each time the other coordinate is cut to a whole number.
    """
    ends = [list(start), list(end)]
    for axis in (1, 0):
        if any(max(p[i] for p in ends) < 0 or min(p[i] for p in ends) >= hw[1 - i] for i in (0, 1)):
            return (ends[0][0], ends[0][1]), (ends[1][0], ends[1][1]), False
        for here, there in (ends, reversed(ends)):
            border = min(max(here[axis], 0), hw[1 - axis] - 1)
            if border != here[axis]:
                across = (border - here[axis]) * (there[1 - axis] - here[1 - axis])
                here[1 - axis] += math.trunc(across / (there[axis] - here[axis]))
                here[axis] = border
    return (ends[0][0], ends[0][1]), (ends[1][0], ends[1][1]), True


def _length(corners: Sequence[Point]) -> int:
    """Pixels of a closed outline, about."""
    points = np.array(corners, np.int64)
    return int(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) + len(points)
