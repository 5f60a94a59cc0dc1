"""Masks, sentences and targets of the refer sets and MUSE against those of the reference.

Exact: run-length decoding and polygon filling are pycocotools' in both. Differences on purpose:
questions that are dropped alone (docs/reference_notes.md D12), and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DamagedError
from data_pipeline.example import SEG, Example
from data_pipeline.formats import json_items, masks
from data_pipeline.reading import Reading, Source
from data_pipeline.sources import refer
from data_pipeline.sources.muse import Muse

REFER = {
    source.dataset: source
    for source in (
        refer.REFCOCO,
        refer.REFCOCO_PLUS,
        refer.REFCOCOG,
        refer.REFCLEF,
        refer.GREFCOCO,
    )
}
VALIDATION = re.compile(r"val:(ref\w+\+?)\|\w+\|(\w+)")
PROMPT = re.compile(
    r"<image>\n ?(?:What is )?(.*?)(?: in this image\?)? Please output segmentation mask\."
)


@pytest.fixture(scope="module")
def golden(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "data/decode.json").read_text())["datasets"]


def readings(source: Source, root: Path, split: str) -> list[Reading]:
    return [source.read(entry) for entry in source.entries(root, split)]


def record(rle: masks.Rle) -> dict[str, Any]:
    """Return the record of a mask that the golden file stores."""
    mask = masks.decode(rle)
    ys, xs = np.nonzero(mask)
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else None
    assert masks.area(rle) == len(xs)
    return {
        "shape": list(mask.shape),
        "area": len(xs),
        "box_xyxy": box and list(map(int, box)),
        "sha1": hashlib.sha1(np.packbits(mask.reshape(-1)).tobytes()).hexdigest(),
    }


def expected(mask: dict[str, Any]) -> dict[str, Any]:
    return {key: mask[key] for key in ("shape", "area", "box_xyxy", "sha1")}


def target_records(example: Example) -> list[dict[str, Any]]:
    return [record(example.masks[target.mask]) for target in example.targets]


def same_picture(example: Example, golden: dict[str, Any], root: Path) -> None:
    assert example.image == (root / golden["image"]).read_bytes()
    assert list(example.hw) == golden["size_hw"]


@pytest.mark.parametrize("dataset", REFER)
def test_sentences_of_training(dataset, golden, data_root):
    found = readings(REFER[dataset], data_root, "train")
    images = sorted(golden[f"{dataset}|train"]["images"], key=lambda image: image["image_id"])
    assert [r.problems for r in found] == [()] * len(images)
    for (example, _), image in zip(found, images, strict=True):
        same_picture(example, image, data_root)
        assert example.key == f"train/{image['image_id']}"
        sentences = image["sentences"]
        assert [target.phrases for target in example.targets] == [(s["sent"],) for s in sentences]
        assert [target.ids for target in example.targets] == [
            (s["ref_id"], *(s["ann_id"] if dataset == "grefcoco" else [s["ann_id"]]), s["sent_id"])
            for s in sentences
        ]
        assert target_records(example) == [expected(s) for s in sentences]
        assert len(example.masks) == len({target.ids[1:-1] for target in example.targets})


def test_sentences_of_validation(golden, data_root):
    names = [name for name in golden if VALIDATION.fullmatch(name)]
    assert names
    for name in names:
        dataset, split = VALIDATION.fullmatch(name).groups()
        images = {image["image"]: image for image in golden[name]["images"]}
        found = readings(REFER[dataset], data_root, split)
        assert len(found) == len(images)
        for (example, problems), image in zip(
            found, by_picture(found, images, data_root), strict=True
        ):
            assert problems == ()
            same_picture(example, image, data_root)
            asked = [PROMPT.search(prompt)[1] for prompt in image["prompts"]]
            assert [t.phrases[0].strip().lower() for t in example.targets] == asked
            assert target_records(example) == [expected(mask) for mask in image["masks"]]


def by_picture(found, images, root) -> list[dict[str, Any]]:
    """The golden of each example; the files of a set differ."""
    bytes_of = {(root / image).read_bytes(): golden for image, golden in images.items()}
    return [bytes_of[example.image] for example, _ in found]


@pytest.mark.parametrize("split", Muse().splits)
def test_muse(split, golden, data_root):
    source = Muse()
    entries = source.entries(data_root, split)
    items = {item["index"]: item for item in golden[f"muse_{split}"]["items"]}
    assert [entry.key for entry in entries] == [f"{split}/{i}" for i in range(len(entries))]
    kept = {i: item for i, item in items.items() if not item.get("dropped_by_reference")}
    assert kept
    read = {number: source.read(entries[number]) for number in kept}
    for number, (example, problems) in read.items():
        item = items[number]
        same_picture(example, item, data_root)
        numbers = kept_questions(example, item["questions"], problems)
        assert [turn.question for (turn,) in example.conversations] == [
            item["questions"][i] for i in numbers
        ]
        sizes = item["targets_per_question"]
        assert [len(turn.targets) for (turn,) in example.conversations] == [
            sizes[i] for i in numbers
        ]
        in_order = [i for (turn,) in example.conversations for i in turn.targets]
        assert in_order == list(range(len(example.targets)))
        starts = np.cumsum([0, *sizes])
        records = [mask for i in numbers for mask in item["masks"][starts[i] : starts[i + 1]]]
        assert target_records(example) == [expected(mask) for mask in records]
        if "target_ann_ids" in item:
            ids = [(id_,) for i in numbers for id_ in item["target_ann_ids"][i]]
            assert [target.ids for target in example.targets] == ids
        if "target_names" in item:
            names = [name for i in numbers for name in item["target_names"][i]]
            assert [t.phrases[0] for t in example.targets] == list(map(without_box, names))
        for (turn,) in example.conversations:
            assert turn.answer is None or turn.answer.count(SEG) == len(turn.targets)


def kept_questions(example, questions, problems) -> list[int]:
    """Numbers of the questions that were not dropped; every dropped one was reported."""
    numbers = [re.match(r"question (\d+): (?!text answer left out)", line) for line in problems]
    dropped = {int(found[1]) for found in numbers if found}
    assert len(example.conversations) == len(questions) - len(dropped)
    return [i for i in range(len(questions)) if i not in dropped]


def without_box(name: str) -> str:
    """ "(name [x0, y0, x1, y1])" -> "name"."""
    return name.rpartition(" [")[0].removeprefix("(")


def test_what_the_reference_drops_whole(golden, data_root):
    """Of these pictures only the broken questions go; one without questions is damaged."""
    source = Muse()
    items = golden["muse_train"]["items"]
    for entry, item in zip(source.entries(data_root, "train"), items, strict=True):
        if not item["dropped_by_reference"]:
            continue
        published = json_items.fetch(entry.path, entry.span)["questions"]
        if not published:
            with pytest.raises(DamagedError, match="no questions"):
                source.read(entry)
            continue
        example, problems = source.read(entry)
        numbers = kept_questions(example, published, problems)
        assert [turn.question for (turn,) in example.conversations] == [
            published[i] for i in numbers
        ]
        for (turn,) in example.conversations:
            assert turn.answer is None or turn.answer.count(SEG) == len(turn.targets)
