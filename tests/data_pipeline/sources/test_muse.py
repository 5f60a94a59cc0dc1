"""Tests of the MUSE reader with valid and damaged items."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DamagedError
from data_pipeline.example import Target, Turn, from_json, to_json
from data_pipeline.formats import masks
from data_pipeline.reading import Entry, Reading, Source
from data_pipeline.sources.muse import Muse
from pixellm_jax.errors import InputError
from tests.support.mutation import mutate

HW = (11, 13)
CUP: dict[str, Any] = {
    "id": 5,
    "category_name": "cup",
    "rephrased_name": "red cup",
    "segmentation": [[1, 1, 4, 1, 4, 3, 1, 3]],
}
PLATE: dict[str, Any] = {
    "id": 6,
    "category_name": "plate",
    "segmentation": {"size": list(HW), "counts": [0, 22, 121]},
}
ITEM: dict[str, Any] = {
    "coco_url": "http://x/train2017/000000000030.jpg",
    "height": HW[0],
    "width": HW[1],
    "ann_list": [CUP, PLATE],
    "questions": ["What is there?", "Where is the cup?"],
    "answers": [[CUP, PLATE], [CUP]],
    "text_answers": ["The {seg} on the {seg}, in {braces} {0}.", None],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("train2017", "val2017", "train2014"):
        path = tmp_path / "refer_seg/images/mscoco/images" / folder / "000000000030.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", HW[::-1], folder == "val2017" and "red" or "blue").save(path)
    return tmp_path


def read(root: Path, *items: Any, split: str = "train", name: str = "muse/muse") -> list[Reading]:
    path = root / f"{name}_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(items))
    return [Muse().read(entry) for entry in Muse().entries(root, split)]


def changed(**changes: Any) -> dict[str, Any]:
    """Return ITEM with other values; None removes a key."""
    item = {**copy.deepcopy(ITEM), **changes}
    return {key: value for key, value in item.items() if value is not None}


def test_example(root):
    ((example, problems),) = read(root, ITEM)
    assert problems == ()
    assert example.key == "train/0"
    assert (example.dataset, example.split, example.kind, example.hw) == (
        "muse",
        "train",
        "muse",
        HW,
    )
    assert example.targets == (
        Target(("red cup", "cup"), 0, (5,)),
        Target(("plate",), 1, (6,)),
        Target(("red cup", "cup"), 0, (5,)),
    )
    assert example.conversations == (
        (Turn("What is there?", "The {seg} on the {seg}, in {braces} {0}.", (0, 1)),),
        (Turn("Where is the cup?", None, (2,)),),
    )
    first, second = masks.decode_many(example.masks)
    assert np.argwhere(first).tolist() == [[y, x] for y in (1, 2) for x in (1, 2, 3)]
    assert second[:, :2].all() and second.sum() == 22
    assert from_json(to_json(example), example.image) == example


def test_implements_source(root):
    assert isinstance(Muse(), Source)
    read(root, ITEM)
    (entry,) = Muse().entries(root, "train")
    assert isinstance(entry, Entry)
    source, entry = pickle.loads(pickle.dumps((Muse(), entry)))
    assert source.read(entry).example.key == "train/0"


@pytest.mark.parametrize("name", ["muse/muse", "muse/MUSE", "muse", "MUSE"])
@pytest.mark.parametrize("split", Muse().splits)
def test_file_names(root, name, split):
    ((example, _),) = read(root, ITEM, split=split, name=name)
    assert (example.key, example.split) == (f"{split}/0", split)


@pytest.mark.parametrize(
    ("changes", "folder"),
    [
        ({}, "train2017"),
        ({"coco_url": "http://x/val2017/000000000030.jpg"}, "val2017"),
        ({"file_name": "000000000030.jpg"}, "train2014"),
        ({"file_name": "000000000030.jpg", "coco_url": None}, "train2014"),
    ],
)
def test_image_folders(root, changes, folder):
    ((example, _),) = read(root, changed(**changes))
    path = root / "refer_seg/images/mscoco/images" / folder / "000000000030.jpg"
    assert example.image == path.read_bytes()


def test_images_in_the_coco_folder(root):
    (root / "refer_seg").rename(root / "elsewhere")
    (root / "coco").mkdir()
    (root / "elsewhere/images/mscoco/images/train2017").rename(root / "coco/train2017")
    ((example, _),) = read(root, ITEM)
    assert example.image


@pytest.mark.parametrize("answers", [None, [None, None]])
def test_without_text_answers(root, answers):
    ((example, problems),) = read(root, changed(text_answers=answers))
    assert problems == ()
    assert [turn.answer for (turn,) in example.conversations] == [None, None]


def test_text_answers_may_be_null(root):
    ((example, problems),) = read(root, {**ITEM, "text_answers": None})
    assert problems == () and len(example.conversations) == 2


def with_object(**changes: Any) -> dict[str, Any]:
    """Return ITEM with changes to the object of its first question."""
    return {"answers": [[{**CUP, **changes}, PLATE], [CUP]]}


ONE_QUESTION = {
    "a {seg} too many": ({"text_answers": ["{seg} {seg} {seg}", None]}, "3 {seg} for 2 objects"),
    "a {seg} too few": ({"text_answers": ["{seg}", None]}, "1 {seg} for 2 objects"),
    "a text answer of numbers": ({"text_answers": [3, None]}, "text_answers is a int"),
    "a blank text answer": ({"text_answers": [" ", None]}, "expected text"),
    "a question of null": ({"questions": [None, "Where?"]}, "question is None"),
    "a blank question": ({"questions": [" ", "Where?"]}, "question is ' '"),
    "half a character": ({"questions": ["\ud800", "Where?"]}, "half a character"),
    "answers of null": ({"answers": [None, [CUP]]}, "answers is a NoneType"),
    "an object of null": ({"answers": [[None, CUP], [CUP]]}, "an object is a NoneType"),
    "no mask": (with_object(segmentation=None), "expected polygons"),
    "half a polygon": (with_object(segmentation=[[1, 2, 3]]), "polygon of 3 numbers"),
    "a mask of another size": (
        with_object(segmentation={"size": [13, 11], "counts": [143]}),
        "13 x 11 in a picture of 11 x 13",
    ),
    "no name": (with_object(category_name=None, rephrased_name=None), "neither rephrased_name"),
    "a name of numbers": (with_object(category_name=3), "a name is 3"),
    "nothing to answer": (
        {"answers": [[], [CUP]], "text_answers": None},
        "neither objects nor a text answer",
    ),
}


@pytest.mark.parametrize("case", ONE_QUESTION)
def test_damaged_question_is_dropped_individually(root, case):
    changes, reason = ONE_QUESTION[case]
    ((example, problems),) = read(root, changed(**changes))
    assert len(problems) == 1
    assert problems[0].startswith("question 0: ") and reason in problems[0]
    assert [len(turn.targets) for (turn,) in example.conversations] == [1]
    assert example.targets == (Target(("red cup", "cup"), 0, (5,)),)
    assert len(example.masks) == 1


@pytest.mark.parametrize("key", ["answers", "text_answers"])
def test_parallel_lists_of_different_lengths(root, key):
    ((example, problems),) = read(root, changed(**{key: ITEM[key][:1]}))
    assert problems == (f"question 1: {key} has nothing for it",)
    assert len(example.conversations) == 1


@pytest.mark.parametrize("split", ["val", "test_less", "test_many"])
def test_evaluation_keeps_questions_with_a_wrong_text_answer(root, split):
    """The reference ignores text answers in evaluation, so the measured questions stay the same."""
    ((example, problems),) = read(root, changed(text_answers=["{seg}", 3]), split=split)
    assert [turn.answer for (turn,) in example.conversations] == [None, None]
    assert [len(turn.targets) for (turn,) in example.conversations] == [2, 1]
    assert problems == (
        "question 0: text answer left out: text answer with 1 {seg} for 2 objects",
        "question 1: text answer left out: its part of text_answers is a int",
    )


def test_evaluation_keeps_questions_without_objects(root):
    ((example, problems),) = read(
        root, changed(answers=[[], [CUP]], text_answers=None), split="val"
    )
    assert problems == ()
    assert [turn.targets for (turn,) in example.conversations] == [(), (0,)]


def test_optional_fields_of_objects(root):
    cup = {"category_name": "cup", "rephrased_name": None, "segmentation": []}
    same = {"id": "x", "category_name": "cup", "rephrased_name": "cup", "segmentation": []}
    item = changed(questions=["What?"], answers=[[cup, same]], text_answers=None)
    ((example, problems),) = read(root, item)
    assert problems == ()
    assert example.targets == (Target(("cup",), 0), Target(("cup",), 0))
    assert masks.area(example.masks[0]) == 0


DAMAGED = {
    "not an object": (7, "item is a int"),
    "null": (None, "item is a NoneType"),
    "no questions": (changed(questions=None), "no questions"),
    "empty": (changed(questions=[], answers=[], text_answers=[]), "no questions"),
    "questions of text": (changed(questions="What?"), "no questions"),
    "no answers": (changed(answers=None), "no usable question: question 0: answers has nothing"),
    "no height": (changed(height=None), "size None x 13"),
    "a height of text": (changed(height="11"), "size '11' x 13"),
    "no pixels": (changed(width=0), "size 11 x 0"),
    "too many pixels": (changed(width=10**9), "size 11 x 1000000000"),
    "another size": (changed(height=12), "is 11 x 13, annotated as 12 x 13"),
    "no picture named": (changed(coco_url=None), "neither file_name nor coco_url"),
    "no such picture": (changed(file_name="x.jpg"), "no picture"),
    "a picture elsewhere": (changed(file_name="../train2017/000000000030.jpg"), "leads out of"),
    "an absolute picture": (changed(file_name="/etc/passwd"), "leads out of"),
    "a folder": (changed(coco_url="train2017/"), "expected the name of a picture"),
    "a number for a name": (changed(file_name=30), "expected the name of a picture"),
    "a zero in the name": (changed(file_name="a\0b"), "expected the name of a picture"),
    "a long name": (changed(file_name="a" * 5000), "cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(root, case):
    item, reason = DAMAGED[case]
    with pytest.raises(DamagedError) as error:
        read(root, item)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_damaged_images(root):
    path = root / "refer_seg/images/mscoco/images/train2017/000000000030.jpg"
    for data in (b"", b"hello", path.read_bytes()[:20]):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match="no readable header"):
            read(root, ITEM)


def test_damaged_items_do_not_affect_others(root):
    with pytest.raises(DamagedError):
        read(root, None, ITEM)
    entries = Muse().entries(root, "train")
    assert [entry.key for entry in entries] == ["train/0", "train/1"]
    assert Muse().read(entries[1]).example.key == "train/1"


def test_missing_or_invalid_files(root):
    with pytest.raises(InputError, match="muse has no split 'test': use one of train, val"):
        Muse().entries(root, "test")
    with pytest.raises(InputError, match="found none of .*muse_val.json"):
        Muse().entries(root, "val")
    (root / "muse_val.json").write_text('[{"questions": ')
    with pytest.raises(InputError, match="muse_val.json' near byte 1: "):
        Muse().entries(root, "val")


@pytest.mark.parametrize("seed", range(10))
def test_fuzz(root, seed):
    """10 x 40 mutated files: examples, `DamagedError` or `InputError`."""
    rng = random.Random(seed)
    path = root / "muse_train.json"
    for _ in range(40):
        path.write_text(json.dumps(mutate([ITEM, ITEM], rng, faults=6)))
        try:
            entries = Muse().entries(root, "train")
        except InputError:
            continue
        for entry in entries:
            try:
                example, _ = Muse().read(entry)
            except DamagedError:
                continue
            assert from_json(to_json(example), example.image) == example
            to_json(example).encode("utf-8")
            masks.decode_many(example.masks)
