"""Raw record of any dataset: an image, its masks and the conversations about them.

Readers (`sources/`) make it from published files, builders (`builders.py`) store it, transforms
(`transforms.py`) draw conversations from it. Nothing here is random and nothing is resized.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pixellm_jax.benchmark_question import Rle

KINDS = ("names", "short", "long", "muse", "instruct", "ready")
"""Kinds of examples, which decide how conversations are composed:

names     Targets are candidates (classes, parts, sentences about objects); questions and answers
          are drawn from templates. `conversations` is empty.
short     A question is a noun phrase for the short templates (ReasonSeg), an answer, if any, is an
          explanation.
long      A question is a sentence for the long templates (ReasonSeg), answers as with `short`.
muse      A question is a sentence for the long templates; an answer holds one `{seg}` per target,
          or None: then it is drawn from the target's phrases.
instruct  Questions and answers are used as they are, several turns in a conversation; no targets.
ready     Questions and answers are used as they are; an answer holds one `{seg}` per target.
"""

SEG = "{seg}"
"""Stands for a target in the text of an answer."""


class Target(NamedTuple):
    """Something that can be asked for.

    phrases: ways to name it, the preferred first. MUSE: the rephrased name if there is one, then
        the category. Parts: "obj part", then "the part of the obj".
    mask: index into `Example.masks`; several targets may share one (sentences about one object).
    ids: what the dataset calls it (class, annotation, sentence numbers), for tests and reports.
    """

    phrases: tuple[str, ...]
    mask: int
    ids: tuple[int, ...] = ()


class Turn(NamedTuple):
    """A question and its answer; `targets` index `Example.targets` in the order of the answer."""

    question: str
    answer: str | None = None
    targets: tuple[int, ...] = ()


class Example(NamedTuple):
    """One image of one dataset.

    key: unique in the dataset and stable: what the dataset calls the image or entry.
    dataset, split: published names, e.g. "refcoco+", "testA".
    kind: one of `KINDS`.
    image: the encoded file, as stored (EXIF orientation is not applied: masks lie on its pixels).
    hw: height and width of the stored pixels; every mask has this size.
    void: pixels that take no part in losses and metrics.
    conversations: each a sequence of turns.
    """

    key: str
    dataset: str
    split: str
    kind: str
    image: bytes
    hw: tuple[int, int]
    masks: tuple[Rle, ...] = ()
    targets: tuple[Target, ...] = ()
    void: Rle | None = None
    conversations: tuple[tuple[Turn, ...], ...] = ()


def to_json(example: Example) -> str:
    """Everything but the image as one line of JSON."""
    record = example._asdict()
    del record["image"]
    record["targets"] = [target._asdict() for target in example.targets]
    record["conversations"] = [[turn._asdict() for turn in c] for c in example.conversations]
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def from_json(text: str | bytes, image: bytes) -> Example:
    """The inverse of `to_json`."""
    record: dict[str, Any] = json.loads(text)
    targets = (Target(tuple(t["phrases"]), t["mask"], tuple(t["ids"])) for t in record["targets"])
    conversations = (
        tuple(Turn(t["question"], t["answer"], tuple(t["targets"])) for t in turns)
        for turns in record["conversations"]
    )
    return Example(
        **{
            **record,
            "hw": tuple(record["hw"]),
            "masks": tuple(record["masks"]),
            "targets": tuple(targets),
            "conversations": tuple(conversations),
        },
        image=image,
    )
