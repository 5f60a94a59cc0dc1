"""Readers of semantic segmentation datasets: ADE20K, COCO-Stuff and Mapillary Vistas 2.0.

Layout and class ids: docs/reference_notes.md 1.5. Every class in an image is a target, in
ascending order of class ids; ignored pixels are void.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import AbsentError, DamagedError
from data_pipeline.example import Example, Target
from data_pipeline.formats.json_items import items
from data_pipeline.formats.label_map import read_label_map
from data_pipeline.formats.masks import encode
from data_pipeline.reading import Reading, check_split, check_text, read_image_file
from pixellm_jax.errors import InputError

IGNORED = 255
"""Class id of ignored pixels, which leaves 255 ids for classes."""


def _read_names(file: str) -> tuple[str, ...]:
    return tuple(json.loads(Path(__file__).with_name(file).read_text(encoding="utf-8")))


ADE20K_CLASSES = _read_names("ade20k_classes.json")
"""Names by class id, which is the value in the label map minus one."""

COCOSTUFF_CLASSES = _read_names("cocostuff_classes.json")
"""Names by class id, which is the value in the label map."""


class SemanticEntry(NamedTuple):
    """An image and its label map.

    names: class names by class id.
    ignored: class ids whose pixels are void.
    """

    key: str
    split: str
    image_path: Path
    labels: Path
    names: tuple[str, ...]
    ignored: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Ade20k:
    """Reader of ADE20K scene parsing, 150 classes. Values 0 (unlabelled) and 255 are ignored."""

    dataset: str = "ade20k"
    splits: tuple[str, ...] = ("train", "val")

    def entries(self, root: Path, split: str) -> Sequence[SemanticEntry]:
        check_split(self, split)
        part = {"train": "training", "val": "validation"}[split]
        image_folder = root / "ade20k" / "images" / part
        labels = root / "ade20k" / "annotations" / part
        stems = _stems(labels, "png") | _stems(image_folder, "jpg")
        return _entries(split, stems, image_folder, labels, ADE20K_CLASSES)

    def read(self, entry: SemanticEntry) -> Reading:
        return _read(self.dataset, entry, first=1)


@dataclass(frozen=True, kw_only=True)
class CocoStuff:
    """Reader of COCO-Stuff, 182 classes.

    The 28 classes with a "-" in their name are ignored: they are subtypes ("wall-brick") and
    remainders ("floor-other") of other classes, which make unnatural questions.
    """

    dataset: str = "cocostuff"
    splits: tuple[str, ...] = ("train", "val")

    def entries(self, root: Path, split: str) -> Sequence[SemanticEntry]:
        check_split(self, split)
        part = {"train": "train2017", "val": "val2017"}[split]
        labels = root / "cocostuff" / part
        ignored = frozenset(i for i, name in enumerate(COCOSTUFF_CLASSES) if "-" in name)
        image_folder = root / "coco" / part
        stems = _stems(labels, "png")
        return _entries(split, stems, image_folder, labels, COCOSTUFF_CLASSES, ignored)

    def read(self, entry: SemanticEntry) -> Reading:
        return _read(self.dataset, entry)


@dataclass(frozen=True, kw_only=True)
class Mapillary:
    """Reader of Mapillary Vistas 2.0: classes of `config_v2.0.json` under their readable names.

    Classes whose full name starts with "void--" (`void--ego-vehicle`, `void--unlabeled`, ...) are
    excluded from evaluation by the authors of the dataset; their pixels are ignored.

    Attributes:
        void_is_target: make targets of the void classes, as the released training code does.
    """

    void_is_target: bool = False
    dataset: str = "mapillary"
    splits: tuple[str, ...] = ("train", "val")

    def entries(self, root: Path, split: str) -> Sequence[SemanticEntry]:
        check_split(self, split)
        part = {"train": "training", "val": "validation"}[split]
        folder = root / "mapillary"
        full, readable = _mapillary_names(folder / "config_v2.0.json")
        void = frozenset(i for i, name in enumerate(full) if name.startswith("void--"))
        image_folder = folder / part / "images"
        labels = folder / part / "v2.0" / "labels"
        stems = _stems(labels, "png") | _stems(image_folder, "jpg")
        ignored = frozenset() if self.void_is_target else void
        return _entries(split, stems, image_folder, labels, readable, ignored)

    def read(self, entry: SemanticEntry) -> Reading:
        return _read(self.dataset, entry)


def _mapillary_names(config: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return full and readable names by class id: ("animal--bird", ...), ("bird", ...)."""
    full: list[str] = []
    readable: list[str] = []
    for number, item in enumerate(item for item in items(config) if item.key == "labels"):
        label = item.value if isinstance(item.value, dict) else {}
        for key, names in (("name", full), ("readable", readable)):
            try:
                names.append(check_text(label.get(key), f"{key} of label {number}"))
            except DamagedError as reason:
                raise InputError(f"'{config}': {reason}: download the file again") from None
    if not 0 < len(full) <= IGNORED:
        raise InputError(
            f"'{config}' has {len(full)} labels, expected 1 to {IGNORED}: download the file again"
        )
    return tuple(full), tuple(name.lower() for name in readable)


def _stems(folder: Path, extension: str) -> set[str]:
    """Return the stems of the files with an extension.

    Raises:
        AbsentError: there are no such files.
    """
    stems = {path.stem for path in folder.glob(f"*.{extension}")}
    if not stems:
        raise AbsentError(f"found no *.{extension} in '{folder}': put the published files there")
    return stems


def _entries(
    split: str,
    stems: Iterable[str],
    image_folder: Path,
    labels: Path,
    names: tuple[str, ...],
    ignored: frozenset[int] = frozenset(),
) -> list[SemanticEntry]:
    """Return entries sorted by file name with extension: "a-b.jpg", "a.jpg"."""
    return [
        SemanticEntry(
            stem, split, image_folder / f"{stem}.jpg", labels / f"{stem}.png", names, ignored
        )
        for stem in sorted(stems, key=lambda stem: f"{stem}.")
    ]


def _read(dataset: str, entry: SemanticEntry, first: int = 0) -> Reading:
    """Read one target per class. Value `first` is class 0, `first` + 1 is class 1, and so on.

    first 1, names wall, tree, sky, ignored {2}    2 2 0        targets wall, tree
                                                   1 1 3   ->   void    0 0 1
                                                                        0 0 1
    """
    image, hw = read_image_file([entry.image_path])
    values = read_label_map(entry.labels, hw)
    class_of_value = np.full(256, -1)
    class_of_value[[0] * first + [IGNORED]] = IGNORED
    class_of_value[first : first + len(entry.names)] = [
        IGNORED if i in entry.ignored else i for i in range(len(entry.names))
    ]
    occurring = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    if (class_of_value[occurring] < 0).any():
        unknown = occurring[class_of_value[occurring] < 0].tolist()
        raise DamagedError(f"label map {entry.labels.name!r} has values {unknown}: no such classes")
    classes = class_of_value.astype(np.uint8)[values]
    present = [i for i in class_of_value[occurring].tolist() if i != IGNORED]
    if not present:
        raise DamagedError(f"label map {entry.labels.name!r} has no class, all of it is ignored")
    void = classes == IGNORED
    example = Example(
        key=entry.key,
        dataset=dataset,
        split=entry.split,
        kind="names",
        image=image,
        hw=hw,
        masks=tuple(encode(classes == i) for i in present),
        targets=tuple(Target((entry.names[c],), i, (c,)) for i, c in enumerate(present)),
        void=encode(void) if void.any() else None,
    )
    return Reading(example)
