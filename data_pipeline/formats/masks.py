"""Masks: every form that COCO-style files use goes in, one compressed run-length form comes out.

pycocotools encodes, decodes and fills polygons. It trusts its input down to the C code, so nothing
gets there unchecked: what it would crash on, hang on or misread raises `DamagedError` here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from pycocotools import mask as coco

from data_pipeline.errors import DamagedError
from pixellm_jax.benchmark_question import Rle
from pixellm_jax.images.read import PIXEL_LIMIT
from pixellm_jax.images.rle import read_counts

COORDINATE_LIMIT = 2**20
"""Largest distance of a polygon's corner from the origin, in pixels."""

OUTLINE_LIMIT = 2**21
"""Most pixels that the outlines of one mask may be long: pycocotools takes 80 bytes for each."""


def check_size(height: object, width: object) -> tuple[int, int]:
    """Height and width as published, if a mask can have them.

    Raises:
        DamagedError: not integers, below 1, or more than `PIXEL_LIMIT` pixels.
    """
    if type(height) is not int or type(width) is not int:
        raise DamagedError(f"size {_short(height)} x {_short(width)}: expected two integers")
    if height < 1 or width < 1 or height * width > PIXEL_LIMIT:
        raise DamagedError(f"size {height} x {width}: expected 1 to {PIXEL_LIMIT} pixels")
    return height, width


def to_rle(segmentation: object, hw: tuple[int, int]) -> Rle:
    """One mask from the `segmentation` of a COCO-style annotation, in a image of size `hw`.

    What it may be (the parts of a list are united, also where they overlap):

    * [[x0, y0, x1, y1, ...], ...]: polygons, in pixels, origin at the top left corner of the top
      left pixel, clipped to the image. Two corners (4 numbers) are a line, which holds no pixel:
      pycocotools alone would take them for a box.
    * [x0, y0, x1, y1, ...]: one polygon.
    * {"size": [h, w], "counts": [n0, n1, ...]}: run lengths.
    * {"size": [h, w], "counts": "..."}: compressed run lengths, as str or bytes.
    * [{"size": ..., "counts": ...}, ...]: several of them, as in refCLEF.
    * []: an empty mask.

        [[0, 0, 2, 0, 2, 1, 0, 1], [1, 0, 3, 0, 3, 1, 1, 1]], (2, 3)  ->  1 1 1
                                                                          0 0 0

    Raises:
        DamagedError: anything else; corners that are not finite or lie beyond `COORDINATE_LIMIT`; a
            polygon of an odd number of values or fewer than 4; run lengths of another size, or that
            do not fill it; a size that `check_size` refuses.
    """
    hw = check_size(*hw)
    if isinstance(segmentation, dict):
        return _from_runs(_runs(segmentation, hw), hw)
    if not isinstance(segmentation, list | tuple):
        raise DamagedError(f"segmentation {_short(segmentation)}: expected polygons or run lengths")
    parts = [segmentation] if _is_flat(segmentation) else segmentation
    rles = [_from_runs(_runs(part, hw), hw) for part in parts if isinstance(part, dict)]
    polygons = [_polygon(part) for part in parts if not isinstance(part, dict)]
    if sum(map(_outline, polygons)) > OUTLINE_LIMIT:
        raise DamagedError(f"polygons with outlines of more than {OUTLINE_LIMIT} pixels")
    if polygons:
        rles += [_to_text(rle) for rle in coco.frPyObjects(polygons, *hw)]
    return rles[0] if len(rles) == 1 else union(rles, hw)


def encode(mask: Bool[np.ndarray, "y x"] | UInt8[np.ndarray, "y x"]) -> Rle:
    """The mask of all pixels that are not 0.

    Raises:
        DamagedError: a size that `check_size` refuses.
    """
    check_size(*mask.shape)
    return _to_text(coco.encode(np.asfortranarray(mask != 0, np.uint8)))


def decode(rle: Rle) -> UInt8[np.ndarray, "y x"]:
    """The pixels of a mask, 0 or 1. They lie column by column in memory, as the runs do.

    Raises:
        DamagedError: run lengths that do not fill the size.
    """
    return coco.decode(_to_bytes(rle))


def decode_many(rles: Sequence[Rle]) -> UInt8[np.ndarray, "m y x"]:
    """The pixels of masks of one size, 0 or 1; [0 0 0] of no mask. Column by column in memory.

    Raises:
        DamagedError: masks of different sizes, or run lengths that do not fill them.
    """
    if not rles:
        return np.zeros((0, 0, 0), np.uint8)
    hw = (rles[0]["size"][0], rles[0]["size"][1])
    return np.moveaxis(coco.decode([_to_bytes(rle, hw) for rle in rles]), -1, 0)


def union(rles: Sequence[Rle], hw: tuple[int, int]) -> Rle:
    """The pixels that are in any of the masks; of no mask an empty one of size `hw`.

    Raises:
        DamagedError: a mask of another size, or run lengths that do not fill it.
    """
    if not rles:
        height, width = check_size(*hw)
        return _from_runs(np.array([height * width]), hw)
    return _to_text(coco.merge([_to_bytes(rle, hw) for rle in rles]))


def area(rle: Rle) -> int:
    """Number of pixels inside the mask.

    Raises:
        DamagedError: run lengths that do not fill the size.
    """
    return int(coco.area(_to_bytes(rle)))


def _is_flat(segmentation: Sequence[object]) -> bool:
    return bool(segmentation) and all(isinstance(value, int | float) for value in segmentation)


def _polygon(values: object) -> np.ndarray:
    """Checked corners x0, y0, x1, y1, ... of a polygon."""
    if not isinstance(values, list | tuple):
        raise DamagedError(f"polygon {_short(values)}: expected a list of numbers")
    corners = _numbers(values, "iuf", "polygon").astype(np.float64)
    if len(corners) < 4 or len(corners) % 2:
        raise DamagedError(
            f"polygon of {len(corners)} numbers: expected an even number, at least 4"
        )
    if not (np.abs(corners) <= COORDINATE_LIMIT).all():  # not a number compares false, too
        raise DamagedError(f"polygon {_short(values)}: a corner beyond {COORDINATE_LIMIT} pixels")
    if len(corners) == 4:  # the second corner twice: the same line, but not read as a box
        corners = np.concatenate([corners, corners[2:]])
    return corners


def _outline(corners: np.ndarray) -> float:
    """Length of the closed outline as pycocotools walks it, in pixels."""
    points = corners.reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) + len(points)


def _runs(rle: object, hw: tuple[int, int] | None = None) -> np.ndarray:
    """Checked run lengths of a compressed or uncompressed encoding; they fill its size."""
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise DamagedError(f"run lengths {_short(rle)}: expected the keys size and counts")
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise DamagedError(f"run lengths of size {_short(size)}: expected [height, width]")
    height, width = check_size(*size)
    if hw is not None and (height, width) != tuple(hw):
        raise DamagedError(f"mask of size {height} x {width} in a picture of {hw[0]} x {hw[1]}")
    if isinstance(counts, str | bytes):
        runs = _from_text(counts)
    elif isinstance(counts, list | tuple):
        runs = _numbers(counts, "iu", "run lengths").astype(np.int64)
    else:
        raise DamagedError(f"run lengths {_short(counts)}: expected a list or text")
    pixels = height * width
    # The range first: a sum of huge numbers could wrap around.
    if not ((runs >= 0) & (runs <= pixels)).all() or runs.sum() != pixels:
        raise DamagedError(f"run lengths that do not fill {height} x {width} pixels")
    return runs


def _from_text(counts: str | bytes) -> np.ndarray:
    """Run lengths of the compressed form, not yet checked against the size."""
    text = counts if isinstance(counts, bytes) else counts.encode("utf-8", "surrogatepass")
    try:
        return read_counts(text)
    except ValueError as error:
        raise DamagedError(str(error)) from None


def _from_runs(runs: np.ndarray, hw: tuple[int, int]) -> Rle:
    """Compresses checked run lengths.

    Runs of length 0 are taken out (all but the first), since pycocotools ends a union where two of
    them meet:

        3 0 2 4  ->  5 4
    """
    if not runs[1:].all():
        inside = (np.arange(len(runs)) % 2)[runs > 0]
        start = np.flatnonzero(np.diff(inside, prepend=-1))
        runs = np.add.reduceat(runs[runs > 0], start)
        runs = np.concatenate([[0], runs]) if inside[0] else runs
    return _to_text(coco.frPyObjects({"size": list(hw), "counts": runs}, *hw))


def _to_text(rle: dict) -> Rle:
    height, width = rle["size"]
    return Rle(size=[int(height), int(width)], counts=rle["counts"].decode("ascii"))


def _to_bytes(rle: Rle, hw: tuple[int, int] | None = None) -> dict:
    """A checked encoding as pycocotools takes it."""
    runs = _runs(rle, hw)
    if isinstance(rle["counts"], str) and runs[1:].all():
        return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}
    height, width = rle["size"]
    return _to_bytes(_from_runs(runs, (height, width)))


def _numbers(values: Sequence[object], kinds: str, what: str) -> np.ndarray:
    """A flat list as an array, if numpy finds nothing but numbers of these kinds in it."""
    if not values:
        return np.zeros(0, np.int64)
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):  # lists of different lengths in it
        array = np.array(None)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise DamagedError(f"{what} {_short(values)}: expected a flat list of numbers")
    return array


def _short(value: object) -> str:
    """At most 60 characters of what was found, whatever it is."""
    try:
        text = " ".join(reprlib.repr(value).split())
    except ValueError:  # an integer of thousands of digits
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
