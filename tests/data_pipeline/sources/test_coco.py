from __future__ import annotations

import pytest

from data_pipeline.sources.coco import Coco
from pixellm_jax.errors import InputError
from tests.support.made_up import (
    HW,
    mutations,
    named,
    pixels,
    read_all,
    survives,
    write_json,
    write_picture,
)


def columns(first, last):
    """Return an annotation whose polygon covers whole columns."""
    return [[first, 0, last, 0, last, 5, first, 5]]


def row(first, last):
    return [int(first <= x < last) for x in range(HW[1])]


ANNOTATIONS = [
    {"id": 1, "image_id": 5, "category_id": 2, "segmentation": columns(0, 2)},
    {"id": 2, "image_id": 5, "category_id": 1, "segmentation": columns(1, 3), "iscrowd": 0},
    {"id": 3, "image_id": 5, "category_id": 2, "segmentation": columns(4, 5)},
    {
        "id": 4,
        "image_id": 5,
        "category_id": 1,
        "segmentation": {"size": [5, 7], "counts": [10, 25]},  # columns 2 to 6
        "iscrowd": 1,
    },
]


def coco(root, annotations=ANNOTATIONS, index="annotations/instances_train.json", folder="train"):
    write_picture(root / "coco" / folder / "5.jpg")
    value = {
        "images": [{"id": 5, "file_name": "5.jpg", "height": HW[0], "width": HW[1], "license": 1}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "traffic light"}],
    }
    return write_json(root / "coco" / index, value)


def only(source, root, split="train"):
    readings, damaged = read_all(source, root, split)
    assert not damaged
    (reading,) = readings.values()
    assert reading.problems == ()
    return reading.example


def test_instances_of_a_class_are_merged_into_one_target(tmp_path):
    coco(tmp_path)
    example = only(Coco(), tmp_path)
    assert named(example) == [(("traffic light",), (2,)), (("dog",), (1,))]
    assert pixels(example.masks[0]) == [[1, 1, 0, 0, 1, 0, 0]] * 5
    assert pixels(example.masks[1]) == [row(1, 3)] * 5
    assert (example.key, example.kind, example.hw) == ("train/5", "names", HW)


def test_instances_can_stay_separate_targets(tmp_path):
    coco(tmp_path)
    example = only(Coco(merge=False), tmp_path)
    assert named(example) == [
        (("traffic light",), (1,)),
        (("dog",), (2,)),
        (("traffic light",), (3,)),
    ]
    assert [pixels(mask)[0] for mask in example.masks] == [row(0, 2), row(1, 3), row(4, 5)]


@pytest.mark.parametrize("merge", [True, False])
def test_crowd_regions_are_void_except_under_instances(tmp_path, merge):
    coco(tmp_path)
    assert pixels(only(Coco(merge=merge), tmp_path).void) == [[0, 0, 0, 1, 0, 1, 1]] * 5
    coco(tmp_path, ANNOTATIONS[:3])
    assert only(Coco(merge=merge), tmp_path).void is None


def test_crowd_regions_alone_are_damaged(tmp_path):
    coco(tmp_path, ANNOTATIONS[3:])
    assert read_all(Coco(), tmp_path, "train")[1] == {
        "train/5": "the picture has crowd regions only"
    }


@pytest.mark.parametrize(
    ("index", "folder"),
    [
        ("annotations/instances_train.json", "train"),
        ("annotations/train.json", "images"),
        ("train.json", "images/train"),
        ("train/_annotations.coco.json", "train"),
        ("train.json", ""),
    ],
)
def test_accepted_file_layouts(tmp_path, index, folder):
    coco(tmp_path, index=index, folder=folder)
    assert only(Coco(), tmp_path).image == (tmp_path / "coco" / folder / "5.jpg").read_bytes()


def test_custom_folder_and_splits(tmp_path):
    coco(tmp_path, index="annotations/instances_default.json", folder="images")
    (tmp_path / "coco").rename(tmp_path / "mine")
    source = Coco(dataset="mine", folder="mine", splits=("default",))
    assert only(source, tmp_path, "default").dataset == "mine"
    with pytest.raises(InputError, match="mine has no split 'train': use one of default"):
        source.entries(tmp_path, "train")


def test_fuzz_index(tmp_path):
    index = coco(tmp_path)
    for _ in mutations(index, 200, seed=3):
        survives(Coco(), tmp_path, "train")


def test_fuzz_image(tmp_path):
    coco(tmp_path)
    for _ in mutations(tmp_path / "coco/train/5.jpg", 60, seed=4):
        survives(Coco(), tmp_path, "train")
