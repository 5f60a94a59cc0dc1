"""Templates of questions and answers, from the released training code.

The wording is part of the model: released checkpoints were trained on exactly these templates,
typos ("asegment") included. `{name}` stands for the target as a noun phrase, `{text}` for a
question of the dataset, `{seg}` for the codebook tokens of the targets. `<image>` is not part of a
template.

Everything is immutable. `choices` returns the templates of a kind of example, with or without the
further questions of the option `expanded`, so no dataset can change the templates of another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

SHORT_QUESTIONS = (
    "Can you segment the {name} in this image?",
    "Please segment the {name} in this image.",
    "What is {name} in this image? Please respond with segmentation mask.",
    "What is {name} in this image? Please output segmentation mask.",
)
MORE_SHORT_QUESTIONS = (
    "Could you identify the {name} in this picture?",
    "Are you able to delineate the {name} in the image?",
    "Can you pinpoint the {name} in this photo?",
    "Is it possible for you to highlight the {name} in this image?",
    "Can you discern the {name} in the given picture?",
    "Can you provide me with asegment of the {name}?",
    "Please perform image segmentation to isolate the {name} in this image.",
    "Help me segment the {name}.",
    "Would you be willing to segment the {name}?",
    "Can you identify {name} in this picture? Please provide a segmentation mask.",
    "Could you point out {name} in this image and show it with a segmentation mask?",
    "In this image, where is {name}? I'd appreciate a segmentation mask.",
    "Please highlight {name} in this image using a segmentation mask.",
    "In the picture provided, can you show where {name} is with a segmentation mask?",
)
LONG_QUESTIONS = (
    "{text} Please respond with segmentation mask.",
    "{text} Please output segmentation mask.",
)
MORE_LONG_QUESTIONS = (
    "{text} Provide the segmentation mask.",
    "{text} Output the segmentation mask.",
    "{text} Please show the segmentation mask.",
    "{text} I'd appreciate segmentation masks.",
    "{text} Please highlight the segmentation mask.",
)
EXPLANATORY_QUESTIONS = (
    "{text} Please output segmentation mask and explain why.",
    "{text} Please output segmentation mask and explain the reason.",
    "{text} Please output segmentation mask and give some explanation.",
)

ANSWERS = (
    "It is {seg}.",
    "Sure, {seg}.",
    "Sure, it is {seg}.",
    "Sure, the segmentation result is {seg}.",
    "{seg}.",
)
SEPARATE_ANSWERS = (
    "{name} is {seg}.",
    "The segmentation result of {name} is {seg}.",
    "{seg}.",
)
MUSE_SEPARATE_ANSWERS = ("{name} is {seg}.",)
MUSE_JOINT_ANSWERS = (
    "{name} are {seg}, separately.",
    "{name} are {seg}.",
    "Sure, {name} are {seg}, separately.",
    "Sure, {name} are {seg}.",
    "the segmentation result of {name} are {seg}.",
    "the segmentation result of {name} are {seg}, separately.",
    "Sure, the segmentation result of {name} are {seg}.",
    "Sure, the segmentation result of {name} are {seg}, separately.",
)
JOINT_ANSWERS = (
    *MUSE_JOINT_ANSWERS,
    "Sure, they are {seg}.",
    "They are {seg}.",
    "{seg}.",
)

SHORT_EVALUATION = "What is {name} in this image? Please output segmentation mask."
LONG_EVALUATION = "{text} Please output segmentation mask."
"""Question of the teacher-forced protocol; the text is not sampled and its case is kept."""


class Choices(NamedTuple):
    """Templates to sample from for one kind of example; empty where the kind needs none."""

    questions: tuple[str, ...]
    """Questions that ask for masks."""
    answers: tuple[str, ...] = ()
    """Answers about a single target."""
    separate: tuple[str, ...] = ()
    """Clauses about one of several targets; the answer enumerates them."""
    joint: tuple[str, ...] = ()
    """Answers about all targets at once."""
    explanatory: tuple[str, ...] = ()
    """Questions that ask for the mask and an explanation."""


def choices(kind: str, *, expanded: bool) -> Choices:
    """Return the templates of a kind of example (`data_pipeline.example.KINDS`).

    `expanded` appends the further questions once, which gives 18 short and 7 long questions. (Every
    dataset object of the released code extends one shared list. With its published mixture the list
    contains the further short questions twice, and they also reach the validation prompts.)

    Raises:
        ValueError: an unknown kind, or one that needs no templates.
    """
    short = SHORT_QUESTIONS + MORE_SHORT_QUESTIONS * expanded
    long = LONG_QUESTIONS + MORE_LONG_QUESTIONS * expanded
    match kind:
        case "names":
            return Choices(short, ANSWERS, SEPARATE_ANSWERS, JOINT_ANSWERS)
        case "short":
            return Choices(short, ANSWERS, explanatory=EXPLANATORY_QUESTIONS)
        case "long":
            return Choices(long, ANSWERS, explanatory=EXPLANATORY_QUESTIONS)
        case "muse":
            return Choices(long, (), MUSE_SEPARATE_ANSWERS, MUSE_JOINT_ANSWERS)
    raise ValueError(f"examples of the kind {kind!r} are used as they are: no templates")


def fill(template: str, **values: str) -> str:
    """Fill a template in one pass, so that braces inside a value stay unchanged.

    fill("{name} is {seg}.", name="a {seg} of {", seg="[SEG]")  ->  "a {seg} of { is [SEG]."
    """
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def fill_each(template: str, names: Sequence[str], *, seg: str) -> str:
    """Fill an answer template once per name and enumerate the clauses in one sentence.

    fill_each("{name} is {seg}.", ["cat", "dog"], seg="[SEG]")  ->  "cat is [SEG] and dog is [SEG]."
    """
    clauses = [fill(template.removesuffix("."), name=name, seg=seg) for name in names]
    return f"{enumerate_words(clauses)}."


def fill_question(template: str, text: str) -> str:
    """Fill a question template: noun phrases (`{name}`) in lower case, sentences unchanged."""
    return fill(template, name=text.lower(), text=text)


def enumerate_words(words: Sequence[str]) -> str:
    """Join words: ["a"] -> "a", ["a", "b"] -> "a and b", ["a", "b", "c"] -> "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
