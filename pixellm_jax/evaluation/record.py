"""Record of one scored benchmark question: a line of `questions.jsonl`.

All scores, reports and comparisons are computed from these lines (and `settings.json`) alone:

{"id": "muse/val/3/0", "picture": "coco/train2017/000000000030.jpg", "hw": [428, 640],
 "question": "Which thing holds water? Please respond with segmentation mask.",
 "expected": "The [SEG] does.", "answer": "It is [SEG].", "groups": ["few"],
 "truth": [{"size": [428, 640], "counts": "..."}], "predicted": [{"size": ..., "counts": ...}],
 "void": null, "descriptions": ["the white vase"], "pairs": [[0, 0, 5120, 6000]],
 "reason": "stop", "judge": null}
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from pixellm_jax.benchmark_question import Rle
from pixellm_jax.errors import InputError
from pixellm_jax.images.rle import check

QUESTIONS = "questions"
"""Stem of the records' file in the output folder; the suffix is .jsonl."""

SETTINGS = "settings.json"
"""File of the settings in the output folder."""

DAMAGED = "damaged"
"""`QuestionRecord.reason` of an answer with non-finite numbers."""

TOO_LONG = "too long"
"""`QuestionRecord.reason` of a question whose prompt exceeds the model's positions."""

Pair = tuple[int | None, int | None, int, int]
"""Indices of a predicted and a true mask (one may be None); intersection and union in pixels."""


class QuestionRecord(NamedTuple):
    """A scored question. Sizes are in pixels of the annotation, not of the canvas.

    Attributes:
        id: unique and stable in the benchmark: "dataset/split/image/question number". It is the key
            for pairing two runs and for resuming one.
        picture: path of the image relative to the data folder; "" if the image is rendered.
        hw: height and width.
        question: as the model was asked.
        expected: the true answer, "" if the benchmark has none.
        answer: what the model wrote; targets are written `[SEG]`, in order.
        groups: groups the question is reported in, such as "few" or "kind: relation".
        truth: true masks, without their void pixels.
        predicted: the model's masks, in the order of the answer; a single mask, their union, where
            the benchmark asks for one region.
        void: pixels that do not count, or None.
        descriptions: what each true mask shows, in words; empty if the benchmark has no words for
            it.
        pairs: the matching, with every true and every predicted mask exactly once. Areas are
            without void pixels. An unmatched mask has intersection 0 and its own area as the union.
        reason: why the answer ended: "stop", "length", `DAMAGED`, "given" (it was in the prompt),
            or `TOO_LONG` (the answer is empty).
        judge: None, or {"judge": name, "scores": [1 to 10, or None, for each true mask]}.
    """

    id: str
    picture: str
    hw: tuple[int, int]
    question: str
    expected: str
    answer: str
    groups: tuple[str, ...]
    truth: tuple[Rle, ...]
    predicted: tuple[Rle, ...]
    void: Rle | None
    descriptions: tuple[str, ...]
    pairs: tuple[Pair, ...]
    reason: str
    judge: dict[str, Any] | None = None

    def to_json(self) -> str:
        """Serialise to one line, without the line break."""
        return json.dumps(self._asdict(), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> QuestionRecord:
        """Parse and validate a line, the inverse of `to_json`.

        Raises:
            InputError: not JSON, wrong keys, or inconsistent values.
        """
        try:
            return _read(json.loads(line))
        except RecursionError:
            raise InputError("not a record of a question: nested too deeply") from None
        except (ValueError, TypeError) as error:
            raise InputError(f"not a record of a question: {error}") from None


def read_records(path: Path) -> list[QuestionRecord]:
    """Read the records of a file in order, without an incomplete last line.

    Raises:
        InputError: the file cannot be read, a line is damaged, or an id is not unique.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    records = list[QuestionRecord]()
    ids = set[str]()
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = QuestionRecord.from_json(line)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}; remove the line and run again") from None
        if record.id in ids:
            raise InputError(f"{path}:{number}: a second record of {record.id!r}; remove one")
        ids.add(record.id)
        records.append(record)
    return records


def natural_order(record: QuestionRecord) -> list[str | int]:
    """Return a sort key by id, with numbers by value: "val/2/0" before "val/10/0"."""
    parts = re.split(r"([0-9]+)", record.id)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _read(values: object) -> QuestionRecord:
    if not isinstance(values, dict) or values.keys() != set(QuestionRecord._fields):
        found = ", ".join(sorted(values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"expected the keys {', '.join(QuestionRecord._fields)}, found {found}")
    for key in ("id", "picture", "question", "expected", "answer", "reason"):
        if not isinstance(values[key], str):
            raise ValueError(f"{key} is not text")
    lists = {key: values[key] for key in ("groups", "truth", "predicted", "descriptions", "pairs")}
    for key, value in lists.items():
        if not isinstance(value, list):
            raise ValueError(f"{key} is not a list")
    if not all(isinstance(text, str) for text in [*lists["groups"], *lists["descriptions"]]):
        raise ValueError("groups and descriptions are not all text")
    hw = values["hw"]
    if not isinstance(hw, list) or len(hw) != 2:
        raise ValueError("hw is not [height, width]")
    void = values["void"]
    masks = [check(mask) for mask in [*lists["truth"], *lists["predicted"]]]
    for mask in [*masks, *([check(void)] if void is not None else [])]:
        if mask["size"] != hw:
            raise ValueError(f"a mask of {mask['size']} in an image of {hw}")
    if len(lists["descriptions"]) not in (0, len(lists["truth"])):
        raise ValueError("the number of descriptions is not the number of true masks")
    pairs = tuple(map(_pair, lists["pairs"]))
    for column, key in enumerate(("predicted", "truth")):
        numbers = [pair[:2][column] for pair in pairs]
        matched = sorted(number for number in numbers if number is not None)
        if matched != list(range(len(lists[key]))):
            raise ValueError(f"pairs do not name each of the {len(lists[key])} {key} masks once")
    _check_judge(values["judge"], len(lists["truth"]))
    tuples: dict[str, Any] = {key: tuple(value) for key, value in lists.items()}
    return QuestionRecord(**{**values, **tuples, "hw": (hw[0], hw[1]), "pairs": pairs})


def _pair(value: object) -> Pair:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError("a pair is not [predicted, truth, intersection, union]")
    predicted, truth, intersection, union = value
    if any(type(part) is not int for part in value if part is not None):
        raise ValueError(f"the pair {value!r} is not made of integers"[:200])
    if None in (intersection, union) or not 0 <= intersection <= union:
        raise ValueError(f"the pair {value!r} has impossible areas"[:200])
    if None in (predicted, truth) and (intersection or predicted == truth):
        raise ValueError(f"the pair {value!r} is not a pair"[:200])
    return predicted, truth, intersection, union


def _check_judge(value: object, truths: int) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or value.keys() != {"judge", "scores"}:
        raise ValueError("judge is neither null nor {judge, scores}")
    scores = value["scores"]
    if not isinstance(value["judge"], str) or not isinstance(scores, list):
        raise ValueError("judge is not a name with scores")
    known = all(s is None or (type(s) is int and 1 <= s <= 10) for s in scores)
    if len(scores) != truths or not known:
        raise ValueError(f"judge has no score from 1 to 10 for each of the {truths} true masks")
