"""Reader of COCO instance files: COCO itself and user-supplied data in the same format.

    <root>/<folder>/annotations/instances_<split>.json
    <root>/<folder>/<split>/<file_name>

The JSON file is {"images": [...], "annotations": [...], "categories": [...]}. It may also be
`annotations/<split>.json`, `<split>.json` or `<split>/_annotations.coco.json`; images may also be
in `images/<split>/`, `images/` or the folder itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DamagedError
from data_pipeline.example import Example, Target
from data_pipeline.formats.coco_index import CocoEntry, Instance, list_images, read_instances
from data_pipeline.formats.masks import decode, encode, union
from data_pipeline.reading import Reading, check_split, find_index
from pixellm_jax.benchmark_question import Rle


@dataclass(frozen=True, kw_only=True)
class Coco:
    """Reader of COCO instance annotations. The phrase of a target is its category name.

    Crowd regions are outlined loosely, so they are never targets. They become void except where a
    target covers them. An image without any other usable annotation is skipped.

    Attributes:
        merge: merge all instances of a class, which share one phrase, into one target, whose
            `Target.ids` is the category id (empty if that is text). Otherwise each instance is a
            target, with the id of its annotation.
    """

    dataset: str = "coco"
    folder: str = "coco"
    splits: tuple[str, ...] = ("train", "val", "test", "train2017", "val2017")
    merge: bool = True

    def entries(self, root: Path, split: str) -> Sequence[CocoEntry]:
        check_split(self, split)
        base = root / self.folder
        index = find_index(
            [
                base / "annotations" / f"instances_{split}.json",
                base / "annotations" / f"{split}.json",
                base / f"{split}.json",
                base / split / "_annotations.coco.json",
            ]
        )
        folders = (base / split, base / "images" / split, base / "images", base)
        return list_images(index, split, folders)

    def read(self, entry: CocoEntry) -> Reading:
        stored, instances, problems = read_instances(entry)
        non_crowd = [instance for instance in instances if not instance.crowd]
        crowds = [instance.mask for instance in instances if instance.crowd]
        if not non_crowd:
            raise DamagedError("the picture has crowd regions only")
        if self.merge:
            targets, masks = _merge(non_crowd, stored.hw)
        else:
            masks = [instance.mask for instance in non_crowd]
            targets = [
                Target((instance.category,), i, instance.ids)
                for i, instance in enumerate(non_crowd)
            ]
        example = Example(
            key=entry.key,
            dataset=self.dataset,
            split=entry.split,
            kind="names",
            image=stored.image,
            hw=stored.hw,
            masks=tuple(masks),
            targets=tuple(targets),
            void=_uncovered(crowds, masks, stored.hw) if crowds else None,
        )
        return Reading(example, tuple(problems))


def _merge(instances: Sequence[Instance], hw: tuple[int, int]) -> tuple[list[Target], list[Rle]]:
    """Merge the instances of each class into one target, in order of first occurrence.

    instances cat A, dog B, cat C   ->   targets cat (mask 0), dog (mask 1); masks A | C, B
    """
    groups: dict[int | str, list[Instance]] = {}
    for instance in instances:
        groups.setdefault(instance.category_id, []).append(instance)
    targets = [
        Target((group[0].category,), i, (category_id,) if isinstance(category_id, int) else ())
        for i, (category_id, group) in enumerate(groups.items())
    ]
    masks = [union([instance.mask for instance in group], hw) for group in groups.values()]
    return targets, masks


def _uncovered(crowds: Sequence[Rle], masks: Sequence[Rle], hw: tuple[int, int]) -> Rle | None:
    """Return the crowd regions minus the pixels of all masks, or None if nothing remains."""
    void = decode(union(crowds, hw)) & ~decode(union(masks, hw)) & 1
    return encode(void) if void.any() else None
