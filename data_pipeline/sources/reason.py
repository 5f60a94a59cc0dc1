"""Reader of ReasonSeg: reasoning segmentation, a few questions about one outlined target per image.

Layout (docs/reference_notes.md 1.4):
`reason_seg/<name>/<split>/<stem>.json` next to `<stem>.jpg`, and
`reason_seg/<name>/explanatory/train.json` with explanations of some training images.

The published masks were rasterised from the outlines by OpenCV up to 4.10 (4.11 changed polygon
filling), and `rasterise` reproduces that: corners are truncated to whole pixels, the outline is
drawn, and the interior is filled from outline to outline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import AbsentError, DamagedError
from data_pipeline.example import Example, Target, Turn
from data_pipeline.formats.json_items import items
from data_pipeline.formats.masks import COORDINATE_LIMIT, encode
from data_pipeline.formats.raster import Point, Shape, rasterise
from data_pipeline.reading import Reading, check_split, check_text, read_image_file
from pixellm_jax.errors import InputError

TARGET, VOID = 1, 255
"""Pixel values of a rasterised map; 0 is background."""


class ReasonEntry(NamedTuple):
    """A label file, its image, and the explanation of the image, if any."""

    key: str
    split: str
    labels: Path
    image_path: Path
    explanation: object


@dataclass(frozen=True, kw_only=True)
class ReasonSeg:
    """Reader of ReasonSeg.

    All questions of an image share one target with one mask; regions labelled "ignore" are void.
    Each question becomes a separate conversation. The explanation of an image, if there is one, is
    the answer to each of its questions.

    Attributes:
        folder: name of the dataset folder in `reason_seg`.
    """

    folder: str = "ReasonSeg"

    @property
    def dataset(self) -> str:
        return self.folder

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "val", "test", "train_val")

    def entries(self, root: Path, split: str) -> Sequence[ReasonEntry]:
        """Return the label files sorted by name; "train_val" is "train" followed by "val"."""
        check_split(self, split)
        base = root / "reason_seg" / self.folder
        explanations = _explanations(base / "explanatory" / "train.json")
        entries = []
        for part in split.split("_"):
            folder = base / part
            stems = {file.stem for ending in ("json", "jpg") for file in folder.glob(f"*.{ending}")}
            if not stems:
                raise AbsentError(f"found no *.json in '{folder}': put the published files there")
            for stem in sorted(stems, key=lambda stem: f"{stem}."):
                image_path = folder / f"{stem}.jpg"
                explanation = explanations.get(image_path.name) if part == "train" else None
                key, labels = f"{part}/{stem}", folder / f"{stem}.json"
                entries.append(ReasonEntry(key, part, labels, image_path, explanation))
        return entries

    def read(self, entry: ReasonEntry) -> Reading:
        labels = _labels(entry.labels)
        texts, problems = _texts(labels)
        image, hw = read_image_file([entry.image_path])
        shapes = _shapes(labels.get("shapes"))
        pixels = rasterise(shapes, hw)
        is_sentence = labels.get("is_sentence")
        if not isinstance(is_sentence, bool):
            raise DamagedError(f"is_sentence is {is_sentence!r}, expected true or false")
        void = pixels == VOID
        explanation = None
        if entry.explanation is not None:
            try:
                explanation = check_text(entry.explanation, "the explanation")
            except DamagedError as reason:
                problems.append(str(reason))
        example = Example(
            key=entry.key,
            dataset=self.dataset,
            split=entry.split,
            kind="long" if is_sentence else "short",
            image=image,
            hw=hw,
            masks=(encode(pixels == TARGET),),
            targets=(Target(() if is_sentence else texts, 0),),
            void=encode(void) if void.any() else None,
            conversations=tuple((Turn(text, explanation, (0,)),) for text in texts),
        )
        return Reading(example, tuple(problems))

    def image_path(self, entry: ReasonEntry) -> Path:
        """Return the path of an entry's image."""
        return entry.image_path


def _explanations(file: Path) -> dict[str, object]:
    """Return unchecked explanations by image name; empty if the file does not exist."""
    explanations = {}
    for number, item in enumerate(items(file) if file.is_file() else ()):
        name = item.value.get("image") if isinstance(item.value, dict) else None
        if not isinstance(name, str):
            raise InputError(f"'{file}': row {number} names no image: download the file again")
        explanations[name] = item.value.get("outputs", "")
    return explanations


def _labels(file: Path) -> dict[str, Any]:
    """Parse a label file in UTF-8 or, like some published files, code page 1252."""
    try:
        data = file.read_bytes()
    except OSError:
        raise DamagedError(f"no label file {str(file)!r}") from None
    try:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("cp1252")
        labels = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"label file {file.name!r} is not JSON ({error})") from None
    if not isinstance(labels, dict):
        raise DamagedError(
            f"label file {file.name!r} is a {type(labels).__name__}, expected an object"
        )
    return labels


def _texts(labels: dict[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """Return the questions, and the reasons for dropping others."""
    values = labels.get("text")
    if not isinstance(values, list):
        raise DamagedError(f"text is a {type(values).__name__}, expected a list of questions")
    texts, problems = [], []
    for number, text in enumerate(values):
        try:
            texts.append(check_text(text, f"question {number}"))
        except DamagedError as reason:
            problems.append(str(reason))
    if not texts:
        raise DamagedError("no question")
    return tuple(texts), problems


def _shapes(value: object) -> list[Shape]:
    """Return the shapes to rasterise: "flag" is skipped as a mere note, "...ignore..." is void."""
    if not isinstance(value, list):
        raise DamagedError(f"shapes is a {type(value).__name__}, expected a list")
    shapes = []
    for number, shape in enumerate(value):
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str):
            raise DamagedError(f"shape {number} has no label")
        if label.lower() != "flag":
            pixel_value = VOID if "ignore" in label.lower() else TARGET
            shapes.append(Shape(_corners(shape.get("points"), number), pixel_value))
    return shapes


def _corners(points: object, number: int) -> tuple[Point, ...]:
    """Truncate corners to whole pixels: [[3.9, -0.5], [4, 7]]  ->  (3, 0), (4, 7)."""
    corners = []
    for point in points if isinstance(points, list) else ():
        if not isinstance(point, list) or len(point) != 2:
            raise DamagedError(f"shape {number}: corner {point!r}, expected [x, y]"[:200])
        for value in point:
            # NaN compares false and is rejected, too.
            if type(value) not in (int, float) or not abs(value) <= COORDINATE_LIMIT:
                raise DamagedError(f"shape {number}: corner {point!r}, expected two numbers"[:200])
        corners.append((int(point[0]), int(point[1])))
    if not corners:
        raise DamagedError(f"shape {number} has no corners")
    return tuple(corners)
