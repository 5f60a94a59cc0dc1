"""Polygon rasterisation (scan-line fill), bit-exact with `cv2.fillPoly` up to OpenCV 4.10.

The published ReasonSeg masks were made in this way: corners are truncated to whole pixels, the
outline is drawn, and the inside is filled between crossings (the even-odd rule). OpenCV 4.11
changed the result, and no maintained release fills like this, so the algorithm is implemented here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from data_pipeline.errors import DamagedError
from data_pipeline.formats.masks import OUTLINE_LIMIT, check_size

_HALF = 1 << 15
"""Half a pixel in fixed-point positions, whose unit is 2**-16 pixels."""

Point = tuple[int, int]
"""x and y in pixels, from the centre of the top left pixel."""


class Shape(NamedTuple):
    """A closed outline, and the value of the pixels on the outline and inside."""

    corners: tuple[Point, ...]
    value: int


def rasterise(shapes: Sequence[Shape], hw: tuple[int, int]) -> UInt8[np.ndarray, "y x"]:
    """Paint shapes on top of each other, in descending order of area.

    Of two shapes of equal area, the later one is painted first. Pixels outside the image are
    clipped.

        a triangle (0, 0) (4, 0) (0, 4) of value 1 and      2 1 1 1 1
        a point (0, 0) of value 2, in a 5 x 5 image  ->   1 1 1 1 0
                                                            1 1 1 0 0
                                                            1 1 0 0 0
                                                            1 0 0 0 0

    Raises:
        DamagedError: the size is not valid for a mask, or the outlines are longer than
            `OUTLINE_LIMIT` together.
    """
    check_size(*hw)
    if sum(_length(shape.corners) for shape in shapes) > OUTLINE_LIMIT:
        raise DamagedError(f"shapes with outlines of more than {OUTLINE_LIMIT} pixels")
    areas = [int(_fill(shape.corners, hw)[1].sum()) for shape in shapes]
    pixels = np.zeros(hw, np.uint8)
    for i in sorted(range(len(shapes)), key=lambda i: (-areas[i], -i)):
        rows, inside = _fill(shapes[i].corners, hw)
        pixels[rows][inside] = shapes[i].value
    return pixels


def _fill(corners: Sequence[Point], hw: tuple[int, int]) -> tuple[slice, Bool[np.ndarray, "y x"]]:
    """Return the rows of a shape, and its pixels in these rows: the outline and the inside.

    An edge excludes its lower end, so that every row crosses the outline an even number of times.
    """
    height, width = hw
    ys = [y for _, y in corners]
    top = max(min(ys), 0)
    bottom = max(min(max(ys) + 1, height), 0)
    outline = np.zeros((max(bottom - top, 0), width), bool)
    crossing_rows = [np.zeros(0, np.int64)]
    crossing_columns = [np.zeros(0, np.int64)]
    for start, end in zip((corners[-1], *corners[:-1]), corners, strict=True):
        first, last, visible = _clip(start, end, hw)
        if visible:
            rows, columns = _line(first, last)
            outline[rows - top, columns] = True
        if start[1] == end[1]:
            continue
        # A clipped edge crosses at the left pixel, an unclipped edge at the nearest one.
        half = _HALF if visible and (first, last) == (start, end) else 0
        if first[1] == last[1]:
            first, last = start, end
        (x, y), (x_end, y_end) = sorted((first, last), key=lambda point: point[1])
        slope = math.trunc((x_end - x << 16) / (y_end - y))
        rows = np.arange(max(min(start[1], end[1]), 0), min(max(start[1], end[1]), height))
        crossing_rows.append(rows)
        crossing_columns.append((x << 16) + half + (rows - y) * slope >> 16)
    rows = np.concatenate(crossing_rows)
    columns = np.concatenate(crossing_columns)
    order = np.lexsort((columns, rows))
    rows = rows[order][::2] - top
    left = columns[order][::2]
    right = columns[order][1::2]
    visible_spans = (left < width) & (right >= 0)
    rows = rows[visible_spans]
    change = np.zeros((len(outline), width + 1), np.int32)
    np.add.at(change, (rows, left[visible_spans].clip(min=0)), 1)
    np.add.at(change, (rows, right[visible_spans].clip(max=width - 1) + 1), -1)
    np.cumsum(change, axis=1, out=change)
    return slice(top, bottom), outline | (change[:, :-1] > 0)


def _line(start: Point, end: Point) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of a line, one pixel per step along its longer side.

    At each step from the left end, the offset along the shorter side is step / longer * shorter,
    with exact halves rounded down.
    """
    (x, y), (x_end, y_end) = sorted((start, end))
    width = x_end - x
    height = abs(y_end - y)
    longer = max(width, height)
    shorter = min(width, height)
    along = np.arange(longer + 1)
    across = (2 * shorter * along + max(longer - 1, 0)) // max(2 * longer, 1)
    right, down = (along, across) if width >= height else (across, along)
    return y + (down if y_end >= y else -down), x + right


def _clip(start: Point, end: Point, hw: tuple[int, int]) -> tuple[Point, Point, bool]:
    """Clip a line to the image; return its ends and whether any part is inside.

    Ends above or below the image are moved along the line to the border first, then ends to the
    left or right of it. Each time the other coordinate is truncated to a whole number.
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
    """Return the approximate number of pixels of a closed outline."""
    points = np.array(corners, np.int64)
    return int(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) + len(points)
