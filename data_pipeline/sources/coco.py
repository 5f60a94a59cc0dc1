"""Plain COCO instance files: people's own data, and COCO itself.

    <root>/<folder>/annotations/instances_<split>.json   {"images": [...], "annotations": [...],
    <root>/<folder>/<split>/<file_name>                   "categories": [...]}

The file may also be `annotations/<split>.json`, `<split>.json` or `<split>/_annotations.coco.json`,
images may also lie in `images/<split>/`, `images/` or the folder itself.
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
    """The reader. Targets are called by the names of their categories.

    merge: one target for all instances of a class, since they are all called the same (ids: the
        class). False: each instance is a target (ids: the annotation).
    Crowd regions are outlined loosely. They are void where no instance lies, never targets.
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
        single = [instance for instance in instances if not instance.crowd]
        crowds = [instance.mask for instance in instances if instance.crowd]
        if not single:
            raise DamagedError("the picture has crowd regions only")
        if self.merge:
            targets, masks = _merge(single, stored.hw)
        else:
            masks = [instance.mask for instance in single]
            targets = [Target((each.category,), i, each.ids) for i, each in enumerate(single)]
        example = Example(
            key=entry.key,
            dataset=self.dataset,
            split=entry.split,
            kind="names",
            image=stored.image,
            hw=stored.hw,
            masks=tuple(masks),
            targets=tuple(targets),
            void=_outside(crowds, masks, stored.hw) if crowds else None,
        )
        return Reading(example, tuple(problems))


def _merge(instances: Sequence[Instance], hw: tuple[int, int]) -> tuple[list[Target], list[Rle]]:
    """One target per class, in the order in which the classes first occur.

    cat 1, dog 2, cat 3   ->   targets cat (mask 0), dog (mask 1); masks 1 | 3, 2
    """
    members: dict[int | str, list[Instance]] = {}
    for instance in instances:
        members.setdefault(instance.category_id, []).append(instance)
    targets = [
        Target((group[0].category,), i, (category,) if isinstance(category, int) else ())
        for i, (category, group) in enumerate(members.items())
    ]
    return targets, [union([each.mask for each in group], hw) for group in members.values()]


def _outside(crowds: Sequence[Rle], masks: Sequence[Rle], hw: tuple[int, int]) -> Rle | None:
    """The crowd regions without the pixels of any mask; None if nothing is left."""
    void = decode(union(crowds, hw)) & ~decode(union(masks, hw)) & 1
    return encode(void) if void.any() else None
