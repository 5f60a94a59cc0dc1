"""Interface of the readers of published files, and the image files that they share.

A reader is a `Source`: it lists the entries of a split from the index files alone, and reads one
entry at a time. Entries are small and picklable, so any worker process can read any entry in any
order. Damage to one entry is raised or reported by `read`, never by `entries`, so that every entry
of the published files is accounted for.

    for entry in source.entries(root, "train"):
        try:
            example, problems = source.read(entry)
        except DamagedError as reason:
            ...  # the entry is skipped: list entry.key and the reason
        for problem in problems:
            ...  # the example is kept without one of its parts: list example.key and the problem
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, runtime_checkable

from PIL import Image

from data_pipeline.errors import AbsentError, DamagedError
from data_pipeline.example import Example
from data_pipeline.formats.masks import check_size
from pixellm_jax.errors import InputError


@runtime_checkable
class Entry(Protocol):
    """Record of an index from which one example can be read. Small and picklable."""

    @property
    def key(self) -> str:
        """`Example.key`: unique in the dataset, over all splits."""


class Reading(NamedTuple):
    """An example, and one line for each part (question, sentence, target) that was left out."""

    example: Example
    problems: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """Reader of one dataset. Frozen and picklable."""

    @property
    def dataset(self) -> str:
        """Published name, as in `Example.dataset`."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Published splits, in their usual order."""

    def entries(self, root: Path, split: str) -> Sequence[Any]:
        """Return the entries (`Entry`) of a split, in an order that depends on the files alone.

        Reads index files below `root` (the folder of all datasets), but no image and no mask.

        Raises:
            InputError: an index file is missing or damaged as a whole, or there is no such split.
        """

    def read(self, entry: Any) -> Reading:
        """Return the example of an entry, with its image and masks.

        Raises:
            DamagedError: the entry cannot be used; the message says why.
        """


class StoredImage(NamedTuple):
    """Encoded image file, and the height and width of its pixels as stored (without EXIF)."""

    image: bytes
    hw: tuple[int, int]


def read_image_file(candidates: Iterable[Path], hw: tuple[int, int] | None = None) -> StoredImage:
    """Read the first candidate that exists. Only its header is decoded.

    `hw`: height and width that the annotations were made for, compared with the size of the file.

    Raises:
        DamagedError: no such file, not an image, too large, or of another size than `hw`.
    """
    paths = list(candidates)
    for path in paths:
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            reason = _one_line(error)
            raise DamagedError(f"picture {path.name!r} cannot be read ({reason})") from None
        return _check_hw(StoredImage(data, _stored_size(data, path.name)), path.name, hw)
    raise DamagedError(f"no picture {' or '.join(map(str, paths))}")


def find_image_file(candidates: Iterable[Path]) -> Path:
    """Return the candidate that `read_image_file` would read.

    Raises:
        DamagedError: no candidate exists.
    """
    paths = list(candidates)
    for path in paths:
        if path.is_file():
            return path
    raise DamagedError(f"no picture {' or '.join(map(str, paths))}")


def _check_hw(stored: StoredImage, name: str, hw: tuple[int, int] | None) -> StoredImage:
    if hw is not None and stored.hw != tuple(hw):
        actual = " x ".join(map(str, stored.hw))
        raise DamagedError(f"picture {name!r} is {actual}, annotated as {hw[0]} x {hw[1]}")
    return stored


def _stored_size(data: bytes, name: str) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        reason = _one_line(error)
        raise DamagedError(f"picture {name!r} has no readable header ({reason})") from None
    return check_size(height, width)


def path_inside(folder: Path, name: object) -> Path:
    """Return the path of a file that the annotations name, relative to `folder`.

    Raises:
        DamagedError: `name` is not a file name, or leads out of the folder.
    """
    if not isinstance(name, str) or not name.isprintable() or not name or "\\" in name:
        raise DamagedError(f"file name {ascii(name)[:60]}: expected the name of a picture")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise DamagedError(f"file name {name[:60]!r} leads out of {folder.name}")
    return folder / parts


def coco_candidates(root: Path, folder: str, name: object) -> list[Path]:
    """Return the paths of a COCO image: with the refer sets as published, else with COCO itself.

        train2014, "1.jpg"  ->  refer_seg/images/mscoco/images/train2014/1.jpg
                                coco/train2014/1.jpg

    Raises:
        DamagedError: as `path_inside`.
    """
    return [
        path_inside(root / images / folder, name)
        for images in ("refer_seg/images/mscoco/images", "coco")
    ]


def check_text(value: object, what: str) -> str:
    """Return a text of the annotations unchanged; `what` describes it in the error message.

    Raises:
        DamagedError: not text, blank, or not Unicode (JSON strings can contain lone surrogates).
    """
    if not isinstance(value, str) or not value.strip():
        raise DamagedError(f"{what} is {repr(value)[:60]}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DamagedError(f"{what} holds half a character: {ascii(value)[:60]}") from None
    return value


def find_index(candidates: Sequence[Path]) -> Path:
    """Return the first candidate that exists.

    Raises:
        AbsentError: none of the files exists.
    """
    for path in candidates:
        if path.is_file():
            return path
    expected = ", ".join(repr(str(path)) for path in candidates)
    raise AbsentError(f"found none of {expected}: put the published file there or check the folder")


def check_split(source: Source, split: str) -> None:
    """Raise InputError if the source has no such split."""
    if split not in source.splits:
        raise InputError(
            f"{source.dataset} has no split {split!r}: use one of {', '.join(source.splits)}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
