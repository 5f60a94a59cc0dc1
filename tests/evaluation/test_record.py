"""Records of questions: there and back, what is refused, and their scores by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.metrics import IOU_UNIT
from pixellm_jax.evaluation.record import QuestionRecord, natural_order, read_records
from pixellm_jax.evaluation.summary import group_records, summarise, tally_record
from pixellm_jax.images import rle

HW = (3, 5)


def mask(*pixels: int) -> dict:
    found = np.zeros(HW, bool)
    found.reshape(-1)[list(pixels)] = True
    return rle.encode(found)


def record(**changes: object) -> QuestionRecord:
    """Two true masks, of which one is found by half, and an extra prediction."""
    values: dict = {
        "id": "muse/val/3/0",
        "picture": "coco/1.jpg",
        "hw": HW,
        "question": "Où est-ce ?",
        "expected": "The [SEG] and [SEG].",
        "answer": "the [SEG]  and [SEG].",
        "groups": ("few",),
        "truth": (mask(0, 1), mask(7, 8, 9)),
        "predicted": (mask(4), mask(1, 2)),
        "void": mask(14),
        "descriptions": ("a", "b"),
        "pairs": ((1, 0, 1, 3), (None, 1, 0, 3), (0, None, 0, 1)),
        "reason": "stop",
    }
    return QuestionRecord(**{**values, **changes})


def test_there_and_back():
    for judge in (None, {"judge": "words", "scores": [4, None]}):
        before = record(judge=judge)
        line = before.to_json()
        assert "\n" not in line and "Où" in line
        assert QuestionRecord.from_json(line) == before
        assert QuestionRecord.from_json(line.encode()) == before


def test_masks_there_and_back():
    rng = np.random.default_rng(0)
    for hw in ((1, 1), (7, 11), (64, 3)):
        inside = rng.random((4, *hw)) > rng.random((4, 1, 1))
        rles = [rle.check(json.loads(json.dumps(rle.encode(one)))) for one in inside]
        np.testing.assert_array_equal(rle.decode(rles, hw) > 0, inside)
        assert [rle.area(one) for one in rles] == inside.sum((1, 2)).tolist()
    assert rle.decode([], (2, 3)).shape == (0, 2, 3)


DAMAGES = [
    ({"more": 1}, "expected the keys"),
    ({"id": 3}, "id is not text"),
    ({"groups": "few"}, "groups is not a list"),
    ({"groups": [1]}, "not all text"),
    ({"hw": [3]}, "hw is not"),
    ({"hw": [5, 3]}, "a mask of [3, 5]"),
    ({"truth": [None] * 2}, "without size and counts"),
    ({"void": {"size": [3, 5], "counts": "4"}}, "do not fill 3 x 5"),
    ({"void": {"size": [3, 5], "counts": "`"}}, "end inside a count"),
    ({"void": {"size": [3, 5], "counts": "é"}}, "no text"),
    ({"void": {"size": [0, 5], "counts": ""}}, "not [height, width]"),
    ({"descriptions": ["a"]}, "the number of descriptions is not"),
    ({"pairs": []}, "do not name each of the 2 predicted masks"),
    ({"pairs": [[0, 0, 0, 1], [1, 1, 0, 1], [0, None, 0, 1]]}, "do not name each"),
    ({"pairs": [[0, 0, 2, 1], [1, 1, 0, 1]]}, "impossible areas"),
    ({"pairs": [[0, 0, 0.5, 1], [1, 1, 0, 1]]}, "not made of integers"),
    ({"pairs": [[0, 0, 0, None], [1, 1, 0, 1]]}, "impossible areas"),
    ({"pairs": [[0, None, 1, 1], [1, 0, 0, 1], [None, 1, 0, 1]]}, "is not a pair"),
    ({"pairs": [[0, 0], [1, 1]]}, "a pair is not"),
    ({"judge": {"judge": "x", "scores": [11, 1]}}, "no score from 1 to 10"),
    ({"judge": {"judge": "x", "scores": [1]}}, "no score from 1 to 10"),
    ({"judge": {"judge": "x"}}, "judge is neither"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_damage_is_refused(change, message):
    values = {**json.loads(record().to_json()), **change}
    with pytest.raises(InputError, match="not a record of a question") as caught:
        QuestionRecord.from_json(json.dumps(values))
    assert message in str(caught.value)


@pytest.mark.parametrize("line", ["", "{", "[]", "null", b"\xff", "[" * 100_000])
def test_what_is_no_record_is_refused(line):
    with pytest.raises(InputError, match="not a record of a question"):
        QuestionRecord.from_json(line)


def test_file_of_records(tmp_path):
    path, records = tmp_path / "questions.jsonl", [record(id=f"a/{i}") for i in (10, 2)]
    lines = [one.to_json().encode() + b"\n" for one in records]
    path.write_bytes(b"".join(lines) + lines[0][:50])
    assert read_records(path) == records  # without the line that was cut off
    assert sorted(records, key=natural_order) == records[::-1]
    path.write_bytes(lines[0] + b"{}\n" + lines[1])
    with pytest.raises(InputError, match=r"questions.jsonl:2: not a record"):
        read_records(path)
    path.write_bytes(lines[0] * 2)
    with pytest.raises(InputError, match=r"questions.jsonl:2: a second record of 'a/10'"):
        read_records(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_records(tmp_path / "no.jsonl")


def test_scores_by_hand():
    sums = tally_record(record())
    assert sums[:4] == (3, round(IOU_UNIT / 3), 1, 7)
    assert sums[4:] == (2, 1, 0, 0)  # two true masks with pixels, one of them found
    found = summarise([record()])
    assert found.giou == pytest.approx(1 / 9, abs=1e-12) and found.ciou == 1 / 7
    assert (found.right_count, found.same_text) == (1, 1)
    assert math.isnan(found.empty_right) and math.isnan(found.n_acc)


def test_empty_masks_by_hand():
    """An empty true mask is found by an empty one or by none at all, and by nothing else."""
    empty, one = mask(), mask(3)
    for predicted, pair, right in (
        ((), (None, 0, 0, 0), 1),
        ((empty,), (0, 0, 0, 0), 1),
        ((one,), (0, 0, 0, 1), 0),
    ):
        found = summarise(
            [record(truth=(empty,), predicted=predicted, pairs=(pair,), descriptions=())]
        )
        assert (found.giou, found.n_acc) == (right, right)
    nothing = record(truth=(), predicted=(), pairs=(), descriptions=(), expected="", answer="No.")
    found = summarise([nothing])
    assert (found.masks, found.empty_right) == (0, 1) and math.isnan(found.giou)
    extra = nothing._replace(predicted=(empty,), pairs=((0, None, 0, 0),), answer="[SEG]")
    found = summarise([extra])
    assert (found.masks, found.giou, found.empty_right) == (1, 0, 0)


def test_groups():
    rows = [record(id="a", groups=("x", "y")), record(id="b", groups=("y",)), record(groups=())]
    assert {name: len(own) for name, own in group_records(rows).items()} == {"x": 1, "y": 2}


def test_words_of_given_answers_say_nothing():
    found = summarise([record(reason="given")])
    assert math.isnan(found.right_count) and math.isnan(found.same_text)
