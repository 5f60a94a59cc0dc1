"""Questions about a scene of shapes, and their answers, in the manner of MUSE.

A question is asked only where its answer is beyond doubt: what is compared differs by a margin. The
form of an answer follows from that of its question, so that it can be learned exactly. It names
every target with colour and shape, each followed by `{seg}`: in the order of the question, or in
that of `COLOURS` and then of `SHAPES`. Half of the answers tell in which ninth of the image each
target lies: a model that need not say so forgets where things are long before it learns to compare
places.
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
    COLOURS,
    MARGIN,
    NEAR,
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
"""Kinds of questions with their sampling weights; kinds that a scene rules out are sampled again.

names        one to four things by colour and shape
attribute    all that have a colour, a shape, a size, or a size and a shape
count        how many of them there are
place        what is in one ninth of the image
half         all, or all of a colour or shape, in one half of the image
relation     the same on one side of a thing
superlative  the largest, smallest, or the last towards a side, of all or of a colour or shape
all but      the rest
everything   all of them
absent       names, an attribute, a count or a superlative of what is not in the image: no targets
nowhere      a ninth, a half or a side where nothing like it is: no targets
"""

TRAINED_KINDS = {**KINDS, "absent": 13, "nowhere": 12}
"""The same for training: what is rare and hard is seen more often. With the shares of `KINDS` a
model learned that a relation always has a target.
"""

MOST_TARGETS, MOST_NAMES = 6, 4
"""Maximum number of targets of a question, and of names in a question that asks by name."""

TARGETS_PER_QUESTION = 3
"""Most targets of the questions about a scene, on average: the budget of a batch is known."""

TRIES = 8
"""Questions of a kind that are tried before another kind is."""

_ORDER = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
"""Order of the targets in an answer, unless the question implies one."""


class Question(NamedTuple):
    """kind: one of `KINDS`. targets: indices of things, in the order of the answer."""

    kind: str
    question: str
    answer: str
    targets: tuple[int, ...]


class Noun(NamedTuple):
    """Common noun of several things, with their attributes; None: any."""

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

    def fits(self, thing: Thing) -> bool:
        own = (self.colour, self.shape, self.size)
        return all(
            wanted in (None, has)
            for wanted, has in zip(own, (thing.colour, thing.shape, thing.size), strict=True)
        )

    def among(self, scene: Scene) -> list[int]:
        return [i for i, thing in enumerate(scene.things) if self.fits(thing)]


class _Asked(NamedTuple):
    """About what a question is: words for the phrasings, and the targets in any order."""

    words: dict[str, str]
    targets: Sequence[int]


def ask(
    scene: Scene,
    sampler: Sampler,
    count: int,
    *,
    kinds: Mapping[str, int] = KINDS,
    most: int = MOST_TARGETS,
) -> tuple[Question, ...]:
    """Sample `count` questions about a scene, all different, of at most `most` targets each.

    `kinds`: how often each is tried. Several questions together have at most
    `TARGETS_PER_QUESTION` * `count` targets.
    """
    found: dict[str, Question] = {}
    room = max(most, TARGETS_PER_QUESTION * count)
    while len(found) < count:
        kind = _weighted(kinds, sampler)
        later = count - len(found) - 1  # one target for each of them
        question = _question(kind, scene, sampler, min(most, room - later))
        if question is not None and question.question not in found:
            found[question.question] = question
            room -= len(question.targets)
    return tuple(found.values())


def _question(kind: str, scene: Scene, sampler: Sampler, most: int) -> Question | None:
    """A question of a kind with 1 to `most` targets, none if that is what the kind says."""
    present, forms = kind in _PRESENT, _WITHOUT_TARGETS.get(kind, {})
    for _ in range(TRIES):
        form = kind if present else _pick(list(forms), sampler)
        asked = (_PRESENT if present else forms)[form](scene, sampler)
        if asked is not None and present <= len(asked.targets) <= present * most:
            question, answer = _pick(PHRASINGS[form], sampler)
            return _write(kind, question, answer if present else NOTHING, asked, scene)
    return None


def _write(kind: str, question: str, answer: str, asked: _Asked, scene: Scene) -> Question:
    targets = list(asked.targets)
    if kind != "names":
        targets.sort(key=lambda i: _ORDER.index(scene.things[i].name))
    named = [f"the {scene.things[i].name} {SEG}" for i in targets]
    cells = [cell(scene, scene.things[i]) for i in targets]
    placed = [f"{name} {PLACES[y][x]}" for name, (y, x) in zip(named, cells, strict=True)]
    lists = {k: enumerate_words(v) for k, v in (("list", named), ("places", placed)) if v}
    words = VERBS[len(targets) > 1] | asked.words | {"n": NUMBERS[len(targets)]} | lists
    question, answer = (text.format(**words) for text in (question, answer))
    return Question(kind, _sentence(question), _sentence(answer), tuple(targets))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _names(scene: Scene, sampler: Sampler) -> _Asked:
    count = 1 + sampler.index(min(MOST_NAMES, len(scene.things)))
    chosen = sampler.subset(len(scene.things), count)
    return _Asked({"x": enumerate_words([f"the {scene.things[i].name}" for i in chosen])}, chosen)


def _absent_name(scene: Scene, sampler: Sampler) -> _Asked:
    """A colour and a shape that do not go together here; often each is there by itself."""
    here = sampler.coin()
    colours = [thing.colour for thing in scene.things] if here else list(COLOURS)
    shapes = [thing.shape for thing in scene.things] if here else list(SHAPES)
    colour, shape = _pick(colours, sampler), _pick(shapes, sampler)
    return _Asked({"x": f"the {colour} {shape}"}, Noun(shape, colour, shape).among(scene))


def _group(scene: Scene, sampler: Sampler) -> _Asked:
    noun = _sample_noun(scene, sampler)
    return _Asked({"x": noun.singular, "xs": noun.plural}, noun.among(scene))


def _absent_group(scene: Scene, sampler: Sampler) -> _Asked:
    noun = _sample_noun(None, sampler)
    most = _pick(list(SIDES if noun.size else SUPERLATIVES), sampler)
    words = {"x": noun.singular, "xs": noun.plural, "most": _pick(SUPERLATIVES[most], sampler)}
    return _Asked(words, noun.among(scene))


def _relation(scene: Scene, sampler: Sampler) -> _Asked | None:
    noun = _sample_wide_noun(scene, sampler)
    reference = sampler.index(len(scene.things))
    side = _pick(list(SIDES), sampler)
    margin = MARGIN * len(scene.owner) / UNIT
    others = [i for i in noun.among(scene) if i != reference]
    ahead = [along(side, scene.things[i]) - along(side, scene.things[reference]) for i in others]
    if not others or min(map(abs, ahead)) < margin:
        return None
    words = {
        "x": noun.singular,
        "xs": noun.plural,
        "where": _pick(SIDES[side], sampler),
        "other": _reference(scene, reference, sampler),
    }
    return _Asked(words, [i for i, distance in zip(others, ahead, strict=True) if distance > 0])


def _half(scene: Scene, sampler: Sampler) -> _Asked | None:
    noun = _sample_wide_noun(scene, sampler)
    side = _pick(list(SIDES), sampler)
    among, middle = noun.among(scene), len(scene.owner) / 2
    inside = [
        along(side, scene.things[i]) - along(side, scene.things[i]._replace(x=middle, y=middle))
        for i in among
    ]
    if min(map(abs, inside), default=0) < MARGIN / 2 * len(scene.owner) / UNIT:
        return None
    words = {"x": noun.singular, "xs": noun.plural, "half": HALVES[side]}
    return _Asked(words, [i for i, distance in zip(among, inside, strict=True) if distance > 0])


def _ninth(scene: Scene, sampler: Sampler) -> _Asked | None:
    side, thing = len(scene.owner), scene.things[sampler.index(len(scene.things))]
    here, there = cell(scene, thing), divmod(sampler.index(9), 3)
    row, column = here if sampler.coin() else there
    inside = [min(depth(t.y, row, side), depth(t.x, column, side)) for t in scene.things]
    if min(map(abs, inside)) < NEAR * side / UNIT:
        return None
    words = {"place": PLACES[row][column]}
    return _Asked(words, [i for i, deep in enumerate(inside) if deep > 0])


def _reference(scene: Scene, number: int, sampler: Sampler) -> str:
    """A thing by colour and shape; where its shape is the only one, at times by shape alone."""
    thing = scene.things[number]
    alone = len(Noun(thing.shape, shape=thing.shape).among(scene)) == 1
    return f"the {thing.shape if alone and sampler.coin() else thing.name}"


def _superlative(scene: Scene, sampler: Sampler) -> _Asked | None:
    noun = _sample_wide_noun(scene, sampler)
    most = _pick(list(SIDES if noun.size else SUPERLATIVES), sampler)
    among = [scene.things[i] for i in noun.among(scene)]
    if len(among) < 2:
        return None
    first = max(among, key=lambda thing: along(most, thing))
    others = [thing for thing in among if thing is not first]
    if not all(exceeds(most, first, other, len(scene.owner) / UNIT) for other in others):
        return None
    words = {"x": noun.singular, "most": _pick(SUPERLATIVES[most], sampler)}
    return _Asked(words, [scene.things.index(first)])


def _all_but(scene: Scene, sampler: Sampler) -> _Asked:
    if sampler.coin():
        thing = scene.things[sampler.index(len(scene.things))]
        noun = Noun(thing.shape, thing.colour, thing.shape)
    else:
        noun = _sample_noun(scene, sampler)
    excluded = noun.among(scene)
    rest = [i for i in range(len(scene.things)) if i not in excluded]
    return _Asked({"x": f"the {noun.plural if len(excluded) > 1 else noun.singular}"}, rest)


def _everything(scene: Scene, sampler: Sampler) -> _Asked:
    return _Asked({}, range(len(scene.things)))


_PRESENT: dict[str, Callable[[Scene, Sampler], _Asked | None]] = {
    "names": _names,
    "attribute": _group,
    "count": _group,
    "place": _ninth,
    "half": _half,
    "relation": _relation,
    "superlative": _superlative,
    "all but": _all_but,
    "everything": _everything,
}
_WITHOUT_TARGETS: dict[str, dict[str, Callable[[Scene, Sampler], _Asked | None]]] = {
    "absent": {
        "names": _absent_name,
        "attribute": _absent_group,
        "count": _absent_group,
        "superlative": _absent_group,
    },
    "nowhere": {"place": _ninth, "half": _half, "relation": _relation},
}


def _sample_noun(scene: Scene | None, sampler: Sampler) -> Noun:
    """Sample a noun that names a thing of the scene, or any thing, together with others."""
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
    """Sample a noun as `_sample_noun` does, but mostly one for any thing."""
    narrow, generic = _sample_noun(scene, sampler), Noun(_pick(GENERIC, sampler))
    return generic if sampler.index(3) else narrow


def _pick(options: Sequence[T], sampler: Sampler) -> T:
    return options[sampler.index(len(options))]


def _weighted(weights: Mapping[T, int], sampler: Sampler) -> T:
    place = sampler.index(sum(weights.values()))
    for thing, weight in weights.items():
        place -= weight
        if place < 0:
            return thing
    raise ValueError("weights must be positive")
