from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources.semantic import (
    ADE20K_CLASSES,
    COCOSTUFF_CLASSES,
    Ade20k,
    CocoStuff,
    Mapillary,
)
from pixellm_jax.errors import InputError
from tests.support.made_up import (
    HW,
    mutations,
    named,
    pixels,
    read_all,
    survives,
    write_json,
    write_labels,
    write_picture,
)

VALUES = np.array([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], *[[3] * 7] * 3])


def ade(root, stem="ADE_train_1", values=VALUES, mode="L"):
    write_picture(root / f"ade20k/images/training/{stem}.jpg")
    return write_labels(root / f"ade20k/annotations/training/{stem}.png", values, mode)


def mapillary(root, names=("animal--bird", "void--ego-vehicle", "void--x", "object--bird")):
    write_picture(root / "mapillary/training/images/a.jpg")
    labels = [{"name": name, "readable": name.split("--")[1].title()} for name in names]
    write_json(root / "mapillary/config_v2.0.json", {"version": "2.0", "labels": labels})
    return write_labels(root / "mapillary/training/v2.0/labels/a.png", VALUES, "P")


def test_class_lists():
    assert len(ADE20K_CLASSES) == len(set(ADE20K_CLASSES)) == 150
    assert len(COCOSTUFF_CLASSES) == len(set(COCOSTUFF_CLASSES)) == 182
    assert (COCOSTUFF_CLASSES[0], COCOSTUFF_CLASSES[181]) == ("person", "wood")
    assert sum("-" in name for name in COCOSTUFF_CLASSES) == 28
    assert (ADE20K_CLASSES[0], ADE20K_CLASSES[149]) == ("wall", "flag")
    for names in (ADE20K_CLASSES, COCOSTUFF_CLASSES):
        assert all(name == name.strip().lower() for name in names)


def test_ade20k_counts_from_one_and_ignores_zero(tmp_path):
    ade(tmp_path)
    (reading,) = read_all(Ade20k(), tmp_path, "train")[0].values()
    example = reading.example
    assert (example.key, example.dataset, example.split) == ("ADE_train_1", "ade20k", "train")
    assert (example.kind, example.hw, example.conversations) == ("names", HW, ())
    assert named(example) == [(("wall",), (0,)), (("sky",), (2,))]
    assert [target.mask for target in example.targets] == [0, 1]
    assert pixels(example.void) == (VALUES == 0).tolist()
    assert pixels(example.masks[0]) == (VALUES == 1).tolist()
    assert pixels(example.masks[1]) == (VALUES == 3).tolist()
    assert example.image == (tmp_path / "ade20k/images/training/ADE_train_1.jpg").read_bytes()


def test_ade20k_last_and_ignored_values(tmp_path):
    ade(tmp_path, values=np.where(VALUES == 0, 255, 150))
    (reading,) = read_all(Ade20k(), tmp_path, "train")[0].values()
    assert named(reading.example) == [(("flag",), (149,))]
    assert pixels(reading.example.void) == (VALUES == 0).tolist()


def test_no_void_without_ignored_pixels(tmp_path):
    ade(tmp_path, values=np.ones(HW))
    (reading,) = read_all(Ade20k(), tmp_path, "train")[0].values()
    assert reading.example.void is None


def test_cocostuff_ignores_subtypes(tmp_path):
    values = VALUES.copy()
    values[4] = 255
    values[3] = COCOSTUFF_CLASSES.index("wall-brick")
    write_picture(tmp_path / "coco/train2017/9.jpg")
    write_picture(tmp_path / "coco/train2017/without_labels.jpg")
    write_labels(tmp_path / "cocostuff/train2017/9.png", values)
    (reading,) = read_all(CocoStuff(), tmp_path, "train")[0].values()
    assert named(reading.example) == [
        (("person",), (0,)),
        (("bicycle",), (1,)),
        (("motorcycle",), (3,)),
    ]
    assert pixels(reading.example.void) == [[0] * 7] * 3 + [[1] * 7] * 2


def test_mapillary_ignores_void_classes(tmp_path):
    mapillary(tmp_path)
    (reading,) = read_all(Mapillary(), tmp_path, "train")[0].values()
    assert named(reading.example) == [(("bird",), (0,)), (("bird",), (3,))]
    assert pixels(reading.example.void) == (VALUES == 1).tolist()


def test_mapillary_void_as_targets_like_the_reference(tmp_path):
    mapillary(tmp_path)
    (reading,) = read_all(Mapillary(void_is_target=True), tmp_path, "train")[0].values()
    assert [target.ids for target in reading.example.targets] == [(0,), (1,), (3,)]
    assert reading.example.targets[1].phrases == ("ego-vehicle",)
    assert reading.example.void is None


@pytest.mark.parametrize(
    "labels",
    [[], [{"name": "a"}], [{"readable": "a"}], ["a"], [{"name": "a", "readable": "a"}] * 256],
)
def test_invalid_mapillary_config_is_an_error(tmp_path, labels):
    mapillary(tmp_path)
    write_json(tmp_path / "mapillary/config_v2.0.json", {"labels": labels})
    with pytest.raises(InputError, match="label"):
        Mapillary().entries(tmp_path, "train")


def test_order_splits_and_confusing_folder_names(tmp_path):
    root = tmp_path / "images" / "cocostuff"  # only folder contents decide, not words in the path
    for stem in ("c", "a", "a-1", "b"):
        ade(root, stem)
    entries = Ade20k().entries(root, "train")
    assert [entry.key for entry in entries] == ["a-1", "a", "b", "c"]  # in file name order
    assert read_all(Ade20k(), root, "train")[0].keys() == {"a", "a-1", "b", "c"}
    assert pickle.loads(pickle.dumps(entries)) == entries
    with pytest.raises(InputError, match=r"no \*\.png in .*validation"):
        Ade20k().entries(root, "val")
    with pytest.raises(InputError, match="no split 'test'"):
        Ade20k().entries(root, "test")


def test_damaged_entries_are_reported(tmp_path):
    for stem in ("no_picture", "no_labels", "size", "colour", "deep", "unknown", "cut", "text"):
        ade(tmp_path, stem)
    ade(tmp_path, "empty", np.zeros(HW))
    labels, pictures = (
        tmp_path / "ade20k" / name / "training" for name in ("annotations", "images")
    )
    (pictures / "no_picture.jpg").unlink()
    (labels / "no_labels.png").unlink()
    write_labels(labels / "size.png", VALUES[:4])
    write_labels(labels / "colour.png", VALUES, "RGB")
    Image.fromarray(VALUES.astype(np.uint16)).save(labels / "deep.png")
    write_labels(labels / "unknown.png", np.full(HW, 151))
    (labels / "cut.png").write_bytes((labels / "cut.png").read_bytes()[:50])
    (labels / "text.png").write_text("not a picture")
    readings, damaged = read_all(Ade20k(), tmp_path, "train")
    assert not readings
    for stem, reason in (
        ("no_picture", "no picture"),
        ("no_labels", "no label map"),
        ("size", "is 4 x 7, its picture 5 x 7"),
        ("colour", "mode RGB"),
        ("deep", "mode I"),
        ("unknown", r"values [151]"),
        ("cut", "cannot be decoded"),
        ("text", "cannot be decoded"),
        ("empty", "all of it is ignored"),
    ):
        assert reason in damaged[stem]


def test_label_maps_must_be_png(tmp_path):
    ade(tmp_path, "a")
    Image.fromarray(VALUES.astype(np.uint8)).save(
        tmp_path / "ade20k/annotations/training/a.png", format="JPEG"
    )
    assert "cannot be decoded" in read_all(Ade20k(), tmp_path, "train")[1]["a"]


@pytest.mark.parametrize("file", ["labels", "picture"])
def test_fuzz(tmp_path, file):
    labels = ade(tmp_path)
    picture = tmp_path / "ade20k/images/training/ADE_train_1.jpg"
    for _ in mutations(labels if file == "labels" else picture, 60, seed=1):
        survives(Ade20k(), tmp_path, "train")


def test_fuzz_config(tmp_path):
    mapillary(tmp_path)
    for _ in mutations(tmp_path / "mapillary/config_v2.0.json", 60, seed=2):
        survives(Mapillary(), tmp_path, "train")
