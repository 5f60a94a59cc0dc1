"""Answer files: one answer as JSON, masks and overlay, or a resumable JSONL log of many answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from pixellm_jax.errors import InputError
from pixellm_jax.files import write_whole
from pixellm_jax.images import rle
from pixellm_jax.images.overlay import draw_overlay
from pixellm_jax.images.read import read_image
from pixellm_jax.inference.answer import Answer
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.inference.request import check_question

ANSWER_FILES = ("answer.json", "mask_*.png", "overlay.png")
"""Files of `write_answer`; a folder that holds anything else is never replaced."""

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Suffixes, in lower case, of the files in a folder that count as images."""

INCOMPLETE = {
    "length": "the answer was cut off at the limit of new tokens",
    "non_finite": "the answer ended at numbers that are not finite",
}
"""Explanation of each finish reason of an incomplete answer."""

RECORDED_REASONS = {"non_finite": "damaged"}
"""Finish reasons that have another name in answer files."""


class ImageQuestion(NamedTuple):
    """A question about an image file.

    Attributes:
        image: path of the image.
        name: the image as the user named it.
        question: the question.
    """

    image: Path
    name: str
    question: str


def answer_record(answer: Answer, image: str, question: str, hw: tuple[int, int]) -> dict[str, Any]:
    """Return an answer as JSON: its text, finish reason and targets.

    A box is [x, y, width, height] in pixels, None for an empty mask; spans and markers are start
    and stop indices in the text; `segmentation` is a COCO run-length encoding.
    """
    targets: list[dict[str, Any]] = []
    for i, mask in enumerate(answer.masks):
        start, stop = map(int, answer.spans[i])
        targets.append(
            {
                "phrase": answer.text[start:stop],
                "span": [start, stop],
                "marker": list(map(int, answer.markers[i])),
                "score": float(answer.scores[i]),
                "presence": float(answer.presence[i]),
                "kept": bool(answer.kept[i]),
                "area": int(mask.sum()),
                "box": _box(mask),
                "segmentation": rle.encode(mask),
            }
        )
    return {
        "image": image,
        "size": list(hw),
        "question": question,
        "text": answer.text,
        "complete": answer.complete,
        "reason": RECORDED_REASONS.get(answer.finish_reason, answer.finish_reason),
        "targets": targets,
    }


def write_answer(
    folder: Path, answer: Answer, pixels: UInt8[np.ndarray, "y x 3"], image: Path, question: str
) -> list[dict[str, Any]]:
    """Write answer.json, the masks and the overlay into `folder`; return the targets' records."""
    record = answer_record(answer, str(image), question, (pixels.shape[0], pixels.shape[1]))
    targets = record["targets"]
    for i, (target, mask) in enumerate(zip(targets, answer.masks, strict=True)):
        target["mask"] = f"mask_{i:02d}.png"
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / target["mask"])
    _overlay(pixels, answer, targets).save(folder / "overlay.png")
    (folder / "answer.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
        errors="replace",  # a file name may hold bytes that are not text
    )
    return targets


def read_questions(path: Path) -> list[ImageQuestion]:
    """Read a JSONL file of {"image": ..., "question": ...}; images are relative to its folder.

    Raises:
        InputError: the file cannot be read, or a line of it has another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the path") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image, question = record["image"], record["question"]
            if not isinstance(image, str) or not isinstance(question, str):
                raise TypeError("expected two strings")
            check_question(question)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}:{number}: {type(error).__name__} {error}; write lines like "
                '{"image": "a.jpg", "question": "Where is the cat?"}'
            ) from None
        questions.append(ImageQuestion(path.parent / image, image, question))
    if not questions:
        raise InputError(f"{path}: contains no questions; write one per line")
    return questions


def questions_about_folder(folder: Path, question: str) -> list[ImageQuestion]:
    """Return one question about every image of a folder, sorted by file name.

    Raises:
        InputError: the folder contains no images.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{folder}: contains no images; name an image or another folder")
    return [ImageQuestion(file, file.name, question) for file in files]


class AnswerLog:
    """Resumable JSONL file of answers, one line {"number": ..., ...} each, in any order.

    The lines of an earlier run are kept, except for errors, which are tried again, and a last line
    that was cut off.

    Attributes:
        path: the file.
        questions: all questions, whose index is the number of their answer.
        done: numbers of the questions that have a line.
    """

    def __init__(self, path: Path, questions: list[ImageQuestion]) -> None:
        """Open or create the file.

        Raises:
            InputError: the file holds answers to other questions, or cannot be written.
        """
        self.path = path
        self.questions = questions
        self.done: set[int] = set()
        try:
            data = path.read_bytes() if path.exists() else b""
            *lines, _ = data.split(b"\n")
            kept = [line for line in lines if self._keep(json.loads(line))]
            if len(kept) < len(lines):
                write_whole(path, b"".join(line + b"\n" for line in kept).decode())
            self._file = path.open("ab")
            self._file.truncate(sum(len(line) + 1 for line in kept))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}: not a file of answers ({error}); choose another --out"
            ) from None
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None

    @property
    def remaining(self) -> list[int]:
        """Numbers of the questions that have no line yet."""
        return [number for number in range(len(self.questions)) if number not in self.done]

    def write(self, number: int, record: dict[str, Any]) -> None:
        """Append a line; it is on disk when this returns.

        Raises:
            InputError: the line cannot be written, for example because the disk is full.
        """
        line = _as_text(json.dumps({"number": number, **record}, ensure_ascii=False)) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _write_error(self.path, error) from error
        self.done.add(number)

    def close(self) -> None:
        self._file.close()

    def _keep(self, record: dict[str, Any]) -> bool:
        """Whether a line is an answer, not an error, to the question of its number."""
        number = record["number"]
        expected = self.questions[number] if 0 <= number < len(self.questions) else None
        name = _as_text(expected.name) if expected else None
        if expected is None or (record["image"], record["question"]) != (name, expected.question):
            raise InputError(
                f"{self.path}: holds answers to other questions (number {number}); choose another "
                "--out or remove it"
            )
        if "error" in record:
            return False
        self.done.add(number)
        return True


def answer_remaining(
    predictor: Predictor, log: AnswerLog, overlays: Path
) -> Iterator[tuple[ImageQuestion, InputError | None]]:
    """Answer the questions that a log has no line for, and write lines and overlays.

    Yields each question once it is written, with the error if it could not be answered. An overlay
    is named after the number of its question: 000000.png.

    Raises:
        InputError: a file cannot be written.
    """
    remaining = log.remaining
    pairs = ((log.questions[number].image, log.questions[number].question) for number in remaining)
    for index, answer in predictor.each(pairs):
        number = remaining[index]
        item = log.questions[number]
        failure = None
        try:
            record, overlay = _describe(answer, item)
        except InputError as error:
            failure = error
            record = {"image": item.name, "question": item.question, "error": str(error)}
        else:
            path = overlays / f"{number:06d}.png"
            try:
                overlay.save(path)
            except OSError as error:
                raise _write_error(path, error) from error
        log.write(number, record)
        yield item, failure


def _describe(
    answer: Answer | InputError, item: ImageQuestion
) -> tuple[dict[str, Any], Image.Image]:
    """Return the record and the overlay of an answer.

    Raises:
        InputError: the question has no answer, or no usable one.
    """
    if isinstance(answer, InputError):
        raise answer
    if answer.finish_reason == "non_finite":
        raise InputError(INCOMPLETE["non_finite"])
    pixels = read_image(item.image)
    record = answer_record(answer, item.name, item.question, (pixels.shape[0], pixels.shape[1]))
    return record, _overlay(pixels, answer, record["targets"])


def _overlay(
    pixels: UInt8[np.ndarray, "y x 3"], answer: Answer, targets: list[dict[str, Any]]
) -> Image.Image:
    """Draw the masks on the image, each with its phrase or its number."""
    labels = [target["phrase"] or str(i) for i, target in enumerate(targets)]
    return draw_overlay(pixels, answer.masks, labels)


def _box(mask: Bool[np.ndarray, "y x"]) -> list[float] | None:
    """Return the bounding box [x, y, width, height] of a mask, None if it is empty."""
    if not mask.any():
        return None
    y = np.flatnonzero(mask.any(axis=1))
    x = np.flatnonzero(mask.any(axis=0))
    return [float(x[0]), float(y[0]), float(x[-1] - x[0] + 1), float(y[-1] - y[0] + 1)]


def _as_text(name: str) -> str:
    """Replace bytes of a file name that are not text by question marks."""
    return name.encode("utf-8", errors="replace").decode()


def _write_error(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: writing failed ({error.strerror or error}); free some space and run the same "
        "command again to resume"
    )
