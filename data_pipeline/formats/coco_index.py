"""Index of a COCO-style instance file: lists `images`, `annotations` and `categories` in JSON.

The file is scanned once. Masks stay in the file until their image is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DamagedError
from data_pipeline.formats.json_items import Span, fetch, items
from data_pipeline.formats.masks import to_rle
from data_pipeline.reading import StoredImage, check_text, path_inside, read_image_file
from pixellm_jax.benchmark_question import Rle
from pixellm_jax.errors import InputError


class AnnotationSpan(NamedTuple):
    """Byte range of an annotation in the file, and the unchecked name of its category."""

    span: Span
    category: object


class CocoEntry(NamedTuple):
    """An image of a file, and its annotations in file order."""

    key: str
    split: str
    file: Path
    folders: tuple[Path, ...] = ()
    """Folders that may contain the image."""
    name: object = None
    """File name of the image, unchecked."""
    size: tuple[object, object] | None = None
    """Height and width of the image according to the file, unchecked."""
    annotations: tuple[AnnotationSpan, ...] = ()
    fault: str = ""
    """Reason why the entry cannot be read, "" if there is none."""


class Instance(NamedTuple):
    """One annotation."""

    category: str
    """Name of the category."""
    category_id: int | str
    ids: tuple[int, ...]
    """(annotation id,), or () if it has none."""
    mask: Rle
    crowd: bool


def list_images(file: Path, split: str, folders: tuple[Path, ...]) -> list[CocoEntry]:
    """Return one entry per image, in file order, with the key "split/image id".

    Entries with a fault follow: for images that are listed twice, are not an object or have no id,
    and for annotations of images that are not listed.

    Raises:
        InputError: the file is missing, damaged as a whole, or has no images or no categories.
    """
    entries: dict[Any, CocoEntry] = {}
    faults: list[CocoEntry] = []
    names: dict[int | str, object] = {}
    annotations: dict[Any, list[tuple[Span, Any]]] = {}
    for item in items(file):
        value = item.value if isinstance(item.value, dict) else {}
        number = _id(value.get("id"))
        if item.key == "images":
            if number is None or number in entries:
                why = "has no id" if number is None else f"is a second one of id {number}"
                key = f"{split}/byte {item.span.start}"
                faults.append(CocoEntry(key, split, file, fault=f"the listed picture {why}"))
            else:
                size = (value.get("height"), value.get("width"))
                entries[number] = CocoEntry(
                    f"{split}/{number}",
                    split,
                    file,
                    folders,
                    value.get("file_name"),
                    None if size == (None, None) else size,
                )
        elif item.key == "annotations":
            annotation = (item.span, _id(value.get("category_id")))
            annotations.setdefault(_id(value.get("image_id")), []).append(annotation)
        elif item.key == "categories" and number is not None:
            names[number] = value.get("name")
    if not entries or not names:
        raise InputError(
            f"'{file}' lists {len(entries)} images and {len(names)} categories, expected some "
            "of both: check that it is an instance file"
        )
    for number in annotations.keys() - entries.keys():
        fault = f"{len(annotations[number])} annotations of a picture that is not listed"
        faults.append(CocoEntry(f"{split}/not listed {number}", split, file, fault=fault))
    listed = [
        entry._replace(
            annotations=tuple(
                AnnotationSpan(span, names.get(category))
                for span, category in annotations.get(number, ())
            )
        )
        for number, entry in entries.items()
    ]
    return listed + sorted(faults, key=lambda entry: entry.key)


def read_instances(entry: CocoEntry) -> tuple[StoredImage, list[Instance], list[str]]:
    """Read the image of an entry, its annotations, and the reasons for those left out.

    Raises:
        DamagedError: the entry has a fault, no usable annotation, or no readable image.
    """
    if entry.fault:
        raise DamagedError(entry.fault)
    if not entry.annotations:
        raise DamagedError("the picture has no annotation")
    paths = [path_inside(folder, entry.name) for folder in entry.folders]
    stored = read_image_file(paths, _size(entry.size))
    instances: list[Instance] = []
    problems: list[str] = []
    for annotation in entry.annotations:
        try:
            instances.append(_read_instance(entry, annotation, stored.hw))
        except DamagedError as reason:
            problems.append(str(reason))
    if not instances:
        raise DamagedError(f"no annotation can be used: {problems[0]}")
    return stored, instances, problems


def _size(size: tuple[object, object] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = size
    if not isinstance(height, int) or not isinstance(width, int):
        raise DamagedError(f"the picture is listed as {repr(size)[:60]}, expected height and width")
    return height, width


def _read_instance(entry: CocoEntry, annotation: AnnotationSpan, hw: tuple[int, int]) -> Instance:
    value = fetch(entry.file, annotation.span)
    number = value.get("id") if isinstance(value, dict) else None
    try:
        if not isinstance(value, dict):
            raise DamagedError(f"a {type(value).__name__}, expected an object")
        category = check_text(annotation.category, "the listed name of its category")
        mask = to_rle(value.get("segmentation"), hw)
    except DamagedError as reason:
        raise DamagedError(
            f"annotation {repr(number)[:60]} at byte {annotation.span.start}: {reason}"
        ) from None
    ids = (number,) if type(number) is int else ()
    return Instance(category, value["category_id"], ids, mask, value.get("iscrowd") == 1)


def _id(value: object) -> int | str | None:
    """Return an id that is an integer or printable text; None for anything else."""
    if type(value) is int or (isinstance(value, str) and value.isprintable()):
        return value
    return None
