"""Raw record of any dataset: an image, its masks and the conversations about them.

Readers (`sources/`) create it from published files, `storage/builders.py` stores it, and
`transforms.py` composes conversations from it. Nothing here is random, and nothing is resized.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pixellm_jax.benchmark_question import Rle

KINDS = ("names", "short", "long", "muse", "instruct", "ready")
"""Kinds of examples, which decide how conversations are composed:

names     Targets are candidates (classes, parts, referring sentences); questions and answers are
          sampled from templates. `conversations` is empty.
short     A question is a noun phrase for the short templates (ReasonSeg); an answer, if any, is an
          explanation.
long      A question is a sentence for the long templates (ReasonSeg); answers as with `short`.
muse      A question is a sentence for the long templates. An answer contains one `{seg}` per
          target; None: the answer is sampled from templates and the phrases of the targets.
instruct  Questions and answers are used verbatim, several turns in a conversation; no targets.
ready     Questions and answers are used verbatim; an answer contains one `{seg}` per target.
"""

SEG = "{seg}"
"""Placeholder of a target in the text of an answer."""


class Target(NamedTuple):
    """Something that a question can ask for, such as an object."""

    phrases: tuple[str, ...]
    """Names of the target, the preferred one first. MUSE: the rephrased name, if any, then the
    category. Parts: "obj part", then "the part of the obj"."""
    mask: int
    """Index into `Example.masks`. Targets may share a mask (several sentences about one object)."""
    ids: tuple[int, ...] = ()
    """Ids in the dataset (class, annotation, sentence), for tests and reports."""


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str | None = None
    targets: tuple[int, ...] = ()
    """Indices into `Example.targets`, in the order of the answer."""


class Example(NamedTuple):
    """One image of one dataset."""

    key: str
    """Stable id of the image or entry in the dataset; unique over all splits."""
    dataset: str
    """Published name, such as "refcoco+"."""
    split: str
    """Published name, such as "testA"."""
    kind: str
    """One of `KINDS`."""
    image: bytes
    """Encoded image file. EXIF orientation is not applied: masks refer to the stored pixels."""
    hw: tuple[int, int]
    """Height and width of the stored pixels and of every mask."""
    masks: tuple[Rle, ...] = ()
    targets: tuple[Target, ...] = ()
    void: Rle | None = None
    """Pixels that are ignored by losses and metrics."""
    conversations: tuple[tuple[Turn, ...], ...] = ()


def to_json(example: Example) -> str:
    """Return everything but the image as one line of JSON."""
    record = example._asdict()
    del record["image"]
    record["targets"] = [target._asdict() for target in example.targets]
    record["conversations"] = [[turn._asdict() for turn in c] for c in example.conversations]
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def from_json(text: str | bytes, image: bytes) -> Example:
    """Return an example from the JSON that `to_json` wrote and its image."""
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
