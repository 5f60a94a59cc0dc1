"""Run-length encoding of masks as in COCO: {"size": [height, width], "counts": compressed text}.

A run-length encoding counts pixels column by column, first those outside the mask, then those
inside, and so on. In the compressed form the counts are text: each count (from the third on its
difference to the count two before) is written in groups of 5 bits, lowest first, as characters from
"0" to "o" (`maskApi.c` of https://github.com/cocodataset/cocoapi).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from pycocotools import mask as coco

from pixellm_jax.benchmark_question import Rle

_LONGEST_COUNT = 7
"""Maximum number of characters of a compressed count: 35 bits, more than any mask needs."""


def encode(mask: Bool[np.ndarray, "y x"] | UInt8[np.ndarray, "y x"]) -> Rle:
    """Encode the pixels that are not 0."""
    return _from_coco(coco.encode(np.asfortranarray(mask != 0, np.uint8)))


def decode(rles: Sequence[Rle], hw: tuple[int, int]) -> UInt8[np.ndarray, "m y x"]:
    """Decode masks of size `hw` to pixels 0 and 1, stored column by column as the runs are."""
    if not rles:
        return np.zeros((0, *hw), np.uint8)
    return np.moveaxis(coco.decode(_to_coco(rles)), -1, 0)


def union(rles: Sequence[Rle]) -> Rle:
    """Return the union of one or more masks of one size, none of which has a run of length 0."""
    return _from_coco(coco.merge(_to_coco(rles)))


def area(rle: Rle) -> int:
    """Return the number of pixels inside the mask."""
    return int(coco.area(_to_coco([rle]))[0])


def box(rle: Rle) -> list[float]:
    """Return the bounding box of a mask: x and y of the top left corner, width, height."""
    return [float(value) for value in coco.toBbox(_to_coco([rle]))[0]]


def fill_polygons(polygons: Sequence[np.ndarray], hw: tuple[int, int]) -> list[Rle]:
    """Encode polygons, each x0, y0, x1, y1, ... in pixels, clipped to the size `hw`."""
    return [_from_coco(found) for found in coco.frPyObjects(list(polygons), *hw)]


def from_runs(runs: Int64[np.ndarray, "n"], hw: tuple[int, int]) -> Rle:
    """Compress run lengths that fill the size `hw`.

    Runs of length 0 are removed (all but the first), since pycocotools ends a union where two of
    them meet:

        3 0 2 4  ->  5 4
    """
    if not runs[1:].all():
        inside = (np.arange(len(runs)) % 2)[runs > 0]
        start = np.flatnonzero(np.diff(inside, prepend=-1))
        runs = np.add.reduceat(runs[runs > 0], start)
        runs = np.concatenate([[0], runs]) if inside[0] else runs
    return _from_coco(coco.frPyObjects({"size": list(hw), "counts": runs}, *hw))


def check(rle: object) -> Rle:
    """Return the value if it is an encoded mask.

    Raises:
        ValueError: the keys or types differ, or the run lengths do not fill the size.
    """
    if not isinstance(rle, dict) or rle.keys() != {"size", "counts"}:
        raise ValueError("a mask without size and counts alone")
    size, counts = rle["size"], rle["counts"]
    sides = size if isinstance(size, list) else []
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError("a mask whose size is not [height, width]")
    if not isinstance(counts, str) or not counts.isascii():
        raise ValueError("a mask whose counts are no text")
    runs = read_counts(counts.encode("ascii"))
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"a mask whose run lengths do not fill {size[0]} x {size[1]} pixels")
    return Rle(size=size, counts=counts)


def read_counts(text: bytes) -> Int64[np.ndarray, "n"]:
    """Parse compressed run lengths, not yet checked against a size; some may be negative.

    Raises:
        ValueError: the text is not a sequence of compressed run lengths.
    """
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - ord("0")
    if not ((digits >= 0) & (digits < 64)).all():
        raise ValueError("compressed run lengths with characters other than '0' to 'o'")
    last = np.flatnonzero(digits & 32 == 0)  # the last character of every count
    if not len(last) or last[-1] != len(digits) - 1:
        raise ValueError("compressed run lengths that end inside a count")
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > _LONGEST_COUNT:
        raise ValueError(f"compressed run lengths with a count of {length.max()} characters")
    place = np.arange(len(digits)) - np.repeat(first, length)
    runs = np.add.reduceat((digits & 31) << 5 * place, first)
    runs = np.where(digits[last] & 16, runs - (1 << 5 * length), runs)
    runs[1::2] = np.cumsum(runs[1::2])  # stored as differences from two counts before
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _to_coco(rles: Sequence[Rle]) -> list[dict[str, Any]]:
    return [{"size": rle["size"], "counts": rle["counts"].encode("ascii")} for rle in rles]


def _from_coco(found: dict[str, Any]) -> Rle:
    height, width = found["size"]
    return Rle(size=[int(height), int(width)], counts=found["counts"].decode("ascii"))
