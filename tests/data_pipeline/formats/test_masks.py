"""All forms of COCO masks; damaged input never reaches pycocotools."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from data_pipeline.errors import DamagedError
from data_pipeline.formats import masks
from tests.support.mutation import mutate

HW = (5, 7)
SQUARE = [1, 1, 4, 1, 4, 3, 1, 3]


def rectangle(top: int, left: int, bottom: int, right: int, hw=HW) -> np.ndarray:
    mask = np.zeros(hw, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def uncompressed(mask: np.ndarray) -> dict:
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": counts if not flat[0] else [0, *counts]}


FORMS = {
    "polygon": [SQUARE],
    "flat polygon": SQUARE,
    "polygon of floats": [[float(x) for x in SQUARE]],
    "overlapping polygons": [SQUARE, [2, 1, 4, 1, 4, 3, 2, 3]],
    "polygon and a line": [SQUARE, [0, 0, 6, 4]],
    "run lengths": uncompressed(rectangle(1, 1, 3, 4)),
    "compressed": dict(masks.encode(rectangle(1, 1, 3, 4))),
    "compressed bytes": {
        "size": list(HW),
        "counts": masks.encode(rectangle(1, 1, 3, 4))["counts"].encode(),
    },
    "list of run lengths": [
        dict(masks.encode(rectangle(1, 1, 3, 3))),
        uncompressed(rectangle(1, 2, 3, 4)),
    ],
    "polygon and run lengths": [
        [1, 1, 2, 1, 2, 3, 1, 3],
        uncompressed(rectangle(1, 2, 3, 4)),
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_mask(form):
    rle = masks.to_rle(FORMS[form], HW)
    np.testing.assert_array_equal(masks.decode(rle), rectangle(1, 1, 3, 4))
    assert rle == masks.encode(rectangle(1, 1, 3, 4))


@pytest.mark.parametrize("empty", [[], [[0, 0, 6, 4]], [6, 4, 0, 0], [[2, 2, 2, 2]]])
def test_empty_lists_and_lines_are_empty_masks(empty):
    rle = masks.to_rle(empty, HW)
    assert masks.area(rle) == 0
    np.testing.assert_array_equal(masks.decode(rle), np.zeros(HW))


def test_four_numbers_are_a_line_and_not_a_box():
    """pycocotools reads four numbers as x, y, width, height."""
    assert coco.area(coco.frPyObjects(np.array([[0.0, 0, 4, 4]]), *HW))[0] == 16
    assert masks.area(masks.to_rle([[0, 0, 4, 4]], HW)) == 0


def test_polygons_are_clipped_to_the_image():
    rle = masks.to_rle([[-9, -9, 99, -9, 99, 99, -9, 99]], HW)
    assert masks.area(rle) == HW[0] * HW[1]


DAMAGED = {
    "nothing": (None, "expected polygons"),
    "a number": (3, "expected polygons"),
    "text": ("abc", "expected polygons"),
    "an odd polygon": ([[1, 2, 3, 4, 5]], "polygon of 5 numbers"),
    "a point": ([[1, 2]], "polygon of 2 numbers"),
    "a flat point": ([1, 2], "polygon of 2 numbers"),
    "no corners": ([[]], "polygon of 0 numbers"),
    "a polygon of pairs": ([[[1, 2], [3, 4], [5, 6]]], "flat list of numbers"),
    "ragged": ([[1, [2], 3, 4]], "flat list of numbers"),
    "text in a polygon": ([["1", "2", "3", "4"]], "flat list of numbers"),
    "null in a polygon": ([[1, None, 3, 4, 5, 6]], "flat list of numbers"),
    "bools": ([[True, False, True, True]], "flat list of numbers"),
    "huge": ([[10**400, 1, 2, 3, 4, 5]], "flat list of numbers"),
    "not a number": ([[float("nan"), 1, 2, 3, 4, 5]], "a corner beyond"),
    "infinite": ([[1, 2, 3, float("inf"), 4, 5]], "a corner beyond"),
    "far away": ([[1, 2, 3, 2e6, 4, 5]], "a corner beyond"),
    "too long": ([[0, 0, 1_000_000, 0] * 3], "outlines of more than"),
    "too long together": ([[0, 0, 900_000, 0, 0, 1]] * 2, "outlines of more than"),
    "null next to a polygon": ([SQUARE, None], "expected a list of numbers"),
    "no counts": ({"size": [5, 7]}, "expected the keys"),
    "no size": ({"counts": [35]}, "expected the keys"),
    "another size": ({"size": [7, 5], "counts": [35]}, "7 x 5 in a picture of 5 x 7"),
    "a size of one": ({"size": [35], "counts": [35]}, "size"),
    "a size of floats": ({"size": [5.0, 7.0], "counts": [35]}, "two integers"),
    "a negative size": ({"size": [-5, -7], "counts": [35]}, "expected 1 to"),
    "too few pixels": ({"size": [5, 7], "counts": [30]}, "do not fill"),
    "too many pixels": ({"size": [5, 7], "counts": [30, 6]}, "do not fill"),
    "no runs": ({"size": [5, 7], "counts": []}, "do not fill"),
    "a negative run": ({"size": [5, 7], "counts": [40, -5]}, "do not fill"),
    "wrapping runs": ({"size": [5, 7], "counts": [2**63 - 1, 2**63 - 1, 37]}, "do not fill"),
    "huge runs": ({"size": [5, 7], "counts": [2**80]}, "flat list"),
    "runs of floats": ({"size": [5, 7], "counts": [35.0]}, "flat list"),
    "runs of text": ({"size": [5, 7], "counts": ["35"]}, "flat list"),
    "counts of another type": ({"size": [5, 7], "counts": 35}, "a list or text"),
    "empty text": ({"size": [5, 7], "counts": ""}, "end inside a count"),
    "an open count": ({"size": [5, 7], "counts": "3P"}, "end inside a count"),
    "foreign characters": ({"size": [5, 7], "counts": "3 1"}, "characters other than"),
    "zero bytes": ({"size": [5, 7], "counts": b"3\x001"}, "characters other than"),
    "half a character": ({"size": [5, 7], "counts": "\ud800"}, "characters other than"),
    "an endless count": ({"size": [5, 7], "counts": "P" * 50 + "1"}, "a count of 51"),
    "a count too few": ({"size": [5, 7], "counts": "3"}, "do not fill"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_segmentations(case):
    segmentation, message = DAMAGED[case]
    with pytest.raises(DamagedError, match=message) as error:
        masks.to_rle(segmentation, HW)
    assert len(str(error.value)) < 200


def test_list_that_contains_itself():
    loop: list = [1, 2, 3, 4]
    loop[0] = loop
    with pytest.raises(DamagedError):
        masks.to_rle([loop], HW)
    with pytest.raises(DamagedError):
        masks.to_rle(loop, HW)


@pytest.mark.parametrize(
    "hw", [(0, 5), (5, -1), (True, 5), (5.0, 5), ("5", 5), (None, 5), (10**6, 10**6), (10**30, 1)]
)
def test_invalid_sizes(hw):
    with pytest.raises(DamagedError, match="size"):
        masks.check_size(*hw)


def test_runs_of_length_zero():
    """The union of pycocotools stops where two such runs meet, and loses all later runs."""
    first = {"size": list(HW), "counts": [3, 2, 5, 0, 0, 2, 23]}
    second = {"size": list(HW), "counts": [10, 0, 0, 0, 0, 25]}
    pixels = np.zeros(35, np.uint8)
    pixels[3:5] = 1
    pixels[10:] = 1
    expected = pixels.reshape(HW[::-1]).T
    np.testing.assert_array_equal(masks.decode(masks.to_rle([first, second], HW)), expected)
    stored = [coco.frPyObjects(rle, *HW) for rle in (first, second)]
    assert coco.area(coco.merge(stored)) < expected.sum()
    rles = [masks.Rle(size=list(HW), counts=rle["counts"].decode()) for rle in stored]
    np.testing.assert_array_equal(masks.decode(masks.union(rles, HW)), expected)


SIZES = st.tuples(st.integers(1, 23), st.integers(1, 19))


@given(SIZES, st.integers(0, 2**32), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_round_trip(hw, seed, share):
    mask = np.random.default_rng(seed).random(hw) < share
    rle = masks.encode(mask)
    np.testing.assert_array_equal(masks.decode(rle), mask)
    assert masks.area(rle) == mask.sum()
    assert masks.to_rle(dict(rle), hw) == rle == masks.to_rle(uncompressed(mask * 1), hw)
    assert masks.encode(mask.astype(np.uint8) * 255) == rle


@given(SIZES, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_union_and_decode_many(hw, seed):
    parts = np.random.default_rng(seed).random((3, *hw)) < 0.3
    rles = [masks.encode(part) for part in parts]
    np.testing.assert_array_equal(masks.decode_many(rles), parts)
    np.testing.assert_array_equal(masks.decode(masks.union(rles, hw)), parts.any(0))


def test_without_masks():
    assert masks.decode_many([]).shape == (0, 0, 0)
    assert masks.union([], HW) == masks.encode(np.zeros(HW, np.uint8))


def test_rejects_masks_of_different_sizes():
    rles = [masks.encode(np.zeros(hw, np.uint8)) for hw in ((5, 7), (7, 5))]
    with pytest.raises(DamagedError, match="7 x 5 in a picture of 5 x 7"):
        masks.decode_many(rles)
    with pytest.raises(DamagedError, match="7 x 5 in a picture of 5 x 7"):
        masks.union(rles, HW)


@given(
    st.lists(st.floats(-40, 40, width=32), min_size=6, max_size=16).filter(lambda p: not len(p) % 2)
)
@settings(max_examples=150, deadline=None)
def test_polygons_equal_those_of_pycocotools(polygon):
    expected = coco.decode(coco.merge(coco.frPyObjects([polygon], *HW)))
    np.testing.assert_array_equal(masks.decode(masks.to_rle([polygon], HW)), expected)


@pytest.mark.parametrize("seed", range(20))
def test_fuzz(seed):
    """Each of 20 x 25 mutated masks is a mask that can be decoded, or `DamagedError`."""
    rng = random.Random(seed)
    for _ in range(25):
        segmentation = mutate(rng.choice(list(FORMS.values())), rng)
        try:
            rle = masks.to_rle(segmentation, HW)
        except DamagedError:
            continue
        assert masks.decode(rle).shape == HW
        assert masks.area(masks.union([rle, rle], HW)) == masks.area(rle)


@given(st.binary(max_size=30))
@settings(max_examples=300, deadline=None)
def test_fuzz_compressed(counts):
    """Also in the alphabet of the encoding, where damaged text more often looks like a mask."""
    for text in (counts, bytes(48 + byte % 64 for byte in counts)):
        with contextlib.suppress(DamagedError):
            masks.decode(masks.to_rle({"size": list(HW), "counts": text}, HW))
