"""Reader of MUSE: several questions per image, each answered by one or more objects.

A file is a list of images with the keys of the published files
(https://github.com/MaverickRen/PixelLM): `file_name` or `coco_url`, `height`, `width`, and the
parallel lists `questions` (text), `answers` (lists of objects with `segmentation`, `category_name`
and optionally `rephrased_name`, `id`) and optionally `text_answers` (text with one `{seg}` per
object, or null).
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
    """Location of an item in a MUSE file; `key` is "split/index", with the index in the file."""

    key: str
    split: str
    root: Path
    path: Path
    span: Span


@dataclass(frozen=True)
class Muse:
    """Reader of `muse_<split>.json` or `MUSE_<split>.json` in the root or its folder `muse`.

    An item becomes one example of kind "muse": each question is a single-turn conversation, and
    `targets` are the objects of all answers in order; an object that answers two questions becomes
    two targets that share a mask. A damaged question (no text, a damaged object, a text answer with
    the wrong number of `{seg}`) is dropped and reported without affecting the other questions
    (docs/reference_notes.md D12).

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
        """Return one entry per item, in file order.

        Raises:
            InputError: an unknown split, no such file, or a file that is not JSON.
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
        """Read the example of an item.

        Raises:
            DamagedError: no usable question, no image, or an image whose size is not the item's.
        """
        item = fetch(entry.path, entry.span)
        if not isinstance(item, dict):
            raise DamagedError(f"item is a {type(item).__name__}, expected an object")
        questions, hw = item.get("questions"), check_size(item.get("height"), item.get("width"))
        if not isinstance(questions, list) or not questions:
            raise DamagedError("no questions")
        image = read_image_file(_image_paths(entry.root, item), hw).image
        train = entry.split == "train"
        masks: dict[str, tuple[int, Rle]] = {}  # RLE counts -> (index, mask)
        targets: list[Target] = []
        conversations: list[tuple[Turn, ...]] = []
        problems: list[str] = []
        for number, text in enumerate(questions):
            try:
                question = check_text(text, "question")
                values = _parallel_value(item, "answers", number, list)
                objects = [_object(value, hw) for value in values]
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
        """Return the path of an entry's image.

        Raises:
            DamagedError: the item is unreadable or its image does not exist.
        """
        return find_image_file(_image_paths(entry.root, fetch(entry.path, entry.span)))


def _image_paths(root: Path, item: dict[str, Any]) -> list[Path]:
    """Return candidate paths: `file_name` is in COCO 2014, `coco_url` names a COCO 2017 folder."""
    if item.get("file_name") is not None:
        return coco_candidates(root, "train2014", item["file_name"])
    url = check_text(item.get("coco_url"), "neither file_name nor coco_url: the latter")
    folder = "train2017" if "train2017" in url else "val2017"
    return coco_candidates(root, folder, url.rpartition("/")[2])


def _parallel_value(item: dict[str, Any], key: str, number: int, *kinds: type) -> Any:
    """Return the value of a parallel list for question `number`."""
    values = item.get(key)
    if not isinstance(values, list) or number >= len(values):
        raise DamagedError(f"{key} has nothing for it")
    if not isinstance(values[number], kinds):
        raise DamagedError(f"its part of {key} is a {type(values[number]).__name__}")
    return values[number]


def _object(value: Any, hw: tuple[int, int]) -> tuple[tuple[str, ...], Rle, tuple[int, ...]]:
    """Return phrases, mask and annotation id of an object; `rephrased_name` is optional.

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
    item: dict[str, Any], number: int, num_objects: int, train: bool
) -> tuple[str | None, str | None]:
    """Return the text answer, and the reason if it was dropped.

    Only training needs text answers. In other splits a damaged one is dropped while its question is
    kept, so that every published question is evaluated. Braces other than `{seg}` are plain text.
    """
    try:
        answer = None
        if item.get("text_answers") is not None:
            answer = _parallel_value(item, "text_answers", number, str, type(None))
        if answer is not None and check_text(answer, "text answer").count(SEG) != num_objects:
            raise DamagedError(
                f"text answer with {answer.count(SEG)} {SEG} for {num_objects} objects"
            )
        if answer is None and not num_objects and train:
            raise DamagedError("neither objects nor a text answer")
    except DamagedError as reason:
        if train:
            raise
        return None, f"text answer left out: {reason}"
    return answer, None
