"""What a question about shapes asks for, found again from its text and the record of the scene."""

from __future__ import annotations

import re
from typing import NamedTuple

COLOURS = "red|yellow|green|blue|purple|black"
SHAPES = "circle|square|triangle|cross"
NAME = rf"the (?:{COLOURS}) (?:{SHAPES})"
NOUN = rf"(?:small |large )?(?:(?:{COLOURS}) )?(?:{SHAPES}|object|thing|shape)"
ONE, MANY = rf"({NOUN})", rf"({NOUN})(?:s|(?<=cross)es)"
MARGIN, RATIO = 16.0, 1.25  # of 96 pixels

BEFORE = {  # what is smaller in this, with this sign, lies on that side
    "left of": (1, "x"),
    "to the left of": (1, "x"),
    "right of": (-1, "x"),
    "to the right of": (-1, "x"),
    "above": (1, "y"),
    "higher than": (1, "y"),
    "below": (-1, "y"),
    "lower than": (-1, "y"),
}
FIRST = {  # what is smallest in this, with this sign
    "leftmost": (1, "x"),
    "rightmost": (-1, "x"),
    "topmost": (1, "y"),
    "highest": (1, "y"),
    "bottommost": (-1, "y"),
    "lowest": (-1, "y"),
    "largest": (-1, "radius"),
    "biggest": (-1, "radius"),
    "smallest": (1, "radius"),
    "tiniest": (1, "radius"),
}
NAMES = rf"({NAME}(?:(?:, | and ){NAME})*)"
WHERE, OTHER = f"({'|'.join(BEFORE)})", rf"the ((?:(?:{COLOURS}) )?(?:{SHAPES}))"
PLACE = "(?:at the|in the) (middle|(?:top|bottom)(?: left| right)?|left|right)"
HALF = "(left|right|top|bottom)"
MOST = f"({'|'.join(FIRST)})"

FORMS = {
    "names": [
        rf"segment {NAMES}\.",
        rf"where (?:is|are) {NAMES}\?",
        rf"can you show me {NAMES}\?",
        rf"please find {NAMES} in the picture\.",
        rf"which pixels of the image belong to {NAMES}\?",
        rf"mark {NAMES}, please\.",
    ],
    "attribute": [
        rf"segment all {MANY}\.",
        rf"which {MANY} can you see\?",
        rf"find every {ONE}\.",
        rf"are there any {MANY}\?",
        rf"please show me the {MANY}\.",
        rf"mark the {MANY} in the image\.",
    ],
    "count": [
        rf"how many {MANY} are there\?",
        rf"count the {MANY}, please\.",
        rf"what is the number of {MANY} in the picture\?",
    ],
    "relation": [
        rf"which {MANY} are {WHERE} {OTHER}\?",
        rf"segment the {MANY} {WHERE} {OTHER}\.",
        rf"can you find every {ONE} {WHERE} {OTHER}\?",
        rf"what {MANY} do you see {WHERE} {OTHER}\?",
    ],
    "place": [
        rf"what is {PLACE} of the picture\?",
        rf"segment everything {PLACE} of the image\.",
        rf"are there any objects {PLACE}\?",
    ],
    "half": [
        rf"which {MANY} are in the {HALF} half\?",
        rf"segment the {MANY} in the {HALF} half of the picture\.",
        rf"find every {ONE} in the {HALF} half of the image\.",
        rf"what {MANY} do you see in the {HALF} half\?",
    ],
    "superlative": [
        rf"segment the {MOST} {ONE}\.",
        rf"which (?P<noun>{NOUN}) is the (?P<most>{'|'.join(FIRST)})\?",
        rf"where is the {MOST} {ONE}\?",
        rf"can you show me the {MOST} {ONE}\?",
    ],
    "all but": [
        rf"segment everything except the {ONE}(s|es)?\.",
        rf"show me all but the {ONE}(s|es)?\.",
        rf"what is in the picture besides the {ONE}(s|es)?\?",
        rf"mark everything other than the {ONE}(s|es)?\.",
    ],
    "everything": [
        r"segment everything\.",
        r"mark every object in the image\.",
        r"what is in the picture\?",
        r"show me all of it\.",
        r"find everything that you can see\.",
    ],
}


class Truth(NamedTuple):
    """form: of `FORMS`. targets: what must be segmented. doubt: why one could disagree."""

    form: str
    targets: set[int]
    doubt: str = ""


def truth(question, things, side):
    """The truth of a question; fails if its text is not exactly one of the known ones."""
    text = question.lower()
    found = [
        (form, match)
        for form, patterns in FORMS.items()
        for pattern in patterns
        if (match := re.fullmatch(pattern, text))
    ]
    assert len(found) == 1, (question, found)
    form, match = found[0]
    scale = side / 96
    match form:
        case "names":
            asked = re.findall(NAME, match[1])
            assert len(set(asked)) == len(asked), question
            return Truth(form, {i for name in asked for i in called(name[4:], things)})
        case "attribute" | "count":
            return Truth(form, called(match[1], things))
        case "relation":
            return relation(match[1], match[2], match[3], things, scale)
        case "place":
            return place(match[1], things, side)
        case "half":
            return half(match[1], match[2], things, side)
        case "superlative":
            named = match.groupdict()
            return superlative(
                named.get("most", match[1]), named.get("noun", match[2]), things, scale
            )
        case "all but":
            without = called(match[1], things)
            wrong = "" if bool(match[2]) == (len(without) > 1) else "singular for plural"
            return Truth(form, set(range(len(things))) - without, wrong if without else "not there")
    return Truth(form, set(range(len(things))))


def called(noun, things):
    """Things that every word of a noun is true of."""
    words = noun.split()
    assert words, noun
    return {
        i
        for i, thing in enumerate(things)
        if all(
            word in ("object", "thing", "shape", thing.colour, thing.shape, thing.size)
            for word in words
        )
    }


def relation(noun, where, other, things, scale):
    reference = called(other, things)
    if len(reference) != 1:
        return Truth("relation", set(), f"{len(reference)} times {other}")
    (center,) = reference
    sign, axis = BEFORE[where]
    distances = {
        i: sign * (getattr(things[center], axis) - getattr(things[i], axis))
        for i in called(noun, things) - reference
    }
    close = [i for i, distance in distances.items() if abs(distance) < MARGIN * scale]
    targets = {i for i, distance in distances.items() if distance > 0}
    return Truth("relation", targets, f"{close} too close" if close else "")


def place(where, things, side):
    """The ninth of the picture."""
    names = (("top", "left"), ("", ""), ("bottom", "right"))
    row, column = (
        next((i for i, pair in enumerate(names) if pair[axis] and pair[axis] in where), 1)
        for axis in (0, 1)
    )

    def holds(centre, cell, grow):
        """Whether the third, larger by `grow` pixels, holds a centre."""
        low = cell * side / 3 - grow if cell else -1
        high = (cell + 1) * side / 3 + grow if cell < 2 else side + 1
        return low < centre < high

    def inside(grow):
        return {
            i
            for i, thing in enumerate(things)
            if holds(thing.y, row, grow) and holds(thing.x, column, grow)
        }

    near = 3.9 * side / 96
    doubt = inside(near) - inside(-near)
    return Truth("place", inside(0), f"{doubt} near an edge" if doubt else "")


def half(noun, where, things, side):
    axis = "x" if where in ("left", "right") else "y"
    sign = 1 if where in ("left", "top") else -1
    depths = {i: sign * (side / 2 - getattr(things[i], axis)) for i in called(noun, things)}
    doubt = [i for i, depth in depths.items() if abs(depth) < MARGIN / 2 * side / 96]
    targets = {i for i, depth in depths.items() if depth > 0}
    return Truth("half", targets, f"{doubt} near the middle" if doubt else "")


def superlative(most, noun, things, scale):
    sign, axis = FIRST[most]
    ranked = sorted((sign * getattr(things[i], axis), i) for i in called(noun, things))
    if not ranked:
        return Truth("superlative", set())
    if len(ranked) == 1:
        return Truth("superlative", {ranked[0][1]}, "no other one")
    (first, winner), (second, _) = ranked[:2]
    if axis == "radius":
        big, little = sorted((abs(first), abs(second)), reverse=True)
        doubt = "" if big >= RATIO * little else "about as large"
    else:
        doubt = "" if second - first >= MARGIN * scale else "too close"
    return Truth("superlative", {winner}, doubt)
