"""IoU scores and mask matching, compared with the reference's and with the correct values.

Where the two differ, the reference is wrong (docs/reference_notes.md M1, M2, T16), and both are
checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pixellm_jax.evaluation import released_metrics
from pixellm_jax.evaluation.matching import UNMATCHED, Costs, assign, costs, match, measure_pairs
from pixellm_jax.evaluation.metrics import IOU_UNIT, Areas, Sums, measure, merge, scores, tally
from pixellm_jax.evaluation.released_metrics import TargetMasks

# Exact integers and one rounding to 2^-40 per mask; the file's numbers have 9 digits or float64.
EXACT = 1e-9
# The reference sums in float32, over at most a few dozen masks.
RELEASED = 2e-6
# Float32 means of costs of order one, over at most 2000 points, against float64.
COST = 1e-5


class Goldens(NamedTuple):
    table: dict[str, Any]
    arrays: Any

    def case(self, kind: str, key: str) -> dict[str, Any]:
        return next(case for case in self.table[kind] if case["key"] == key)

    def image(self, key: str, image: int) -> tuple[np.ndarray, np.ndarray]:
        logits = self.arrays[f"{key}_{image}_pred"].astype(np.float32)
        return logits, self.arrays[f"{key}_{image}_gt"]

    def questions(self, case: dict[str, Any], image: int) -> list[TargetMasks]:
        parts = (case["images"][image][f"{kind}_per_question"] for kind in ("pred", "gt"))
        arrays = zip(self.image(case["key"], image), parts, strict=True)
        return list(map(TargetMasks, *(split(*array) for array in arrays)))


def split(array: np.ndarray, counts: list[int]) -> Iterator[np.ndarray]:
    return (array[a:b] for a, b in pairwise(accumulate(counts, initial=0)))


@pytest.fixture(scope="module")
def golden(goldens: Path) -> Goldens:
    table = json.loads((goldens / "data/metrics.json").read_text())
    with np.load(goldens / "data/metrics.npz") as arrays:
        return Goldens(table, dict(arrays))


def check(sums: Sums, correct: dict[str, Any]) -> None:
    found = scores(sums)
    assert sums[2:4] == (correct["sum_intersection"], correct["sum_union"])
    assert found[:2] == pytest.approx((correct["giou"], correct["ciou"]), abs=EXACT)


@pytest.mark.parametrize("key", [f"v{i}" for i in range(8)])
def test_teacher_forced(golden, key):
    case = golden.case("teacher_forced", key)
    parts, ious, released = [], [], []
    for image in range(case["images"]):
        logits, truth = golden.image(key, image)
        areas = measure(logits > 0, truth)
        parts.append(tally(areas))
        ious += [tally(Areas(*area)).iou / IOU_UNIT for area in zip(*areas, strict=True)]
        released.append(released_metrics.tally_teacher_forced(logits, truth))
    assert ious == pytest.approx(case["correct"]["ious"], abs=EXACT)
    assert merge(*parts).masks == case["correct"]["pairs"]
    check(merge(*parts), case["correct"])
    found = released_metrics.released_scores(released_metrics.merge(*released))
    assert found._asdict() == pytest.approx(case["reference"], abs=RELEASED)


@pytest.mark.parametrize("index", [0, 1])
def test_sums_are_exact_above_the_range_of_float32(golden, index):
    case = golden.table["float32_reduction"][index]
    intersection, union = (np.asarray(case[name]) for name in ("intersection", "union"))
    found = scores(tally(Areas(intersection, prediction=union, truth=intersection)))
    assert found[:2] == pytest.approx(tuple(case["correct"].values()), abs=EXACT)


def generated(
    golden: Goldens, case: dict[str, Any]
) -> tuple[list[list[list[list[int]]]], Sums, Sums]:
    """Pairs as in the file, strict sums, and sums where an empty extra prediction is right."""
    rows, strict, lenient = [], [], []
    for image in range(len(case["images"])):
        rows.append([])
        for logits, truth in golden.questions(case, image):
            pairs = match(logits, truth)
            areas = measure_pairs(logits > 0, truth, pairs)
            union = areas.prediction + areas.truth - areas.intersection
            table = np.column_stack([pairs, areas.intersection, union])
            rows[-1].append(table.tolist())
            strict.append(tally(areas, extra=pairs[:, 1] == UNMATCHED))
            lenient.append(tally(areas))
    return rows, merge(*strict), merge(*lenient)


@pytest.mark.parametrize("key", [f"m{i}" for i in range(13)])
def test_generated(golden, key):
    case = golden.case("muse", key)
    correct = case["correct"]
    rows, strict, lenient = generated(golden, case)
    wanted = [[sorted(pairs) for pairs in image] for image in correct["per_image_question_pairs"]]
    assert [[sorted(pairs) for pairs in image] for image in rows] == wanted
    assert strict.masks == correct["pairs"]
    if not correct["pairs"]:
        assert np.isnan(scores(strict)[:2]).all()
        return
    check(lenient, correct)
    # The file scores an extra prediction without pixels with 1; here it is 0.
    empty = sum(
        pair[1] == UNMATCHED and pair[3] == 0 for image in rows for pairs in image for pair in pairs
    )
    assert empty == (key == "m12")
    assert strict.iou == lenient.iou - empty * IOU_UNIT
    assert strict[2:4] == lenient[2:4]


@pytest.mark.parametrize("key", [f"m{i}" for i in range(13) if i != 10])
def test_generated_as_released(golden, key):
    case = golden.case("muse", key)
    parts = [
        released_metrics.tally_generated(golden.questions(case, image))
        for image in range(len(case["images"]))
    ]
    wanted = case["reference"]
    for part, image in zip(parts, wanted["per_image"], strict=True):
        assert part.weight == image["weight"]
        unions = [pair[1][1] for pair in image["pairs_bg_fg_intersection_union"]]
        assert part.union == sum(unions)
        assert part.iou / part.weight == pytest.approx(image["giou_image"], abs=RELEASED)
    found = released_metrics.released_scores(released_metrics.merge(*parts))
    assert found == pytest.approx((wanted["giou"], wanted["ciou"]), abs=RELEASED)


def test_a_picture_without_pairs_contributes_nothing(golden):
    case = golden.case("muse", "m10")
    assert "reference_error" in case
    nothing = released_metrics.tally_generated(golden.questions(case, 0))
    assert nothing == released_metrics.ReleasedSums()


@pytest.mark.parametrize("key", ["c0", "c1", "c2"])
def test_costs(golden, key):
    case = golden.case("matching_cost", key)

    def array(name: str) -> np.ndarray:
        return golden.arrays[f"{key}_{name}"]

    at_points = costs(array("sampled_pred")[:, None], array("sampled_gt")[:, None])
    everywhere = costs(array("pred").astype(np.float32), array("gt"))
    for found, prefix, tolerance in ((at_points, "", COST), (everywhere, "full_", EXACT)):
        for name in Costs._fields:
            np.testing.assert_allclose(
                getattr(found, name), array(prefix + name), atol=tolerance, rtol=tolerance
            )
    for found, name in ((at_points, "assignment"), (everywhere, "full_mask_assignment")):
        pairs = assign(found)
        matched = pairs[(pairs != UNMATCHED).all(axis=1)]
        np.testing.assert_array_equal(matched.T, case[name])
