"""Interface of the readers of published files, and the image files that they share.

A reader is a `Source`: it lists the entries of a split from the index files alone, and reads one
entry at a time. Entries are small and can be pickled, so that any worker process can read any of
them in any order. What is wrong with one entry is raised or reported by `read`, never by `entries`:
every entry of the published files is accounted for.

    for entry in source.entries(root, "train"):
        try:
            example, problems = source.read(entry)
        except DamagedError as reason:
            ...  # the whole entry is skipped: list entry.key and the reason
        for problem in problems:
            ...  # the example stays, a part of it was left out: list example.key and the problem
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
    """One line of an index: enough to read one example. Small and picklable.

    key: becomes `Example.key`; unique in the dataset, all splits together.
    """

    @property
    def key(self) -> str: ...


class Reading(NamedTuple):
    """An example, and one line for each part (question, sentence, target) that was left out."""

    example: Example
    problems: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """A reader of one dataset. Frozen and picklable.

    dataset: its published name, as in `Example.dataset`.
    splits: the published splits, in their usual order.
    """

    @property
    def dataset(self) -> str: ...

    @property
    def splits(self) -> tuple[str, ...]: ...

    def entries(self, root: Path, split: str) -> Sequence[Any]:
        """The index of a split, each an `Entry`, in an order that depends on the files alone.

        Reads the index files below `root` (the folder of all datasets), no image and no mask.

        Raises:
            InputError: an index file is missing or damaged as a whole, or there is no such split.
        """

    def read(self, entry: Any) -> Reading:
        """The example of an entry, with its image and masks.

        Raises:
            DamagedError: it cannot be used; the message says why.
        """


class StoredImage(NamedTuple):
    """An encoded image file and the height and width of its stored pixels."""

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
            raise DamagedError(f"picture {path.name!r} cannot be read ({_line(error)})") from None
        return _checked(StoredImage(data, _stored_size(data, path.name)), path.name, hw)
    raise DamagedError(f"no picture {' or '.join(map(str, paths))}")


def find_image_file(candidates: Iterable[Path]) -> Path:
    """The file that `read_image_file` takes.

    Raises:
        DamagedError: none of them is there.
    """
    paths = list(candidates)
    for path in paths:
        if path.is_file():
            return path
    raise DamagedError(f"no picture {' or '.join(map(str, paths))}")


def _checked(stored: StoredImage, name: str, hw: tuple[int, int] | None) -> StoredImage:
    if hw is not None and stored.hw != tuple(hw):
        found = " x ".join(map(str, stored.hw))
        raise DamagedError(f"picture {name!r} is {found}, annotated as {hw[0]} x {hw[1]}")
    return stored


def _stored_size(data: bytes, name: str) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Exception as error:  # decoders leak errors of every type; here all mean the same
        raise DamagedError(f"picture {name!r} has no readable header ({_line(error)})") from None
    return check_size(height, width)


def below(folder: Path, name: object) -> Path:
    """A file in `folder` (or a folder of it) that the annotations name.

    Raises:
        DamagedError: not a name, or one that leads out of the folder.
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
        DamagedError: as `below`.
    """
    return [
        below(root / images / folder, name) for images in ("refer_seg/images/mscoco/images", "coco")
    ]


def check_text(value: object, what: str) -> str:
    """A text of the annotations, as it is.

    Raises:
        DamagedError: not text, blank, or not Unicode (JSON can hold halves of characters).
    """
    if not isinstance(value, str) or not value.strip():
        raise DamagedError(f"{what} is {repr(value)[:60]}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DamagedError(f"{what} holds half a character: {ascii(value)[:60]}") from None
    return value


def find_index(candidates: Sequence[Path]) -> Path:
    """The first of the index files that exists.

    Raises:
        AbsentError: none does.
    """
    for path in candidates:
        if path.is_file():
            return path
    expected = ", ".join(repr(str(path)) for path in candidates)
    raise AbsentError(f"found none of {expected}: put the published file there or check the folder")


def check_split(source: Source, split: str) -> None:
    """Raises InputError if the source has no such split."""
    if split not in source.splits:
        raise InputError(
            f"{source.dataset} has no split {split!r}: use one of {', '.join(source.splits)}"
        )


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
