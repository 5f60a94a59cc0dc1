"""Reader of referring segmentation: refCOCO, refCOCO+, refCOCOg, refCLEF and gRefCOCO.

`refer_seg/<dataset>/` contains `instances.json` (COCO format) and `refs(<split by>).p`, a pickled
list of refs: one or more annotations of an image with the sentences that refer to them
(https://github.com/lichengunc/refer, https://github.com/henghuiding/gRefCOCO).
"""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DamagedError
from data_pipeline.example import Example, Target
from data_pipeline.formats.json_items import Span, fetch, items
from data_pipeline.formats.masks import check_size, to_rle, union
from data_pipeline.formats.pickle import load
from data_pipeline.reading import (
    Reading,
    check_text,
    coco_candidates,
    find_image_file,
    find_index,
    path_inside,
    read_image_file,
)
from pixellm_jax.benchmark_question import Rle
from pixellm_jax.errors import InputError

NO_TARGET = -1
"""Annotation id in gRefCOCO of a sentence whose referent is not in the image."""


class Ref(NamedTuple):
    """A ref of the index; `sentences` are (sentence id, text) pairs."""

    ref_id: int
    ann_ids: tuple[int, ...]
    sentences: tuple[tuple[int, str], ...]


class Entry(NamedTuple):
    """An image of a split with its refs in file order.

    key: "split/image id", or "split/ref number" for a ref that names no image.
    image: byte range of its record in `instances.json`, or None if there is no record.
    annotations: byte ranges of the annotations that the refs name, by annotation id.
    problems: reasons for the refs and sentences of the image that were dropped.
    """

    key: str
    split: str
    root: Path
    path: Path
    image: Span | None
    annotations: dict[int, Span]
    refs: tuple[Ref, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refer:
    """Reader of one referring segmentation dataset.

    An image becomes one example of kind "names" with one target per sentence, in file order; the
    sentences of a ref share a mask. `ids` of a target are (ref id, annotation ids..., sentence id).
    A sentence of gRefCOCO may refer to several objects: its mask is their union; or to none: its
    mask is empty and the annotation id -1.

        ref 7 of annotation 5: "cup", "red cup"; ref 8 of annotation 6: "plate"
            ->  Target(("cup",), 0, (7, 5, 0))  Target(("red cup",), 0, (7, 5, 1))
                Target(("plate",), 1, (8, 6, 2))

    Attributes:
        dataset: name of the folder in `refer_seg`.
        split_by: author of the splits; part of the file name.
        splits: the published splits; `entries` also accepts other splits that the index contains.
        generalised: gRefCOCO: refs may name several annotations or none; the index is named grefs.
    """

    dataset: str
    split_by: str
    splits: tuple[str, ...]
    generalised: bool = False

    def entries(self, root: Path, split: str) -> Sequence[Entry]:
        """Return one entry per image of the split, by ascending image id.

        Refs and sentences of the same image stay in file order. The split "testA" contains every
        ref whose published split contains an A, so "testAB" belongs to testA and testB; "test"
        contains every ref whose split contains "test"; any other split must match exactly.

        Raises:
            InputError: an index file is missing or damaged, or no ref belongs to such a split.
        """
        folder = root / "refer_seg" / self.dataset
        name = f"{'grefs' if self.generalised else 'refs'}({self.split_by})"
        index = find_index([folder / f"{name}.p", folder / f"{name}.json"])
        selection = _select(_records(index), split, self.generalised)
        if not (selection.refs or split in self.splits):
            raise InputError(
                f"{str(index)!r} has no split {split!r}: use one of {', '.join(self.splits)}"
            )
        path = find_index([folder / "instances.json"])
        images, annotations = _locate(path, selection)
        return [
            Entry(
                f"{split}/{image_id}",
                split,
                root,
                path,
                images.get(image_id),
                {i: annotations[i] for ref in refs for i in ref.ann_ids if i in annotations},
                tuple(refs),
                tuple(selection.problems[image_id]),
            )
            for image_id, refs in sorted(selection.refs.items())
        ] + [
            Entry(f"{split}/ref {number}", split, root, path, None, {}, (), (problem,))
            for number, problem in selection.without_image
        ]

    def read(self, entry: Entry) -> Reading:
        """Read the example of an image.

        A ref whose annotation is missing or damaged is dropped and reported; the others are kept.

        Raises:
            DamagedError: no usable sentence, no image, or an image whose size is not the record's.
        """
        if entry.image is None:
            missing = f"no image {entry.key!r} in {entry.path.name!r}"
            raise DamagedError("; ".join(entry.problems or [missing]))
        record = fetch(entry.path, entry.image)
        hw = check_size(record.get("height"), record.get("width"))
        image = read_image_file(self._image_paths(entry.root, record.get("file_name")), hw).image
        problems = list(entry.problems)
        mask_indices: dict[tuple[int, ...], int] = {}  # by annotation ids
        masks: list[Rle] = []
        targets: list[Target] = []
        for ref in entry.refs:
            if ref.ann_ids not in mask_indices:
                try:
                    masks.append(self._mask(ref, entry, record["id"], hw))
                except DamagedError as reason:
                    problems.append(f"ref {ref.ref_id}: {reason}")
                    continue
                mask_indices[ref.ann_ids] = len(mask_indices)
            targets += [
                Target((text,), mask_indices[ref.ann_ids], (ref.ref_id, *ref.ann_ids, sentence_id))
                for sentence_id, text in ref.sentences
            ]
        if not targets:
            raise DamagedError(f"no usable sentence: {'; '.join(problems)}")
        example = Example(
            key=entry.key,
            dataset=self.dataset,
            split=entry.split,
            kind="names",
            image=image,
            hw=hw,
            masks=tuple(masks),
            targets=tuple(targets),
        )
        return Reading(example, tuple(problems))

    def image_path(self, entry: Entry) -> Path:
        """Return the path of an entry's image.

        Raises:
            DamagedError: the image has no record or does not exist.
        """
        if entry.image is None:
            raise DamagedError(f"no image {entry.key!r} in {entry.path.name!r}")
        name = fetch(entry.path, entry.image).get("file_name")
        return find_image_file(self._image_paths(entry.root, name))

    def _image_paths(self, root: Path, name: Any) -> list[Path]:
        if self.dataset == "refclef":
            return [path_inside(root / "refer_seg/images/saiapr_tc-12", name)]
        return coco_candidates(root, "train2014", name)

    def _mask(self, ref: Ref, entry: Entry, image_id: int, hw: tuple[int, int]) -> Rle:
        """Return the union of the annotation masks of a ref."""
        rles = []
        for number in ref.ann_ids:
            if number == NO_TARGET and self.generalised:
                continue
            if number not in entry.annotations:
                raise DamagedError(f"no annotation {number} in {entry.path.name!r}")
            annotation = fetch(entry.path, entry.annotations[number])
            if annotation.get("image_id", image_id) != image_id:
                raise DamagedError(f"annotation {number} is of image {annotation['image_id']!r}")
            rles.append(to_rle(annotation.get("segmentation"), hw))
        return rles[0] if len(rles) == 1 else union(rles, hw)


REFCOCO = Refer("refcoco", "unc", ("train", "val", "testA", "testB"))
REFCOCO_PLUS = Refer("refcoco+", "unc", ("train", "val", "testA", "testB"))
REFCOCOG = Refer("refcocog", "umd", ("train", "val", "test"))
REFCLEF = Refer("refclef", "unc", ("train", "val", "testA", "testB"))
GREFCOCO = Refer("grefcoco", "unc", ("train", "val", "testA", "testB"), generalised=True)


def in_split(split: str, published: str) -> bool:
    """Return whether a ref whose published split is `published` belongs to `split`.

    See `Refer.entries` for the rule.

    ("testA", "testAB") -> True   ("test", "testA") -> True   ("train", "trainval") -> False
    """
    if split in ("testA", "testB", "testC"):
        return split[-1] in published
    return "test" in published if split == "test" else split == published


class _Selection(NamedTuple):
    """The refs of a split, and the reasons for dropped refs and sentences, by image id.

    without_image: (index, problem) pairs of the refs that name no image.
    """

    refs: defaultdict[int, list[Ref]]
    problems: defaultdict[int, list[str]]
    without_image: list[tuple[int, str]]


def _select(records: Iterable[Any], split: str, generalised: bool) -> _Selection:
    selection = _Selection(defaultdict(list), defaultdict(list), [])
    for number, record in enumerate(records):
        published = record.get("split") if isinstance(record, dict) else None
        if isinstance(published, str) and not in_split(split, published):
            continue
        image_id = record.get("image_id") if isinstance(record, dict) else None
        if not isinstance(published, str) or type(image_id) is not int:
            problem = f"ref {number} of the index has no split or image_id"
            selection.without_image.append((number, problem))
            continue
        refs = selection.refs[image_id]
        problems = selection.problems[image_id]
        try:
            ref = _ref(record, generalised, problems)
        except DamagedError as reason:
            problems.append(f"ref {number} of the index: {reason}")
            continue
        if ref.sentences:
            refs.append(ref)
    return selection


def _ref(record: dict[Any, Any], generalised: bool, problems: list[str]) -> Ref:
    """Parse and check a ref; append the problems of individual sentences to `problems`."""
    ref_id: Any = record.get("ref_id")
    ann_id: Any = record.get("ann_id")
    ann_ids = ann_id if generalised and isinstance(ann_id, list) else [ann_id]
    if not ann_ids or any(type(number) is not int for number in (ref_id, *ann_ids)):
        raise DamagedError(f"ref_id {reprlib.repr(ref_id)}, ann_id {reprlib.repr(ann_id)}")
    published = record.get("sentences")
    if not isinstance(published, list) or not published:
        raise DamagedError("no sentences")
    sentences = []
    for sentence in published:
        try:
            sentences.append(_sentence(sentence))
        except DamagedError as reason:
            problems.append(f"ref {ref_id}: {reason}")
    return Ref(ref_id, tuple(ann_ids), tuple(sentences))


def _sentence(sentence: Any) -> tuple[int, str]:
    if not isinstance(sentence, dict) or type(sentence.get("sent_id")) is not int:
        raise DamagedError("a sentence without sent_id")
    return sentence["sent_id"], check_text(sentence.get("sent"), "sentence")


def _records(index: Path) -> Iterator[Any]:
    """Iterate over the refs of a pickled or JSON index."""
    if index.suffix == ".json":
        return (item.value for item in items(index))
    records = load(index)
    if not isinstance(records, list):
        raise InputError(
            f"{str(index)!r} holds a {type(records).__name__}, expected a list of refs"
        )
    return iter(records)


def _locate(path: Path, selection: _Selection) -> tuple[dict[int, Span], dict[int, Span]]:
    """Return the byte ranges of the selected images and annotations, by id."""
    wanted = {
        "images": selection.refs.keys(),
        "annotations": {i for refs in selection.refs.values() for ref in refs for i in ref.ann_ids},
    }
    spans: dict[str, dict[int, Span]] = {"images": {}, "annotations": {}}
    for key, value, span in items(path):
        number = value.get("id") if isinstance(value, dict) else None
        if type(number) is int and key in wanted and number in wanted[key]:
            spans[key][number] = span
    return spans["images"], spans["annotations"]
