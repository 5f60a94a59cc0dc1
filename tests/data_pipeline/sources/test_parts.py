from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from data_pipeline.sources.parts import PacoLvis, PascalPart, part_phrases
from pixellm_jax.errors import InputError
from tests.support.made_up import (
    HW,
    named,
    pixels,
    read_all,
    write_json,
    write_picture,
)

SQUARE = [[0, 0, 2, 0, 2, 2, 0, 2]]
COLUMN = {"size": [5, 7], "counts": [0, 5, 30]}
CATEGORIES = [
    {"id": 4, "name": "car_(automobile)"},
    {"id": 7, "name": "car_(automobile):wheel"},
    {"id": 9, "name": "laptop_computer"},
]


def annotation(id, image, category, segmentation=SQUARE, **more):
    return {
        "id": id,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        **more,
    }


def paco(root: Path, annotations, images=(30,), **more) -> Path:
    for image in images:
        write_picture(root / f"coco/train2017/{image}.jpg")
    listed = [
        {"id": i, "file_name": f"train2017/{i}.jpg", "height": HW[0], "width": HW[1]}
        for i in images
    ]
    index = {"images": listed, "annotations": annotations, "categories": CATEGORIES, **more}
    return write_json(root / "vlpart/paco/annotations/paco_lvis_v1_train.json", index)


@pytest.mark.parametrize(
    ("category", "phrases"),
    [
        ("bench", ("bench",)),
        ("laptop_computer", ("laptop_computer",)),
        ("car_(automobile)", ("car",)),
        ("car_(automobile):roof", ("car roof", "the roof of the car")),
        ("cup:inner_side_(wall)", ("cup inner_side", "the inner_side of the cup")),
    ],
)
def test_phrases(category, phrases):
    assert part_phrases(category) == phrases


def test_every_annotation_is_a_target(tmp_path):
    annotations = [
        annotation(11, 30, 7, COLUMN),
        annotation(12, 31, 9),
        annotation(10, 30, 4),
        annotation(13, 30, 7),
    ]
    paco(tmp_path, annotations, images=(31, 30))
    entries = PacoLvis().entries(tmp_path, "train")
    assert [entry.key for entry in entries] == ["train/31", "train/30"]  # in file order
    assert pickle.loads(pickle.dumps(entries)) == entries
    readings, damaged = read_all(PacoLvis(), tmp_path, "train")
    assert not damaged
    example, problems = readings["train/30"]
    assert problems == ()
    assert (example.dataset, example.split, example.kind) == ("paco_lvis", "train", "names")
    wheel = ("car wheel", "the wheel of the car")
    assert named(example) == [(wheel, (11,)), (("car",), (10,)), (wheel, (13,))]
    assert [target.mask for target in example.targets] == [0, 1, 2]
    assert pixels(example.masks[0]) == [[1, 0, 0, 0, 0, 0, 0]] * 5
    assert pixels(example.masks[1])[:3] == [[1, 1, 0, 0, 0, 0, 0]] * 2 + [[0] * 7]


def test_pascal_part(tmp_path):
    folder = tmp_path / "vlpart/pascal_part"
    write_picture(folder / "VOCdevkit/VOC2010/JPEGImages/2008_1.jpg")
    index = {
        "images": [{"id": 1, "file_name": "2008_1.jpg", "height": HW[0], "width": HW[1]}],
        "annotations": [annotation(1, 1, 3)],
        "categories": [{"id": 3, "name": "horse:leg"}],
    }
    write_json(folder / "train.json", index)
    readings, damaged = read_all(PascalPart(), tmp_path, "train")
    assert not damaged
    example = readings["train/1"].example
    assert example.dataset == "pascal_part"
    assert named(example) == [(("horse leg", "the leg of the horse"), (1,))]


def test_damaged_annotations_are_dropped_individually(tmp_path):
    other_size = {"size": [7, 5], "counts": [35]}
    bad = [
        annotation(1, 30, 4, other_size),
        annotation(2, 30, 99),
        annotation(3, 30, 4, "x"),
        annotation(4, 30, 4, None),
        {"id": 5, "image_id": 30, "category_id": 4},
        annotation(6, 30, [4]),
    ]
    paco(tmp_path, [*bad, annotation(7, 30, 4)])
    (reading,) = read_all(PacoLvis(), tmp_path, "train")[0].values()
    assert named(reading.example) == [(("car",), (7,))]
    assert len(reading.problems) == len(bad)
    assert "annotation 1 at byte" in reading.problems[0]
    assert "7 x 5 in a picture of 5 x 7" in reading.problems[0]
    assert "category" in reading.problems[1]


def test_damaged_images_are_reported(tmp_path):
    images = ("missing", "bare", "size", "none", "text", "out", "twice", "bad")
    annotations = [annotation(i, name, 4) for i, name in enumerate(images) if name != "bare"]
    annotations += [annotation(50, 77, 4), annotation(51, 77, 4), "broken"]
    annotations[6]["segmentation"] = [[1]]
    index = paco(tmp_path, annotations, images)
    folder = tmp_path / "coco/train2017"
    (folder / "missing.jpg").unlink()
    write_picture(folder / "size.jpg", (7, 5))
    (folder / "text.jpg").write_text("not a picture")
    (folder / "none.jpg").write_bytes(b"")
    text = index.read_text().replace("train2017/out.jpg", "../../secret.jpg")
    row = '{"id": "twice", "file_name": "train2017/twice.jpg", "height": 5, "width": 7}'
    assert row in text
    index.write_text(text.replace(row, f'{row}, {row}, "broken"'))
    readings, damaged = read_all(PacoLvis(), tmp_path, "train")
    assert readings.keys() == {"train/twice"}
    reasons = {key.removeprefix("train/"): reason for key, reason in damaged.items()}
    for key, reason in (
        ("missing", "no picture"),
        ("bare", "no annotation"),
        ("size", "is 7 x 5, annotated as 5 x 7"),
        ("none", "no readable header"),
        ("text", "no readable header"),
        ("out", "leads out of"),
        ("bad", "no annotation can be used"),
        ("not listed 77", "2 annotations of a picture that is not listed"),
        ("not listed None", "1 annotations"),
    ):
        assert reason in reasons.pop(key)
    assert sorted(reasons.values()) == [
        "the listed picture has no id",
        "the listed picture is a second one of id twice",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"images": []}', '{"images": [1', "nonsense"])
def test_truncated_index_is_an_error(tmp_path, text):
    paco(tmp_path, []).write_text(text)
    with pytest.raises(InputError, match="paco_lvis_v1_train.json"):
        PacoLvis().entries(tmp_path, "train")


def test_missing_index_is_an_error(tmp_path):
    with pytest.raises(InputError, match="found none of"):
        PascalPart().entries(tmp_path, "train")
    with pytest.raises(InputError, match="no split 'test'"):
        PascalPart().entries(tmp_path, "test")
