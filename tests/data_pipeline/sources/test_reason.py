"""Tests of the ReasonSeg reader; goldens/test_decode_other.py compares with OpenCV's masks."""

from __future__ import annotations

import hashlib
import json
import pickle
import random

import numpy as np
import pytest

from data_pipeline.errors import DamagedError
from data_pipeline.example import Turn
from data_pipeline.formats.raster import Shape, rasterise
from data_pipeline.sources.reason import TARGET, VOID, ReasonSeg
from pixellm_jax.errors import InputError
from tests.support.made_up import (
    HW,
    mutations,
    pixels,
    read_all,
    survives,
    write_json,
    write_picture,
)

BOX = [[1, 1], [3, 1], [3, 3], [1, 3]]


def shape(label="target", points=BOX):
    return {"label": label, "points": points}


def reason(root, stem="a", split="train", **changes):
    folder = root / "reason_seg/ReasonSeg" / split
    write_picture(folder / f"{stem}.jpg")
    labels = {"text": ["Who?", "the Dog"], "is_sentence": True, "shapes": [shape()]} | changes
    return write_json(folder / f"{stem}.json", labels)


def only(root, split="train"):
    readings, damaged = read_all(ReasonSeg(), root, split)
    assert not damaged
    (reading,) = readings.values()
    return reading


def rasterised(*shapes, hw=HW):
    return rasterise([Shape(tuple(corners), value) for corners, value in shapes], hw).tolist()


def test_questions_share_one_target(tmp_path):
    reason(tmp_path)
    example, problems = only(tmp_path)
    assert problems == ()
    assert (example.key, example.dataset, example.split) == ("train/a", "ReasonSeg", "train")
    assert (example.kind, example.hw, example.void) == ("long", HW, None)
    assert example.conversations == ((Turn("Who?", None, (0,)),), (Turn("the Dog", None, (0,)),))
    (target,) = example.targets
    assert (target.phrases, target.mask) == ((), 0)
    box = [0, 1, 1, 1, 0, 0, 0]
    assert pixels(example.masks[0]) == [[0] * 7, box, box, box, [0] * 7]


def test_noun_phrases_become_target_phrases(tmp_path):
    reason(tmp_path, is_sentence=False)
    example = only(tmp_path).example
    assert example.kind == "short"
    assert example.targets[0].phrases == ("Who?", "the Dog")


def test_labels(tmp_path):
    shapes = [
        shape("Flag", [[0, 0]]),
        shape("Ignore_region", [[2, 2]]),
        shape("dog", [[4, 0], [6, 0]]),
        shape("flagpole", [[0, 4]]),
    ]
    reason(tmp_path, shapes=shapes)
    example = only(tmp_path).example
    assert np.argwhere(pixels(example.masks[0])).tolist() == [[0, 4], [0, 5], [0, 6], [4, 0]]
    assert np.argwhere(pixels(example.void)).tolist() == [[2, 2]]


def test_fractional_corners_are_truncated(tmp_path):
    reason(tmp_path, shapes=[shape(points=[[2.99, 3.99]]), shape(points=[[-0.9, 0.9]])])
    assert np.argwhere(pixels(only(tmp_path).example.masks[0])).tolist() == [[0, 0], [3, 2]]


def test_explanations_apply_to_training_images_only(tmp_path):
    for split in ("train", "val"):
        reason(tmp_path, split=split)
    reason(tmp_path, stem="b")
    rows = [{"image": "a.jpg", "query": "?", "outputs": "It barks."}]
    write_json(tmp_path / "reason_seg/ReasonSeg/explanatory/train.json", rows)
    found = read_all(ReasonSeg(), tmp_path, "train_val")[0]
    assert list(found) == ["train/a", "train/b", "val/a"]
    assert [reading.example.split for reading in found.values()] == ["train", "train", "val"]
    answers = {
        key: {turn.answer for (turn,) in reading.example.conversations}
        for key, reading in found.items()
    }
    assert answers == {"train/a": {"It barks."}, "train/b": {None}, "val/a": {None}}
    entries = ReasonSeg().entries(tmp_path, "train_val")
    assert pickle.loads(pickle.dumps(entries)) == entries


def test_damaged_explanations(tmp_path):
    reason(tmp_path)
    file = tmp_path / "reason_seg/ReasonSeg/explanatory/train.json"
    write_json(file, [{"image": "a.jpg", "outputs": 3}])
    example, problems = only(tmp_path)
    assert [turn.answer for (turn,) in example.conversations] == [None, None]
    assert problems == ("the explanation is 3, expected text",)
    write_json(file, [{"image": "a.jpg", "outputs": "x"}, {"outputs": "y"}])
    with pytest.raises(InputError, match="row 1 names no image"):
        ReasonSeg().entries(tmp_path, "train")


def test_code_page_1252(tmp_path):
    path = reason(tmp_path, text=["Où est le café “noir” – là?"])
    path.write_bytes(path.read_text(encoding="utf-8").encode("cp1252"))
    ((turn,),) = only(tmp_path).example.conversations
    assert turn.question == "Où est le café “noir” – là?"


def test_damaged_questions_are_dropped_individually(tmp_path):
    reason(tmp_path, text=["Who?", 3, " "])
    example, problems = only(tmp_path)
    assert len(example.conversations) == 1
    assert problems == ("question 1 is 3, expected text", "question 2 is ' ', expected text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": []}, "no question"),
        ({"text": "Who?"}, "text is a str"),
        ({"is_sentence": 1}, "is_sentence is 1"),
        ({"shapes": None}, "shapes is a NoneType"),
        ({"shapes": [{"points": BOX}]}, "shape 0 has no label"),
        ({"shapes": [shape(), shape(points=[])]}, "shape 1 has no corners"),
        ({"shapes": [shape(points=[[1, 2, 3]])]}, "corner [1, 2, 3]"),
        ({"shapes": [shape(points=[["1", 2]])]}, "expected two numbers"),
        ({"shapes": [shape(points=[[float("nan"), 2]])]}, "expected two numbers"),
        ({"shapes": [shape(points=[[1e9, 2]])]}, "expected two numbers"),
        ({"shapes": [shape(points=[[0, 0], [2**20, 0]] * 2)]}, "outlines of more than"),
    ],
)
def test_damaged_labels(tmp_path, changes, message):
    reason(tmp_path, **changes)
    assert message in read_all(ReasonSeg(), tmp_path, "train")[1]["train/a"]


def test_damaged_files_are_reported(tmp_path):
    for stem in ("no_picture", "no_labels", "list", "cut", "bytes"):
        reason(tmp_path, stem)
    folder = tmp_path / "reason_seg/ReasonSeg/train"
    (folder / "no_picture.jpg").unlink()
    (folder / "no_labels.json").unlink()
    (folder / "list.json").write_text("[]")
    (folder / "cut.json").write_text('{"text": ["a"')
    (folder / "bytes.json").write_bytes(b"\x81\x9d")
    readings, damaged = read_all(ReasonSeg(), tmp_path, "train")
    assert not readings
    for stem, text in (
        ("no_picture", "no picture"),
        ("no_labels", "no label file"),
        ("list", "is a list"),
        ("cut", "is not JSON"),
        ("bytes", "is not JSON"),
    ):
        assert text in damaged[f"train/{stem}"]
    with pytest.raises(InputError, match="no split 'train_test'"):
        ReasonSeg().entries(tmp_path, "train_test")
    with pytest.raises(InputError, match=r"found no \*.json in .*val"):
        ReasonSeg().entries(tmp_path, "train_val")


def test_smaller_shapes_are_on_top():
    whole, part = [(0, 0), (6, 0), (6, 4), (0, 4)], [(1, 1), (2, 1)]
    for order in (1, -1):
        rows = rasterised(*[(whole, TARGET), (part, VOID)][::order])
        assert rows == [[1] * 7, [1, 255, 255, 1, 1, 1, 1]] + [[1] * 7] * 3


def test_first_of_equal_shapes_is_on_top():
    assert rasterised(([(1, 0)], TARGET), ([(1, 0)], VOID))[0] == [0, TARGET, 0, 0, 0, 0, 0]


def test_order_depends_on_the_area_inside_the_image():
    """The larger shape has only two pixels inside the image, so it is drawn last."""
    outside, inside = [(5, 0), (90, 0), (90, 0), (5, 0)], [(4, 0), (6, 0)]
    assert rasterised((outside, TARGET), (inside, VOID))[0] == [0, 0, 0, 0, 255, 1, 1]


def test_outlines_are_drawn_and_holes_remain():
    assert rasterised(([(0, 0), (4, 2)], 1))[:3] == [
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
    ]
    inner = [(1, 1), (5, 1), (5, 3), (1, 3), (1, 1)]
    ring = [(0, 0), (6, 0), (6, 4), (0, 4), (0, 0), *inner]
    hole = [1, 1, 0, 0, 0, 1, 1]
    assert rasterised((ring, 1)) == [[1] * 7, [1] * 7, hole, [1] * 7, [1] * 7]


def test_shapes_outside_the_image_have_no_pixels():
    for corners in ([(-9, -9), (-2, -9), (-2, 20)], [(7, 0), (9, 4)], [(0, 5), (6, 5)], [(8, -3)]):
        assert rasterised((corners, 1)) == [[0] * 7] * 5
    with pytest.raises(DamagedError, match="size"):
        rasterise([], (0, 3))


def test_rasterisation_is_translation_equivariant():
    chance = np.random.default_rng(11)
    for _ in range(50):
        corners = chance.integers(0, 30, (chance.integers(1, 9), 2))
        here = rasterise([Shape(tuple(map(tuple, corners.tolist())), 1)], (31, 37))
        moved = [(x + 5, y + 3) for x, y in corners.tolist()]
        there = rasterise([Shape(tuple(moved), 1)], (37, 43))
        assert (there[3:34, 5:42] == here).all()
        assert there.sum() == here.sum()
        assert all(here[y, x] for x, y in corners)


def test_filling_matches_opencv():
    """Compare with the checksum of OpenCV 4.8.0 and 4.10.0: closed `polylines`, then `fillPoly`."""
    chance, digest = random.Random(13), hashlib.sha1()
    for _ in range(300):
        height, width = chance.randint(1, 60), chance.randint(1, 60)
        margin = chance.choice([0, 1, 3, 40])  # corners outside the image
        corners = tuple(
            (
                chance.randint(-margin, width - 1 + margin),
                chance.randint(-margin, height - 1 + margin),
            )
            for _ in range(chance.randint(1, 12))
        )
        pixels = rasterise([Shape(corners, 1)], (height, width))
        digest.update(np.packbits(pixels).tobytes())
    assert digest.hexdigest() == "e4f29fcc8ac4a7732f591e06fd5e050d2e92f974"


def test_fuzz_labels(tmp_path):
    path = reason(tmp_path, shapes=[shape(), shape("ignore", [[2, 2], [5.5, 4]]), shape("flag")])
    json.loads(path.read_text())
    for _ in mutations(path, 200, seed=6):
        survives(ReasonSeg(), tmp_path, "train")


def test_fuzz_explanations(tmp_path):
    reason(tmp_path)
    rows = [{"image": "a.jpg", "query": "?", "outputs": "It barks."}]
    path = write_json(tmp_path / "reason_seg/ReasonSeg/explanatory/train.json", rows)
    for _ in mutations(path, 60, seed=7):
        survives(ReasonSeg(), tmp_path, "train")
