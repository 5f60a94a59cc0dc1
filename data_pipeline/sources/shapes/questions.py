"""Generator of MUSE-like questions about a scene of shapes, with their answers.

A question is generated only if its answer is unambiguous: whatever it compares differs by a margin.
The question template determines the answer template, so that answers can be learned exactly. An
answer names every target by colour and shape, each followed by `{seg}`: in the order of the
question, or ordered by `COLOURS` and then `SHAPES`. Half of the answers state the cell (ninth of
the image) of each target: without this supervision, a model forgets where things are long before
it learns to compare positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from data_pipeline.example import SEG
from data_pipeline.sampling import Sampler
from data_pipeline.sources.shapes.phrases import (
    GENERIC,
    HALVES,
    NOTHING,
    NUMBERS,
    PHRASINGS,
    PLACES,
    SIDES,
    SUPERLATIVES,
    VERBS,
    plural,
)
from data_pipeline.sources.shapes.scene import (
    CELL_MARGIN,
    COLOURS,
    MARGIN,
    SHAPES,
    SIZES,
    UNIT,
    Scene,
    Thing,
    along,
    cell,
    depth,
    exceeds,
)
from data_pipeline.templates import enumerate_words

T = TypeVar("T")

KINDS = {
    "names": 14,
    "attribute": 15,
    "count": 12,
    "place": 8,
    "half": 8,
    "relation": 17,
    "superlative": 12,
    "all but": 9,
    "everything": 9,
    "absent": 12,
    "nowhere": 4,
}
"""Sampling weights of the kinds of questions; a kind that a scene rules out is resampled.

names        one to four things, by colour and shape
attribute    all things of a colour, a shape, a size, or a size and a shape
count        the number of such things
place        all things in one cell (ninth) of the image
half         all things, or all of an attribute, in one half of the image
relation     all things, or all of an attribute, on one side of another thing
superlative  the largest, smallest or outermost thing, of all or of an attribute
all but      all things except the named ones
everything   all things
absent       a name, attribute, count or superlative of things that are not there: no targets
nowhere      a cell, half or side without matching things: no targets
"""

TRAIN_KINDS = {**KINDS, "absent": 13, "nowhere": 12}
"""Sampling weights for training, where rare and hard kinds are more frequent.

With the weights of `KINDS`, a model learned that a relation always has a target.
"""

MAX_TARGETS = 6
"""Maximum number of targets of a question."""

MAX_NAMES = 4
"""Maximum number of things in a question of kind "names"."""

TARGETS_PER_QUESTION = 3
"""Maximum mean number of targets per question of a scene, which bounds the targets of a batch."""

MAX_ATTEMPTS = 8
"""Number of attempts at a question of one kind before another kind is sampled."""

_ORDER = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
"""Order of the targets in an answer, unless the question implies an order."""


class Question(NamedTuple):
    """A question about a scene, with its answer.

    Attributes:
        kind: one of `KINDS`.
        targets: indices of things, in the order of the answer.
    """

    kind: str
    question: str
    answer: str
    targets: tuple[int, ...]


class Noun(NamedTuple):
    """A noun with the attributes of the things it describes; None matches any attribute."""

    word: str
    colour: str | None = None
    shape: str | None = None
    size: str | None = None

    @property
    def singular(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.word) if word)

    @property
    def plural(self) -> str:
        return plural(self.singular)

    def matches(self, thing: Thing) -> bool:
        expected = (self.colour, self.shape, self.size)
        actual = (thing.colour, thing.shape, thing.size)
        return all(e in (None, a) for e, a in zip(expected, actual, strict=True))

    def matching(self, scene: Scene) -> list[int]:
        return [i for i, thing in enumerate(scene.things) if self.matches(thing)]


class _Content(NamedTuple):
    """Content of a question: values of the template fields, and the targets in any order."""

    words: dict[str, str]
    targets: Sequence[int]


def sample_questions(
    scene: Scene,
    sampler: Sampler,
    count: int,
    *,
    kinds: Mapping[str, int] = KINDS,
    max_targets: int = MAX_TARGETS,
) -> tuple[Question, ...]:
    """Sample `count` distinct questions about a scene with at most `max_targets` targets each.

    All questions together have at most max(`max_targets`, `TARGETS_PER_QUESTION` * `count`)
    targets. `kinds` are the sampling weights of the kinds.
    """
    questions: dict[str, Question] = {}
    capacity = max(max_targets, TARGETS_PER_QUESTION * count)
    while len(questions) < count:
        kind = _weighted(kinds, sampler)
        reserved = count - len(questions) - 1  # one target for each question still to come
        question = _question(kind, scene, sampler, min(max_targets, capacity - reserved))
        if question is not None and question.question not in questions:
            questions[question.question] = question
            capacity -= len(question.targets)
    return tuple(questions.values())


def _question(kind: str, scene: Scene, sampler: Sampler, max_targets: int) -> Question | None:
    """Sample a question of a kind; None if no attempt succeeds.

    It has 1 to `max_targets` targets, or none if the kind is "absent" or "nowhere".
    """
    present = kind in _PRESENT
    forms = _WITHOUT_TARGETS.get(kind, {})
    for _ in range(MAX_ATTEMPTS):
        form = kind if present else _pick(list(forms), sampler)
        content = (_PRESENT if present else forms)[form](scene, sampler)
        if content is not None and present <= len(content.targets) <= present * max_targets:
            question, answer = _pick(PHRASINGS[form], sampler)
            return _write(kind, question, answer if present else NOTHING, content, scene)
    return None


def _write(kind: str, question: str, answer: str, content: _Content, scene: Scene) -> Question:
    targets = list(content.targets)
    if kind != "names":
        targets.sort(key=lambda i: _ORDER.index(scene.things[i].name))
    named = [f"the {scene.things[i].name} {SEG}" for i in targets]
    cells = [cell(scene, scene.things[i]) for i in targets]
    placed = [f"{name} {PLACES[y][x]}" for name, (y, x) in zip(named, cells, strict=True)]
    lists = {k: enumerate_words(v) for k, v in (("list", named), ("places", placed)) if v}
    words = VERBS[len(targets) > 1] | content.words | {"n": NUMBERS[len(targets)]} | lists
    question, answer = (text.format(**words) for text in (question, answer))
    return Question(kind, _sentence(question), _sentence(answer), tuple(targets))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _names(scene: Scene, sampler: Sampler) -> _Content:
    count = 1 + sampler.index(min(MAX_NAMES, len(scene.things)))
    chosen = sampler.subset(len(scene.things), count)
    return _Content({"x": enumerate_words([f"the {scene.things[i].name}" for i in chosen])}, chosen)


def _absent_name(scene: Scene, sampler: Sampler) -> _Content:
    """Combine a colour and a shape, half of the time of things in the scene; kept if absent."""
    from_scene = sampler.coin()
    colours = [thing.colour for thing in scene.things] if from_scene else list(COLOURS)
    shapes = [thing.shape for thing in scene.things] if from_scene else list(SHAPES)
    colour, shape = _pick(colours, sampler), _pick(shapes, sampler)
    return _Content({"x": f"the {colour} {shape}"}, Noun(shape, colour, shape).matching(scene))


def _group(scene: Scene, sampler: Sampler) -> _Content:
    noun = _sample_noun(scene, sampler)
    return _Content({"x": noun.singular, "xs": noun.plural}, noun.matching(scene))


def _absent_group(scene: Scene, sampler: Sampler) -> _Content:
    noun = _sample_noun(None, sampler)
    direction = _pick(list(SIDES if noun.size else SUPERLATIVES), sampler)
    superlative = _pick(SUPERLATIVES[direction], sampler)
    words = {"x": noun.singular, "xs": noun.plural, "most": superlative}
    return _Content(words, noun.matching(scene))


def _relation(scene: Scene, sampler: Sampler) -> _Content | None:
    noun = _sample_wide_noun(scene, sampler)
    reference = sampler.index(len(scene.things))
    side = _pick(list(SIDES), sampler)
    margin = MARGIN * len(scene.owner) / UNIT
    others = [i for i in noun.matching(scene) if i != reference]
    ahead = [along(side, scene.things[i]) - along(side, scene.things[reference]) for i in others]
    if not others or min(map(abs, ahead)) < margin:
        return None
    words = {
        "x": noun.singular,
        "xs": noun.plural,
        "where": _pick(SIDES[side], sampler),
        "other": _reference(scene, reference, sampler),
    }
    return _Content(words, [i for i, distance in zip(others, ahead, strict=True) if distance > 0])


def _half(scene: Scene, sampler: Sampler) -> _Content | None:
    noun = _sample_wide_noun(scene, sampler)
    side = _pick(list(SIDES), sampler)
    candidates = noun.matching(scene)
    middle = len(scene.owner) / 2
    inside = [
        along(side, scene.things[i]) - along(side, scene.things[i]._replace(x=middle, y=middle))
        for i in candidates
    ]
    if min(map(abs, inside), default=0) < MARGIN / 2 * len(scene.owner) / UNIT:
        return None
    words = {"x": noun.singular, "xs": noun.plural, "half": HALVES[side]}
    return _Content(
        words, [i for i, distance in zip(candidates, inside, strict=True) if distance > 0]
    )


def _cell(scene: Scene, sampler: Sampler) -> _Content | None:
    side = len(scene.owner)
    thing = scene.things[sampler.index(len(scene.things))]
    any_cell = divmod(sampler.index(9), 3)
    row, column = cell(scene, thing) if sampler.coin() else any_cell
    inside = [min(depth(t.y, row, side), depth(t.x, column, side)) for t in scene.things]
    if min(map(abs, inside)) < CELL_MARGIN * side / UNIT:
        return None
    words = {"place": PLACES[row][column]}
    return _Content(words, [i for i, distance in enumerate(inside) if distance > 0])


def _reference(scene: Scene, number: int, sampler: Sampler) -> str:
    """Refer to a thing by colour and shape, or sometimes by shape alone if its shape is unique."""
    thing = scene.things[number]
    unique = len(Noun(thing.shape, shape=thing.shape).matching(scene)) == 1
    return f"the {thing.shape if unique and sampler.coin() else thing.name}"


def _superlative(scene: Scene, sampler: Sampler) -> _Content | None:
    noun = _sample_wide_noun(scene, sampler)
    direction = _pick(list(SIDES if noun.size else SUPERLATIVES), sampler)
    candidates = [scene.things[i] for i in noun.matching(scene)]
    if len(candidates) < 2:
        return None
    first = max(candidates, key=lambda thing: along(direction, thing))
    others = [thing for thing in candidates if thing is not first]
    if not all(exceeds(direction, first, other, len(scene.owner) / UNIT) for other in others):
        return None
    words = {"x": noun.singular, "most": _pick(SUPERLATIVES[direction], sampler)}
    return _Content(words, [scene.things.index(first)])


def _all_but(scene: Scene, sampler: Sampler) -> _Content:
    if sampler.coin():
        thing = scene.things[sampler.index(len(scene.things))]
        noun = Noun(thing.shape, thing.colour, thing.shape)
    else:
        noun = _sample_noun(scene, sampler)
    excluded = noun.matching(scene)
    rest = [i for i in range(len(scene.things)) if i not in excluded]
    return _Content({"x": f"the {noun.plural if len(excluded) > 1 else noun.singular}"}, rest)


def _everything(scene: Scene, sampler: Sampler) -> _Content:
    return _Content({}, range(len(scene.things)))


_PRESENT: dict[str, Callable[[Scene, Sampler], _Content | None]] = {
    "names": _names,
    "attribute": _group,
    "count": _group,
    "place": _cell,
    "half": _half,
    "relation": _relation,
    "superlative": _superlative,
    "all but": _all_but,
    "everything": _everything,
}
_WITHOUT_TARGETS: dict[str, dict[str, Callable[[Scene, Sampler], _Content | None]]] = {
    "absent": {
        "names": _absent_name,
        "attribute": _absent_group,
        "count": _absent_group,
        "superlative": _absent_group,
    },
    "nowhere": {"place": _cell, "half": _half, "relation": _relation},
}


def _sample_noun(scene: Scene | None, sampler: Sampler) -> Noun:
    """Sample a noun that describes a thing of the scene (None: any thing), and perhaps others."""
    if scene is not None:
        thing = scene.things[sampler.index(len(scene.things))]
        colour, shape, size = thing.colour, thing.shape, thing.size
    else:
        colour, shape, size = (_pick(list(w), sampler) for w in (COLOURS, SHAPES, SIZES))
    generic = _pick(GENERIC, sampler)
    nouns = {
        Noun(shape, shape=shape): 4,
        Noun(generic, colour=colour): 4,
        Noun(generic, size=size): 1,
        Noun(shape, shape=shape, size=size): 2,
    }
    return _weighted(nouns, sampler)


def _sample_wide_noun(scene: Scene, sampler: Sampler) -> Noun:
    """Sample a noun like `_sample_noun`, but mostly a generic one."""
    narrow, generic = _sample_noun(scene, sampler), Noun(_pick(GENERIC, sampler))
    return generic if sampler.index(3) else narrow


def _pick(options: Sequence[T], sampler: Sampler) -> T:
    return options[sampler.index(len(options))]


def _weighted(weights: Mapping[T, int], sampler: Sampler) -> T:
    position = sampler.index(sum(weights.values()))
    for option, weight in weights.items():
        position -= weight
        if position < 0:
            return option
    raise ValueError("weights must be positive")
