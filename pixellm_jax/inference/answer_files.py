"""Answers on disk: records of their targets, and a file of many answers that a run goes on with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco

from pixellm_jax.errors import InputError
from pixellm_jax.files import write_whole
from pixellm_jax.inference.answer import Answer
from pixellm_jax.inference.request import check_question

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Endings of the files of a folder that are taken for pictures."""


REASONS = {"non_finite": "damaged"}
"""Finish reasons whose names in files are others."""


class Asked(NamedTuple):
    """A question about a picture; `name`: the picture's, as it was given."""

    image: Path
    name: str
    question: str


def answer_record(answer: Answer, image: str, question: str, hw: tuple[int, int]) -> dict[str, Any]:
    """An answer as JSON: its text, why it ended, and its targets.

    Box is [x, y, width, height] in pixels, None for an empty mask; spans count characters of text.
    """
    targets: list[dict[str, Any]] = []
    for i, mask in enumerate(answer.masks):
        start, stop = map(int, answer.spans[i])
        rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        area = int(mask.sum())
        targets.append(
            {
                "phrase": answer.text[start:stop],
                "span": [start, stop],
                "marker": list(map(int, answer.markers[i])),
                "score": float(answer.scores[i]),
                "presence": float(answer.presence[i]),
                "kept": bool(answer.kept[i]),
                "area": area,
                "box": [float(v) for v in coco.toBbox(rle)] if area else None,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
        )
    return {
        "image": image,
        "size": list(hw),
        "question": question,
        "text": answer.text,
        "complete": answer.complete,
        "reason": REASONS.get(answer.finish_reason, answer.finish_reason),
        "targets": targets,
    }


def read_questions(path: Path) -> list[Asked]:
    """The lines of a JSONL file, each {"image": ..., "question": ...}; images beside the file.

    Raises:
        InputError: the file, or a line of it, is not like this.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the path") from None
    asked = []
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
        asked.append(Asked(path.parent / image, image, question))
    if not asked:
        raise InputError(f"{path}: no questions in it; write one line for each")
    return asked


def ask_about_folder(folder: Path, question: str) -> list[Asked]:
    """One question about every picture of a folder, by name.

    Raises:
        InputError: there is none.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not files:
        raise InputError(f"{folder}: no pictures in this folder; name a file or another folder")
    return [Asked(file, file.name, question) for file in files]


class AnswerLog:
    """A JSONL file of answers, one line each as they come: {"number": ..., ...}.

    An earlier run's lines are kept, but for errors, which are tried again, and a last line that was
    cut off. `done`: their numbers.
    """

    def __init__(self, path: Path, asked: list[Asked]) -> None:
        """Opens or makes the file.

        Raises:
            InputError: it holds answers to other questions, or cannot be written.
        """
        self.done: set[int] = set()
        try:
            data = path.read_bytes() if path.exists() else b""
            *lines, _ = data.split(b"\n")
            kept = [line for line in lines if self._keeps(path, json.loads(line), asked)]
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

    def _keeps(self, path: Path, record: dict[str, Any], asked: list[Asked]) -> bool:
        """Whether a line is an answer, to the same question."""
        number = record["number"]
        ours = asked[number] if 0 <= number < len(asked) else None
        name = _as_text(ours.name) if ours else None
        if ours is None or (record["image"], record["question"]) != (name, ours.question):
            raise InputError(
                f"{path}: holds answers to other questions (number {number}); choose another --out "
                "or remove it"
            )
        if "error" in record:
            return False
        self.done.add(number)
        return True

    def write(self, number: int, record: dict[str, Any]) -> None:
        """Adds a line; it is on the disk when this returns.

        Raises:
            InputError: the disk is full.
        """
        line = _as_text(json.dumps({"number": number, **record}, ensure_ascii=False)) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"{self._file.name}: writing failed ({error.strerror or error}); free some space, "
                "then the same command goes on"
            ) from error
        self.done.add(number)

    def close(self) -> None:
        self._file.close()


def _as_text(name: str) -> str:
    """A file name may hold bytes that are no text: question marks stand for them."""
    return name.encode("utf-8", errors="replace").decode()
