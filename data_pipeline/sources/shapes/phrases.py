"""Templates and vocabulary of the questions about shapes and their answers."""

from __future__ import annotations

import string

from data_pipeline.sources.shapes.scene import COLOURS, SHAPES, SIZES

PHRASINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "names": (
        ("Segment {x}.", "{list}."),
        ("Where {is} {x}?", "{here} {places}."),
        ("Can you show me {x}?", "Sure, {list}."),
        ("Please find {x} in the picture.", "Found: {places}."),
        ("Which pixels of the image belong to {x}?", "{here} {places}."),
        ("Mark {x}, please.", "Sure, {list}."),
    ),
    "attribute": (
        ("Segment all {xs}.", "{there} {n}: {list}."),
        ("Which {xs} can you see?", "I see {places}."),
        ("Find every {x}.", "Found: {places}."),
        ("Are there any {xs}?", "Yes, {list}."),
        ("Please show me the {xs}.", "{here} {places}."),
        ("Mark the {xs} in the image.", "{there} {n}: {list}."),
    ),
    "count": (
        ("How many {xs} are there?", "{there} {n}: {list}."),
        ("Count the {xs}, please.", "{n}: {list}."),
        ("What is the number of {xs} in the picture?", "The number is {n}: {list}."),
    ),
    "place": (
        ("What is {place} of the picture?", "I see {list}."),
        ("Segment everything {place} of the image.", "{there} {n}: {list}."),
        ("Are there any objects {place}?", "Yes, {list}."),
    ),
    "half": (
        ("Which {xs} are in the {half} half?", "{list} {is} in the {half} half."),
        ("Segment the {xs} in the {half} half of the picture.", "{there} {n}: {list}."),
        ("Find every {x} in the {half} half of the image.", "Found: {places}."),
        ("What {xs} do you see in the {half} half?", "I see {places}."),
    ),
    "relation": (
        ("Which {xs} are {where} {other}?", "{list} {is} {where} {other}."),
        ("Segment the {xs} {where} {other}.", "{there} {n}: {list}."),
        ("Can you find every {x} {where} {other}?", "Yes, {list}."),
        ("What {xs} do you see {where} {other}?", "I see {places}."),
    ),
    "superlative": (
        ("Segment the {most} {x}.", "The {most} {x} is {list}."),
        ("Which {x} is the {most}?", "It is {places}."),
        ("Where is the {most} {x}?", "Here is {places}."),
        ("Can you show me the {most} {x}?", "Sure, {list}."),
    ),
    "all but": (
        ("Segment everything except {x}.", "Everything else: {list}."),
        ("Show me all but {x}.", "{here} {places}."),
        ("What is in the picture besides {x}?", "I see {places}."),
        ("Mark everything other than {x}.", "Found: {places}."),
    ),
    "everything": (
        ("Segment everything.", "{there} {n}: {list}."),
        ("Mark every object in the image.", "{there} {n}: {list}."),
        ("What is in the picture?", "I see {places}."),
        ("Show me all of it.", "{here} {places}."),
        ("Find everything that you can see.", "Found: {places}."),
    ),
}
"""Pairs of question and answer templates by kind; {places} lists targets with their positions."""

NOTHING = "There is no such object."
"""Answer to a question without targets."""

GENERIC = ("object", "thing", "shape")
"""Nouns for a thing of any shape."""

SIDES = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "up": ("above", "higher than"),
    "down": ("below", "lower than"),
}
HALVES = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
"""Names of the halves of the image in the directions of `SIDES`."""

PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("at the left", "in the middle", "at the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
"""Names of the nine cells of the image, row by row; the centre of a thing determines its cell."""

SUPERLATIVES = {
    "left": ("leftmost",),
    "right": ("rightmost",),
    "up": ("topmost", "highest"),
    "down": ("bottommost", "lowest"),
    "large": ("largest", "biggest"),
    "small": ("smallest", "tiniest"),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
VERBS = (
    {"is": "is", "here": "Here is", "there": "There is"},
    {"is": "are", "here": "Here are", "there": "There are"},
)
"""Verb forms for one target and for several targets."""


def plural(noun: str) -> str:
    """Return the plural of a noun: circle -> circles, cross -> crosses."""
    return f"{noun}{'es' if noun.endswith('s') else 's'}"


def words() -> list[str]:
    """Return all words and punctuation of questions and answers, in lower case and sorted."""
    texts = [text for pairs in PHRASINGS.values() for pair in pairs for text in pair]
    texts = [text for t in texts for text, *_ in string.Formatter().parse(t)] + [NOTHING, "and ,"]
    texts += [text for forms in VERBS for text in forms.values()]
    texts += [
        text for choice in (SIDES, SUPERLATIVES) for names in choice.values() for text in names
    ]
    texts += [*HALVES.values(), *(place for row in PLACES for place in row)]
    nouns = (*GENERIC, *SHAPES)
    texts += [text for noun in nouns for text in (noun, plural(noun))]
    texts += [*COLOURS, *SIZES, *NUMBERS[1:]]
    split = "".join(f" {c} " if c in string.punctuation else c for c in " ".join(texts).lower())
    return sorted(set(split.split()))
