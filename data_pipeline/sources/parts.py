"""Readers of part segmentation datasets in COCO format: PACO-LVIS and PASCAL-Part.

Layout and names: docs/reference_notes.md 1.6. Every usable annotation becomes a separate
target; crowd regions are not treated separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.example import Example, Target
from data_pipeline.formats.coco_index import CocoEntry, list_images, read_instances
from data_pipeline.reading import Reading, check_split, find_index


@dataclass(frozen=True, kw_only=True)
class PacoLvis:
    """Reader of PACO-LVIS: objects ("cup") and parts ("cup:rim") in COCO images."""

    dataset: str = "paco_lvis"
    splits: tuple[str, ...] = ("train", "val", "test")

    def entries(self, root: Path, split: str) -> Sequence[CocoEntry]:
        check_split(self, split)
        index = root / "vlpart" / "paco" / "annotations" / f"paco_lvis_v1_{split}.json"
        return list_images(find_index([index]), split, (root / "coco",))

    def read(self, entry: CocoEntry) -> Reading:
        return _read(self.dataset, entry)


@dataclass(frozen=True, kw_only=True)
class PascalPart:
    """Reader of PASCAL-Part: object parts ("horse:leg") in PASCAL VOC 2010 images."""

    dataset: str = "pascal_part"
    splits: tuple[str, ...] = ("train", "val")

    def entries(self, root: Path, split: str) -> Sequence[CocoEntry]:
        check_split(self, split)
        folder = root / "vlpart" / "pascal_part"
        image_folder = folder / "VOCdevkit" / "VOC2010" / "JPEGImages"
        return list_images(find_index([folder / f"{split}.json"]), split, (image_folder,))

    def read(self, entry: CocoEntry) -> Reading:
        return _read(self.dataset, entry)


def part_phrases(category: str) -> tuple[str, ...]:
    """Return the phrases for a category.

    A qualifier such as `_(automobile)` is removed. Other underscores are kept, as in the published
    names.

    "laptop_computer"          ->  ("laptop_computer",)
    "car_(automobile):wheel"   ->  ("car wheel", "the wheel of the car")
    """
    thing, colon, part = category.partition(":")
    thing = thing.split("_(")[0]
    part = part.split("_(")[0]
    if not colon:
        return (thing,)
    return (f"{thing} {part}", f"the {part} of the {thing}")


def _read(dataset: str, entry: CocoEntry) -> Reading:
    stored, instances, problems = read_instances(entry)
    example = Example(
        key=entry.key,
        dataset=dataset,
        split=entry.split,
        kind="names",
        image=stored.image,
        hw=stored.hw,
        masks=tuple(instance.mask for instance in instances),
        targets=tuple(
            Target(part_phrases(instance.category), i, instance.ids)
            for i, instance in enumerate(instances)
        ),
    )
    return Reading(example, tuple(problems))
