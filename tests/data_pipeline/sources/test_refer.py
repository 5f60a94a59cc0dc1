"""Tests of the referring segmentation reader: splits, sentences, unions and damaged data."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DamagedError
from data_pipeline.example import Target, from_json, to_json
from data_pipeline.formats import masks
from data_pipeline.reading import Entry, Reading, Source
from data_pipeline.sources import refer
from data_pipeline.sources.refer import (
    GREFCOCO,
    REFCLEF,
    REFCOCO,
    REFCOCO_PLUS,
    REFCOCOG,
    Refer,
    in_split,
)
from pixellm_jax.errors import InputError
from tests.support.mutation import mutate

SETS = {source.dataset: source for source in (REFCOCO, REFCOCO_PLUS, REFCOCOG, REFCLEF, GREFCOCO)}
HW = (7, 11)


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(HW, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def polygon(top: int, left: int, bottom: int, right: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


INSTANCES: dict[str, Any] = {
    "info": {"year": 2014},
    "annotations": [
        {"id": 5, "image_id": 30, "segmentation": polygon(1, 1, 3, 4), "area": 6.0},
        {"id": 6, "image_id": 30, "segmentation": polygon(2, 2, 5, 9)},
        {"id": 7, "image_id": 31, "segmentation": [dict(masks.encode(rectangle(0, 0, 2, 2)))]},
        {"id": 8, "image_id": 31, "segmentation": []},
        {"id": 9, "image_id": 99, "segmentation": [[1]]},
    ],
    "images": [
        {"id": 31, "file_name": "b.jpg", "height": HW[0], "width": HW[1]},
        {"id": 30, "file_name": "a.jpg", "height": HW[0], "width": HW[1]},
    ],
    "categories": [{"id": 1, "name": "cup"}],
}


def ref(ref_id: int, image_id: int, ann_id: Any, split: str, *texts: Any) -> dict[str, Any]:
    sentences = [
        {"sent_id": 10 * ref_id + i, "sent": text, "raw": text, "tokens": []}
        for i, text in enumerate(texts)
    ]
    return {
        "ref_id": ref_id,
        "image_id": image_id,
        "ann_id": ann_id,
        "split": split,
        "category_id": 1,
        "sentences": sentences,
        "file_name": "ignored.jpg",
    }


REFS = [
    ref(4, 31, 7, "train", "Plate "),
    ref(2, 30, 6, "train", "table", "big table"),
    ref(1, 30, 5, "train", "cup"),
    ref(3, 30, 6, "val", "desk"),
]
GREFS = [
    ref(4, 30, [5, 6], "train", "all things"),
    ref(2, 30, [-1], "train", "nothing", "no dog"),
    ref(1, 30, [6], "train", "table"),
    ref(3, 31, [8, 7], "train", "plate"),
    ref(5, 30, [6, 5], "train", "things"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("mscoco/images/train2014", "saiapr_tc-12"):
        path = tmp_path / "refer_seg/images" / folder
        path.mkdir(parents=True)
        for name, colour in (("a.jpg", "red"), ("b.jpg", "blue")):
            Image.new("RGB", HW[::-1], colour).save(path / name)
    return tmp_path


def write(root: Path, source: Refer, refs: Any, instances: Any = INSTANCES) -> None:
    folder = root / "refer_seg" / source.dataset
    folder.mkdir(exist_ok=True)
    name = "grefs" if source.generalised else "refs"
    (folder / f"{name}({source.split_by}).p").write_bytes(pickle.dumps(refs, 2))
    (folder / "instances.json").write_text(json.dumps(instances))


def read(
    root: Path,
    refs: Any,
    split: str = "train",
    source: Refer = REFCOCO,
    instances: Any = INSTANCES,
) -> list[Reading]:
    write(root, source, refs, instances)
    return [source.read(entry) for entry in source.entries(root, split)]


@pytest.mark.parametrize("source", [REFCOCO, REFCOCO_PLUS, REFCOCOG, REFCLEF])
def test_examples(root, source):
    (first, problems), (second, more) = read(root, REFS, source=source)
    assert problems == more == ()
    assert (first.key, second.key) == ("train/30", "train/31")
    assert (first.dataset, first.split, first.kind) == (source.dataset, "train", "names")
    assert first.hw == HW and first.conversations == () and first.void is None
    assert first.targets == (
        Target(("table",), 0, (2, 6, 20)),
        Target(("big table",), 0, (2, 6, 21)),
        Target(("cup",), 1, (1, 5, 10)),
    )
    assert second.targets == (Target(("Plate ",), 0, (4, 7, 40)),)
    expected = [rectangle(2, 2, 5, 9), rectangle(1, 1, 3, 4)]
    np.testing.assert_array_equal(masks.decode_many(first.masks), expected)
    np.testing.assert_array_equal(masks.decode(second.masks[0]), rectangle(0, 0, 2, 2))
    folder = "saiapr_tc-12" if source is REFCLEF else "mscoco/images/train2014"
    assert first.image == (root / "refer_seg/images" / folder / "a.jpg").read_bytes()
    assert from_json(to_json(first), first.image) == first


@pytest.mark.parametrize("suffix", ["p", "json"])
def test_sentences_about_several_objects_or_none(root, suffix):
    write(root, GREFCOCO, GREFS)
    if suffix == "json":
        path = root / "refer_seg/grefcoco/grefs(unc)"
        path.with_suffix(".json").write_text(json.dumps(GREFS))
        path.with_suffix(".p").unlink()
    first, second = (GREFCOCO.read(entry) for entry in GREFCOCO.entries(root, "train"))
    assert first.problems == second.problems == ()
    assert first.example.targets == (
        Target(("all things",), 0, (4, 5, 6, 40)),
        Target(("nothing",), 1, (2, -1, 20)),
        Target(("no dog",), 1, (2, -1, 21)),
        Target(("table",), 2, (1, 6, 10)),
        Target(("things",), 3, (5, 6, 5, 50)),
    )
    cup, table = rectangle(1, 1, 3, 4), rectangle(2, 2, 5, 9)
    np.testing.assert_array_equal(
        masks.decode_many(first.example.masks), [cup | table, cup * 0, table, cup | table]
    )
    np.testing.assert_array_equal(masks.decode(second.example.masks[0]), rectangle(0, 0, 2, 2))


def test_only_grefcoco_allows_no_target(root):
    ((example, problems),) = read(root, [ref(1, 30, -1, "train", "dog"), REFS[1]])
    assert problems == ("ref 1: no annotation -1 in 'instances.json'",)
    assert len(example.targets) == 2


def test_object_without_pixels_is_kept(root):
    ((example, problems),) = read(root, [ref(1, 31, 8, "train", "speck")])
    assert problems == () and masks.area(example.masks[0]) == 0


@pytest.mark.parametrize(
    ("split", "published"),
    [
        ("train", {"train"}),
        ("val", {"val"}),
        ("test", {"test", "testA", "testB", "testC", "testAB", "testBC", "testAC"}),
        ("testA", {"testA", "testAB", "testAC"}),
        ("testB", {"testB", "testAB", "testBC"}),
        ("testC", {"testC", "testBC", "testAC"}),
        ("testAB", {"testAB"}),
        ("testBC", {"testBC"}),
        ("testAC", {"testAC"}),
    ],
)
def test_splits(split, published, root):
    names = ["train", "val", "test", "testA", "testB", "testC", "testAB", "testBC", "testAC"]
    assert {name for name in names if in_split(split, name)} == published
    refs = [ref(i, 30, 5, name, name) for i, name in enumerate(names)]
    ((example, _),) = read(root, refs, split)
    assert {target.phrases[0] for target in example.targets} == published


def test_unknown_splits(root):
    write(root, REFCOCO, REFS)
    for split in ("minival", "", "testC"):
        with pytest.raises(InputError, match="has no split .*use one of train, val, testA, testB"):
            REFCOCO.entries(root, split)
    assert REFCOCO.entries(root, "testA") == []


@pytest.mark.parametrize("source", SETS.values(), ids=SETS)
def test_implements_source(source, root):
    assert isinstance(source, Source)
    write(root, source, GREFS if source.generalised else REFS)
    entries = source.entries(root, "train")
    assert all(isinstance(entry, Entry) for entry in entries)
    source, again = pickle.loads(pickle.dumps((source, entries)))
    assert [source.read(entry) for entry in again] == [source.read(entry) for entry in entries]


def without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k != key}


GOOD = ref(1, 30, 5, "train", "cup")
SENTENCE = {"sent_id": 1, "sent": "x"}
ONE_REF = {
    "no annotation": (ref(2, 30, 77, "train", "x"), "ref 2: no annotation 77"),
    "an annotation of another picture": (
        ref(2, 30, 7, "train", "x"),
        "annotation 7 is of image 31",
    ),
    "no ann_id": (without(ref(2, 30, 6, "train", "x"), "ann_id"), "ann_id None"),
    "an ann_id of text": (ref(2, 30, "6", "train", "x"), "ann_id '6'"),
    "several annotations": (ref(2, 30, [5, 6], "train", "x"), "ann_id [5, 6]"),
    "no ref_id": (without(ref(2, 30, 6, "train", "x"), "ref_id"), "ref_id None"),
    "no sentences": (ref(2, 30, 6, "train"), "no sentences"),
    "sentences of text": ({**ref(2, 30, 6, "train"), "sentences": "x"}, "no sentences"),
    "a blank sentence": (ref(2, 30, 6, "train", " "), "ref 2: sentence is ' '"),
    "a sentence of null": (ref(2, 30, 6, "train", None), "ref 2: sentence is None"),
    "half a character": (ref(2, 30, 6, "train", "\ud800"), "half a character"),
    "a sentence that is text": ({**ref(2, 30, 6, "train"), "sentences": ["x"]}, "without sent_id"),
    "a sentence without number": (
        {**ref(2, 30, 6, "train"), "sentences": [without(SENTENCE, "sent_id")]},
        "without sent_id",
    ),
}


@pytest.mark.parametrize("case", ONE_REF)
def test_damaged_ref_is_dropped_individually(root, case):
    broken, reason = ONE_REF[case]
    ((example, problems),) = read(root, [broken, GOOD])
    assert example.targets == (Target(("cup",), 0, (1, 5, 10)),)
    assert len(problems) == 1 and reason in problems[0]
    with pytest.raises(DamagedError, match="no usable sentence: ") as error:
        read(root, [broken])
    assert reason in str(error.value)


def test_damaged_sentence_is_dropped_individually(root):
    ((example, problems),) = read(root, [ref(1, 30, 5, "train", "cup", "", "red cup")])
    assert [target.ids[-1] for target in example.targets] == [10, 12]
    assert len(problems) == 1


def test_damaged_mask_drops_its_refs(root):
    refs = [ref(1, 30, [5, 6], "train", "all"), ref(2, 30, [5], "train", "cup")]
    instances = {**INSTANCES, "annotations": [INSTANCES["annotations"][0]]}
    instances["annotations"] = [*instances["annotations"], {"id": 6, "segmentation": [[1, 2, 3]]}]
    ((example, problems),) = read(root, refs, source=GREFCOCO, instances=instances)
    assert problems == ("ref 1: polygon of 3 numbers: expected an even number, at least 4",)
    assert example.targets == (Target(("cup",), 0, (2, 5, 20)),)


@pytest.mark.parametrize("lost", [7, None, {}, without(GOOD, "split"), without(GOOD, "image_id")])
def test_refs_without_image(root, lost):
    write(root, REFCOCO, [GOOD, lost])
    good, bad = REFCOCO.entries(root, "train")
    assert REFCOCO.read(good).problems == ()
    assert bad.key == "train/ref 1"
    with pytest.raises(DamagedError, match="ref 1 of the index has no split or image_id"):
        REFCOCO.read(bad)


def image(**changes: Any) -> dict[str, Any]:
    return {**INSTANCES, "images": [{**INSTANCES["images"][1], **changes}]}


DAMAGED = {
    "no image record": ({**INSTANCES, "images": []}, "no image 'train/30' in 'instances.json'"),
    "no file name": (image(file_name=None), "expected the name of a picture"),
    "no such file": (image(file_name="c.jpg"), "no picture"),
    "another size": (image(height=8), "is 7 x 11, annotated as 8 x 11"),
    "a height of text": (image(height="7"), "size '7' x 11"),
    "a file elsewhere": (image(file_name="../a.jpg"), "leads out of"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(root, case):
    instances, reason = DAMAGED[case]
    with pytest.raises(DamagedError) as error:
        read(root, [GOOD], instances=instances)
    assert reason in str(error.value)


def test_missing_or_invalid_files(root):
    with pytest.raises(InputError, match=r"found none of .*refs\(unc\).p"):
        REFCOCO.entries(root, "train")
    write(root, REFCOCO, {"refs": []})
    with pytest.raises(InputError, match="holds a dict, expected a list"):
        REFCOCO.entries(root, "train")
    write(root, REFCOCO, [print])
    with pytest.raises(InputError, match="names the global"):
        REFCOCO.entries(root, "train")
    write(root, REFCOCO, REFS)
    path = root / "refer_seg/refcoco/instances.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match="near byte"):
        REFCOCO.entries(root, "train")
    path.unlink()
    with pytest.raises(InputError, match="found none of .*instances.json"):
        REFCOCO.entries(root, "train")


def test_entries_contain_no_polygons(root):
    write(root, REFCOCO, REFS)
    assert b"segmentation" not in pickle.dumps(REFCOCO.entries(root, "train"))
    assert refer.NO_TARGET == -1


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("source", [REFCLEF, GREFCOCO], ids=lambda source: source.dataset)
def test_fuzz(root, source, seed):
    """2 x 10 x 20 mutated indices: examples, `DamagedError` or `InputError`."""
    rng = random.Random(seed)
    refs = GREFS if source.generalised else REFS
    for _ in range(20):
        which = rng.randrange(3)
        write(
            root,
            source,
            mutate(refs, rng, faults=5) if which != 1 else refs,
            mutate(INSTANCES, rng, faults=5) if which != 0 else INSTANCES,
        )
        try:
            entries = source.entries(root, "train")
        except InputError:
            continue
        for entry in entries:
            try:
                example, _ = source.read(entry)
            except DamagedError:
                continue
            assert from_json(to_json(example), example.image) == example
            to_json(example).encode("utf-8")
            masks.decode_many(example.masks)
