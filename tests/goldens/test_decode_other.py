"""Semantic and part sets, ReasonSeg and LLaVA-Instruct against `data/decode.json`.

Exact, ReasonSeg too: its stored masks were drawn by OpenCV 4.8, and `rasterise` follows OpenCV as
it was up to 4.10. Mapillary is read as the reference reads it, with void classes as targets
(docs/reference_notes.md D20).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DamagedError
from data_pipeline.example import Example
from data_pipeline.formats.masks import area, decode
from data_pipeline.reading import Source
from data_pipeline.sources.instruct import LlavaInstruct
from data_pipeline.sources.parts import PacoLvis, PascalPart, part_phrases
from data_pipeline.sources.reason import TARGET, VOID, ReasonSeg
from data_pipeline.sources.semantic import (
    ADE20K_CLASSES,
    COCOSTUFF_CLASSES,
    Ade20k,
    CocoStuff,
    Mapillary,
)
from pixellm_jax.benchmark_question import Rle
from pixellm_jax.text.prompt import LLAVA_V1

INDICES = {
    "paco_lvis": (PacoLvis(), "vlpart/paco/annotations/paco_lvis_v1_train.json"),
    "pascal_part": (PascalPart(), "vlpart/pascal_part/train.json"),
}
SEMANTIC = {
    source.dataset: source for source in (Ade20k(), CocoStuff(), Mapillary(void_is_target=True))
}


@pytest.fixture(scope="module")
def golden(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "data/decode.json").read_text(encoding="utf-8"))["datasets"]


def record(rle: Rle | None, hw: tuple[int, int]) -> dict[str, Any]:
    """The mask record of the goldens; None is an empty mask."""
    mask = np.zeros(hw, np.uint8) if rle is None else decode(rle)
    ys, xs = np.nonzero(mask)
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else None
    return {
        "shape": list(mask.shape),
        "area": len(xs),
        "box_xyxy": box and list(map(int, box)),
        "sha1": hashlib.sha1(np.packbits(mask.reshape(-1)).tobytes()).hexdigest(),
    }


def records(example: Example) -> list[dict[str, Any]]:
    return [record(example.masks[target.mask], example.hw) for target in example.targets]


def expected(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("shape", "area", "box_xyxy", "sha1")}


def examples(source: Source, root: Path, split: str) -> dict[str, Example]:
    """Whole examples by key; none of the golden files has a part that is left out."""
    found = {}
    for entry in source.entries(root, split):
        found[entry.key], problems = source.read(entry)
        assert problems == ()
    return found


def same_picture(example: Example, row: dict[str, Any], root: Path) -> bool:
    stored = (root / row["image"]).read_bytes()
    return list(example.hw) == row["size_hw"] and example.image == stored


@pytest.mark.parametrize("dataset", SEMANTIC)
def test_semantic(dataset, golden, data_root):
    found, rows = examples(SEMANTIC[dataset], data_root, "train"), golden[dataset]["images"]
    assert list(found) == [Path(row["label_map"]).stem for row in rows]
    for example, row in zip(found.values(), rows, strict=True):
        assert same_picture(example, row, data_root)
        classes = [(target.phrases, target.ids) for target in example.targets]
        assert classes == [((c["name"],), (c["class_id"],)) for c in row["classes"]]
        assert records(example) == [expected(c) for c in row["classes"]]
        assert (area(example.void) if example.void else 0) == row["ignore_pixels"]


def test_class_lists(golden, data_root):
    assert len(ADE20K_CLASSES) == golden["ade20k"]["class_names"]
    assert len(COCOSTUFF_CLASSES) == golden["cocostuff"]["class_names"]
    for entry in Mapillary().entries(data_root, "train"):
        assert list(entry.names) == golden["mapillary"]["names"]


def test_mapillary_without_void_classes(golden, data_root):
    """The default: of the reference's targets those that are void are void."""
    found = examples(Mapillary(), data_root, "train")
    labels = json.loads((data_root / "mapillary/config_v2.0.json").read_text())["labels"]
    void = {i for i, label in enumerate(labels) if label["name"].startswith("void--")}
    for example, row in zip(found.values(), golden["mapillary"]["images"], strict=True):
        classes = [c for c in row["classes"] if c["class_id"] not in void]
        assert [target.ids for target in example.targets] == [(c["class_id"],) for c in classes]
        assert records(example) == [expected(c) for c in classes]
        left = sum(c["area"] for c in row["classes"] if c["class_id"] in void)
        assert (area(example.void) if example.void else 0) == left + row["ignore_pixels"]


def phrases(name: str | list[str]) -> tuple[str, ...]:
    if isinstance(name, str):
        return (name,)
    thing, part = name
    return (f"{thing} {part}", f"the {part} of the {thing}")


@pytest.mark.parametrize("dataset", INDICES)
def test_categories(dataset, golden, data_root):
    index = json.loads((data_root / INDICES[dataset][1]).read_text(encoding="utf-8"))
    named = {str(row["id"]): part_phrases(row["name"]) for row in index["categories"]}
    assert named == {k: phrases(name) for k, name in golden[dataset]["categories"].items()}


@pytest.mark.parametrize("dataset", INDICES)
def test_parts(dataset, golden, data_root):
    source, rows = INDICES[dataset][0], golden[dataset]["images"]
    entries = {entry.key: entry for entry in source.entries(data_root, "train")}
    assert sorted(entries) == sorted(f"train/{row['image_id']}" for row in rows)
    for row in rows:
        entry = entries[f"train/{row['image_id']}"]
        if not row["objects"]:
            with pytest.raises(DamagedError, match="no annotation"):
                source.read(entry)
            continue
        example, problems = source.read(entry)
        assert problems == ()
        assert same_picture(example, row, data_root)
        named = [(target.phrases, target.ids) for target in example.targets]
        assert named == [(phrases(o["name"]), (o["ann_id"],)) for o in row["objects"]]
        assert records(example) == [expected(o) for o in row["objects"]]


def reason_key(row: dict[str, Any]) -> str:
    """ "reason_seg/ReasonSeg/val/1.jpg" -> "val/1"."""
    path = Path(row["image"])
    return f"{path.parent.name}/{path.stem}"


def test_reasonseg(golden, goldens, data_root):
    found = examples(ReasonSeg(), data_root, "train_val") | examples(ReasonSeg(), data_root, "test")
    rows = golden["ReasonSeg"]["images"]
    assert sorted(found) == sorted(map(reason_key, rows))
    with np.load(goldens / "data/reasonseg_masks.npz") as maps:
        for row in rows:
            example = found[reason_key(row)]
            assert same_picture(example, row, data_root)
            assert example.kind == ("long" if row["is_sentence"] else "short")
            turns = [turn for (turn,) in example.conversations]
            assert [turn.question for turn in turns] == row["text"]
            assert {turn.targets for turn in turns} == {(0,)}
            (target,) = records(example)
            assert target == expected(row["target"])
            assert record(example.void, example.hw) == expected(row["ignore"])
            pixels = decode(example.masks[0]) * TARGET
            if example.void:
                pixels += decode(example.void) * VOID
            assert (pixels == maps[row["key"]]).all()


def test_reasonseg_explanations(data_root):
    file = data_root / "reason_seg/ReasonSeg/explanatory/train.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    explained = {f"train/{Path(row['image']).stem}": row["outputs"] for row in rows}
    found = examples(ReasonSeg(), data_root, "train_val")
    assert rows and explained.keys() <= found.keys()
    for key, example in found.items():
        answers = {turn.answer for (turn,) in example.conversations}
        assert answers == {explained.get(key)}


def test_reasonseg_validation(golden, data_root):
    names = [name for name in golden if name.startswith("val:ReasonSeg")]
    assert names
    for name in names:
        found, rows = examples(ReasonSeg(), data_root, name.split("|")[1]), golden[name]["images"]
        assert sorted(found) == sorted(map(reason_key, rows))
        for row in rows:
            example = found[reason_key(row)]
            assert same_picture(example, row, data_root)
            assert [example.conversations[0][0].question in p for p in row["prompts"]] == [True]
            assert records(example) == [expected(row["target"])]
            assert record(example.void, example.hw) == expected(row["ignore"])


def test_llava_instruct(golden, data_root):
    found, rows = (
        examples(LlavaInstruct(), data_root, "train"),
        golden["llava_instruct_150k"]["items"],
    )
    assert [int(key.partition("/")[0]) for key in found] == [row["index"] for row in rows]
    for example, row in zip(found.values(), rows, strict=True):
        assert same_picture(example, row, data_root)
        assert [len(example.masks), *example.hw] == row["mask_shape"]
        (turns,) = example.conversations
        text = LLAVA_V1.opening
        for number, turn in enumerate(turns):
            question = f"<image>\n{turn.question}" if number == 0 else turn.question
            text += f"USER: {question} ASSISTANT: {turn.answer}</s>"
        assert text == row["prompt"]
