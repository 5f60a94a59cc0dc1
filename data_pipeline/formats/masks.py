"""COCO segmentations in every published form, converted to compressed run-length encodings.

`pixellm_jax.images.rle` encodes, decodes and fills polygons with pycocotools, which trusts its
input down to the C code. This module checks all input first: input that would crash it, hang it or
be misread raises `DamagedError`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from data_pipeline.errors import DamagedError
from pixellm_jax.benchmark_question import Rle
from pixellm_jax.images import rle as codec
from pixellm_jax.images.read import PIXEL_LIMIT

COORDINATE_LIMIT = 2**20
"""Maximum distance of a corner of a polygon from the origin, in pixels."""

OUTLINE_LIMIT = 2**21
"""Maximum length of the outlines of a mask, in pixels: pycocotools takes 80 bytes for each."""


def check_size(height: object, width: object) -> tuple[int, int]:
    """Return height and width as published if a mask can have them.

    Raises:
        DamagedError: they are not integers, below 1, or more than `PIXEL_LIMIT` pixels.
    """
    if type(height) is not int or type(width) is not int:
        raise DamagedError(f"size {_short(height)} x {_short(width)}: expected two integers")
    if height < 1 or width < 1 or height * width > PIXEL_LIMIT:
        raise DamagedError(f"size {height} x {width}: expected 1 to {PIXEL_LIMIT} pixels")
    return height, width


def to_rle(segmentation: object, hw: tuple[int, int]) -> Rle:
    """Convert the `segmentation` of a COCO-style annotation of an image of size `hw`.

    Accepted forms (the parts of a list are united, even where they overlap):

    * [[x0, y0, x1, y1, ...], ...]: polygons, in pixels, origin at the top left corner of the top
      left pixel, clipped to the image. Two corners (4 numbers) are a line, which contains no pixel;
      pycocotools would read them as a box.
    * [x0, y0, x1, y1, ...]: one polygon.
    * {"size": [h, w], "counts": [n0, n1, ...]}: run lengths.
    * {"size": [h, w], "counts": "..."}: compressed run lengths, as str or bytes.
    * [{"size": ..., "counts": ...}, ...]: several encodings, as in refCLEF.
    * []: an empty mask.

        [[0, 0, 2, 0, 2, 1, 0, 1], [1, 0, 3, 0, 3, 1, 1, 1]], (2, 3)  ->  1 1 1
                                                                          0 0 0

    Raises:
        DamagedError: another form; corners that are not finite or beyond `COORDINATE_LIMIT`; a
            polygon with an odd number of values or fewer than 4; run lengths that have another size
            or do not fill it; a size that `check_size` rejects.
    """
    hw = check_size(*hw)
    if isinstance(segmentation, dict):
        return codec.from_runs(_runs(segmentation, hw), hw)
    if not isinstance(segmentation, list | tuple):
        raise DamagedError(f"segmentation {_short(segmentation)}: expected polygons or run lengths")
    parts = [segmentation] if _is_flat(segmentation) else segmentation
    rles = [codec.from_runs(_runs(part, hw), hw) for part in parts if isinstance(part, dict)]
    polygons = [_polygon(part) for part in parts if not isinstance(part, dict)]
    if sum(map(_outline, polygons)) > OUTLINE_LIMIT:
        raise DamagedError(f"polygons with outlines of more than {OUTLINE_LIMIT} pixels")
    if polygons:
        rles += codec.fill_polygons(polygons, hw)
    return rles[0] if len(rles) == 1 else union(rles, hw)


def encode(mask: Bool[np.ndarray, "y x"] | UInt8[np.ndarray, "y x"]) -> Rle:
    """Encode the pixels that are not 0.

    Raises:
        DamagedError: a size that `check_size` rejects.
    """
    check_size(*mask.shape)
    return codec.encode(mask)


def decode(rle: Rle) -> UInt8[np.ndarray, "y x"]:
    """Decode a mask to pixels 0 and 1, stored column by column like the runs.

    Raises:
        DamagedError: the run lengths do not fill the size.
    """
    return decode_many([rle])[0]


def decode_many(rles: Sequence[Rle]) -> UInt8[np.ndarray, "m y x"]:
    """Decode masks of one size to pixels 0 and 1; an empty list gives shape [0 0 0].

    Raises:
        DamagedError: the masks differ in size, or run lengths do not fill it.
    """
    if not rles:
        return np.zeros((0, 0, 0), np.uint8)
    checked = _same_size(rles)
    height, width = checked[0]["size"]
    return codec.decode(checked, (height, width))


def union(rles: Sequence[Rle], hw: tuple[int, int]) -> Rle:
    """Return the union of masks; an empty list gives an empty mask of size `hw`.

    Raises:
        DamagedError: a mask of another size, or run lengths that do not fill it.
    """
    if not rles:
        height, width = check_size(*hw)
        return codec.from_runs(np.array([height * width]), hw)
    return codec.union([_checked(rle, hw) for rle in rles])


def area(rle: Rle) -> int:
    """Return the number of pixels inside the mask.

    Raises:
        DamagedError: the run lengths do not fill the size.
    """
    return codec.area(_checked(rle))


def _same_size(rles: Sequence[Rle]) -> list[Rle]:
    first = _checked(rles[0])
    hw = (first["size"][0], first["size"][1])
    return [first, *(_checked(rle, hw) for rle in rles[1:])]


def _checked(rle: Rle, hw: tuple[int, int] | None = None) -> Rle:
    """Return a checked encoding without runs of length 0."""
    runs = _runs(rle, hw)
    if isinstance(rle["counts"], str) and runs[1:].all():
        return rle
    height, width = rle["size"]
    return codec.from_runs(runs, (height, width))


def _is_flat(segmentation: Sequence[object]) -> bool:
    return bool(segmentation) and all(isinstance(value, int | float) for value in segmentation)


def _polygon(values: object) -> np.ndarray:
    """Check the corners x0, y0, x1, y1, ... of a polygon."""
    if not isinstance(values, list | tuple):
        raise DamagedError(f"polygon {_short(values)}: expected a list of numbers")
    corners = _numbers(values, "iuf", "polygon").astype(np.float64)
    if len(corners) < 4 or len(corners) % 2:
        raise DamagedError(
            f"polygon of {len(corners)} numbers: expected an even number, at least 4"
        )
    if not (np.abs(corners) <= COORDINATE_LIMIT).all():  # also rejects NaN
        raise DamagedError(f"polygon {_short(values)}: a corner beyond {COORDINATE_LIMIT} pixels")
    if len(corners) == 4:  # repeat the second corner: the same line, but not read as a box
        corners = np.concatenate([corners, corners[2:]])
    return corners


def _outline(corners: np.ndarray) -> float:
    """Return the length of the closed outline in pixels, as pycocotools traces it."""
    points = corners.reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) + len(points)


def _runs(rle: object, hw: tuple[int, int] | None = None) -> np.ndarray:
    """Check that the run lengths of an encoding, compressed or not, fill its size."""
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
    # Check the range first: a sum of huge numbers could overflow.
    if not ((runs >= 0) & (runs <= pixels)).all() or runs.sum() != pixels:
        raise DamagedError(f"run lengths that do not fill {height} x {width} pixels")
    return runs


def _from_text(counts: str | bytes) -> np.ndarray:
    """Parse compressed run lengths, not yet checked against the size."""
    text = counts if isinstance(counts, bytes) else counts.encode("utf-8", "surrogatepass")
    try:
        return codec.read_counts(text)
    except ValueError as error:
        raise DamagedError(str(error)) from None


def _numbers(values: Sequence[object], kinds: str, what: str) -> np.ndarray:
    """Convert a flat list of numbers of the given NumPy kinds to an array."""
    if not values:
        return np.zeros(0, np.int64)
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):  # ragged lists, or integers beyond the range of floats
        array = np.array(None)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise DamagedError(f"{what} {_short(values)}: expected a flat list of numbers")
    return array


def _short(value: object) -> str:
    """Describe any value in at most 60 characters."""
    try:
        text = " ".join(reprlib.repr(value).split())
    except ValueError:  # an integer of thousands of digits
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
