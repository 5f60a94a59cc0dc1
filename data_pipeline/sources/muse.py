"""MUSE: several questions about an image, each answered by one or many objects.

A file is a list of images with the keys of the published files
(https://github.com/MaverickRen/PixelLM): `file_name` or `coco_url`, `height`, `width`, and the
parallel lists `questions` (text), `answers` (lists of objects with `segmentation`, `category_name`
and perhaps `rephrased_name`, `id`) and perhaps `text_answers` (text with one `{seg}` per object, or
null).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DamagedError
from data_pipeline.example import SEG, Example, Target, Turn
from data_pipeline.formats.json_items import Span, fetch, items
from data_pipeline.formats.masks import check_size, to_rle
from data_pipeline.reading import (
    Reading,
    check_split,
    check_text,
    coco_candidates,
    find_image_file,
    find_index,
    read_image_file,
)
from pixellm_jax.benchmark_question import Rle


class Entry(NamedTuple):
    """An item of a MUSE file; `key` is "split/number", the number counted from 0 in the file."""

    key: str
    split: str
    root: Path
    path: Path
    span: Span


@dataclass(frozen=True)
class Muse:
    """Reads `muse_<split>.json` or `MUSE_<split>.json` in the root or in its folder `muse`.

    An item gives one example of kind "muse": each question is a conversation of one turn, and
    `targets` are the objects of all answers, in their order; an object that answers two questions
    is two targets, which share a mask. A broken question (no text, a broken object, a text answer
    whose `{seg}` do not match) is left out alone and reported (docs/reference_notes.md D12).

        {"coco_url": ".../train2017/000000000030.jpg", "height": 4, "width": 6,
         "questions": ["What is it?"], "text_answers": ["It is the {seg}."],
         "answers": [[{"id": 5, "category_name": "cup", "rephrased_name": "red cup",
                       "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]}]]}
            ->  targets        (Target(("red cup", "cup"), mask=0, ids=(5,)),)
                conversations  ((Turn("What is it?", "It is the {seg}.", (0,)),),)
    """

    dataset: str = "muse"
    splits: tuple[str, ...] = ("train", "val", "test_less", "test_many")

    def entries(self, root: Path, split: str) -> Sequence[Entry]:
        """One entry for each item of the file, in its order.

        Raises:
            InputError: no such split or file, or the file is not JSON.
        """
        check_split(self, split)
        path = find_index(
            [
                folder / f"{name}_{split}.json"
                for folder in (root / "muse", root)
                for name in ("muse", "MUSE")
            ]
        )
        return [
            Entry(f"{split}/{number}", split, root, path, item.span)
            for number, item in enumerate(items(path))
        ]

    def read(self, entry: Entry) -> Reading:
        """The example of an item.

        Raises:
            DamagedError: no usable question, no image, or one of another size than the item says.
        """
        item = fetch(entry.path, entry.span)
        if not isinstance(item, dict):
            raise DamagedError(f"item is a {type(item).__name__}, expected an object")
        questions, hw = item.get("questions"), check_size(item.get("height"), item.get("width"))
        if not isinstance(questions, list) or not questions:
            raise DamagedError("no questions")
        image = read_image_file(_image_paths(entry.root, item), hw).image
        train = entry.split == "train"
        masks: dict[str, tuple[int, Rle]] = {}  # by counts: number and mask
        targets: list[Target] = []
        conversations: list[tuple[Turn, ...]] = []
        problems: list[str] = []
        for number, text in enumerate(questions):
            try:
                question = check_text(text, "question")
                objects = [_object(value, hw) for value in _part(item, "answers", number, list)]
                answer, problem = _answer(item, number, len(objects), train)
            except DamagedError as reason:
                problems.append(f"question {number}: {reason}")
                continue
            problems += [f"question {number}: {problem}"] if problem else []
            first = len(targets)
            for phrases, rle, ids in objects:
                mask, _ = masks.setdefault(rle["counts"], (len(masks), rle))
                targets.append(Target(phrases, mask, ids))
            conversations.append((Turn(question, answer, tuple(range(first, len(targets)))),))
        if not conversations:
            raise DamagedError(f"no usable question: {'; '.join(problems)}")
        example = Example(
            key=entry.key,
            dataset=self.dataset,
            split=entry.split,
            kind="muse",
            image=image,
            hw=hw,
            masks=tuple(rle for _, rle in masks.values()),
            targets=tuple(targets),
            conversations=tuple(conversations),
        )
        return Reading(example, tuple(problems))

    def image_path(self, entry: Entry) -> Path:
        """The file of the entry's image. Raises `DamagedError` as `read`."""
        return find_image_file(_image_paths(entry.root, fetch(entry.path, entry.span)))


def _image_paths(root: Path, item: dict[str, Any]) -> list[Path]:
    """`file_name` is an image of COCO 2014; `coco_url` tells the folder of COCO 2017."""
    if item.get("file_name") is not None:
        return coco_candidates(root, "train2014", item["file_name"])
    url = check_text(item.get("coco_url"), "neither file_name nor coco_url: the latter")
    folder = "train2017" if "train2017" in url else "val2017"
    return coco_candidates(root, folder, url.rpartition("/")[2])


def _part(item: dict[str, Any], key: str, number: int, *kinds: type) -> Any:
    """Return the item of a parallel list that belongs to a question."""
    values = item.get(key)
    if not isinstance(values, list) or number >= len(values):
        raise DamagedError(f"{key} has nothing for it")
    if not isinstance(values[number], kinds):
        raise DamagedError(f"its part of {key} is a {type(values[number]).__name__}")
    return values[number]


def _object(value: Any, hw: tuple[int, int]) -> tuple[tuple[str, ...], Rle, tuple[int, ...]]:
    """Phrases, mask and annotation id of an object; it may lack a `rephrased_name`.

    See docs/reference_notes.md D15.
    """
    if not isinstance(value, dict):
        raise DamagedError(f"an object is a {type(value).__name__}")
    names = [value.get("rephrased_name"), value.get("category_name")]
    phrases = tuple(dict.fromkeys(check_text(name, "a name") for name in names if name))
    if not phrases:
        raise DamagedError("an object has neither rephrased_name nor category_name")
    ids = (value["id"],) if type(value.get("id")) is int else ()
    return phrases, to_rle(value.get("segmentation"), hw), ids


def _answer(
    item: dict[str, Any], number: int, objects: int, train: bool
) -> tuple[str | None, str | None]:
    """The text answer, and what is wrong with one that was left out.

    Only training needs it: elsewhere a wrong one is left out and its question stays, so that every
    published question is measured. Braces other than `{seg}` are ordinary text.
    """
    try:
        answer = None
        if item.get("text_answers") is not None:
            answer = _part(item, "text_answers", number, str, type(None))
        if answer is not None and check_text(answer, "text answer").count(SEG) != objects:
            raise DamagedError(f"text answer with {answer.count(SEG)} {SEG} for {objects} objects")
        if answer is None and not objects and train:
            raise DamagedError("neither objects nor a text answer")
    except DamagedError as reason:
        if train:
            raise
        return None, f"text answer left out: {reason}"
    return answer, None
