"""Masks as COCO run lengths: {"size": [height, width], "counts": compressed text}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from pycocotools import mask as coco

Rle = dict[str, Any]
"""A mask in COCO's compressed run-length encoding."""

_LONGEST_COUNT = 7
"""Characters of a compressed count: 35 bits, more than any mask needs."""


def encode(mask: Bool[np.ndarray, "y x"] | UInt8[np.ndarray, "y x"]) -> Rle:
    """The run lengths of all pixels that are not 0."""
    found = coco.encode(np.asfortranarray(mask != 0, np.uint8))
    return {"size": [int(side) for side in found["size"]], "counts": found["counts"].decode()}


def decode(rles: Sequence[Rle], hw: tuple[int, int]) -> UInt8[np.ndarray, "m y x"]:
    """The pixels of masks of size `hw`, 0 or 1."""
    if not rles:
        return np.zeros((0, *hw), np.uint8)
    return np.moveaxis(coco.decode([_to_bytes(rle) for rle in rles]), -1, 0)


def area(rle: Rle) -> int:
    """Number of pixels inside the mask."""
    return int(coco.area(_to_bytes(rle)))


def subtract(rle: Rle, other: Rle) -> Rle:
    """The pixels of the first mask that are not in the second one."""
    hw = rle["size"][0], rle["size"][1]
    first, second = decode([rle, other], hw)
    return encode(first & (1 - second))


def check(rle: object) -> Rle:
    """The value, if it is a mask.

    Raises:
        ValueError: another shape, or run lengths that do not fill the size.
    """
    if not isinstance(rle, dict) or rle.keys() != {"size", "counts"}:
        raise ValueError("a mask without size and counts alone")
    size, counts = rle["size"], rle["counts"]
    sides = size if isinstance(size, list) else []
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError("a mask whose size is not [height, width]")
    if not isinstance(counts, str) or not counts.isascii():
        raise ValueError("a mask whose counts are no text")
    if _pixels(counts) != size[0] * size[1]:
        raise ValueError(f"a mask whose run lengths do not fill {size[0]} x {size[1]} pixels")
    return rle


def _pixels(counts: str) -> int:
    """Sum of the run lengths; -1 of text that is not made of them."""
    digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - ord("0")
    last = np.flatnonzero(digits & 32 == 0)  # the last character of every count
    if not ((digits >= 0) & (digits < 64)).all() or not len(last) or last[-1] != len(digits) - 1:
        return -1
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > _LONGEST_COUNT:
        return -1
    place = np.arange(len(digits)) - np.repeat(first, length)
    runs = np.add.reduceat((digits & 31) << 5 * place, first)
    runs = np.where(digits[last] & 16, runs - (1 << 5 * length), runs)
    runs[1::2] = np.cumsum(runs[1::2])  # stored as differences from two counts before
    runs[2::2] = np.cumsum(runs[2::2])
    return int(runs.sum()) if (runs >= 0).all() else -1


def _to_bytes(rle: Rle) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}
