"""COCO-style instance files: the lists `images`, `annotations` and `categories` in one JSON file.

Read once from end to end; masks stay in the file until their image's turn comes.
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


class Place(NamedTuple):
    """Location of an annotation in the file, and the name of its category, both unchecked."""

    span: Span
    category: object


class CocoEntry(NamedTuple):
    """An image of a file, and its annotations in the order of the file.

    folders: where the image may lie. name, size: what the file says, not checked yet.
    fault: why the entry cannot be read at all, "" if it can.
    """

    key: str
    split: str
    file: Path
    folders: tuple[Path, ...] = ()
    name: object = None
    size: tuple[object, object] | None = None
    places: tuple[Place, ...] = ()
    fault: str = ""


class Instance(NamedTuple):
    """One annotation. `ids` is (annotation id,), or () where it has none; `category` its name."""

    category: str
    category_id: int | str
    ids: tuple[int, ...]
    mask: Rle
    crowd: bool


def list_images(file: Path, split: str, folders: tuple[Path, ...]) -> list[CocoEntry]:
    """One entry per image, in the order of the file, by the key "split/image id".

    An image that is listed twice, is no object or has no id, and annotations of images that are
    not listed, give entries with a fault.

    Raises:
        InputError: no such file, damaged as a whole, or without images or categories.
    """
    entries: dict[Any, CocoEntry] = {}
    faults: list[CocoEntry] = []
    names: dict[int | str, object] = {}
    found: dict[Any, list[tuple[Span, Any]]] = {}
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
            place = (item.span, _id(value.get("category_id")))
            found.setdefault(_id(value.get("image_id")), []).append(place)
        elif item.key == "categories" and number is not None:
            names[number] = value.get("name")
    if not entries or not names:
        raise InputError(
            f"'{file}' lists {len(entries)} pictures and {len(names)} categories, expected some "
            "of both: check that it is an instance file"
        )
    for number in found.keys() - entries.keys():
        fault = f"{len(found[number])} annotations of a picture that is not listed"
        faults.append(CocoEntry(f"{split}/not listed {number}", split, file, fault=fault))
    listed = [
        entry._replace(places=tuple(Place(span, names.get(c)) for span, c in found.get(number, ())))
        for number, entry in entries.items()
    ]
    return listed + sorted(faults, key=lambda entry: entry.key)


def read_instances(entry: CocoEntry) -> tuple[StoredImage, list[Instance], list[str]]:
    """The image of an entry, its annotations, and why others were left out.

    Raises:
        DamagedError: the entry has a fault, no annotation, none that can be used, or no image.
    """
    if entry.fault:
        raise DamagedError(entry.fault)
    if not entry.places:
        raise DamagedError("the picture has no annotation")
    paths = [path_inside(folder, entry.name) for folder in entry.folders]
    stored = read_image_file(paths, _size(entry.size))
    instances: list[Instance] = []
    problems: list[str] = []
    for place in entry.places:
        try:
            instances.append(_instance(entry, place, stored.hw))
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


def _instance(entry: CocoEntry, place: Place, hw: tuple[int, int]) -> Instance:
    value = fetch(entry.file, place.span)
    number = value.get("id") if isinstance(value, dict) else None
    try:
        if not isinstance(value, dict):
            raise DamagedError(f"a {type(value).__name__}, expected an object")
        category = check_text(place.category, "the listed name of its category")
        mask = to_rle(value.get("segmentation"), hw)
    except DamagedError as reason:
        raise DamagedError(
            f"annotation {repr(number)[:60]} at byte {place.span.start}: {reason}"
        ) from None
    ids = (number,) if type(number) is int else ()
    return Instance(category, value["category_id"], ids, mask, value.get("iscrowd") == 1)


def _id(value: object) -> int | str | None:
    """An id that can be looked up and written down; None for anything else."""
    if type(value) is int or (isinstance(value, str) and value.isprintable()):
        return value
    return None
