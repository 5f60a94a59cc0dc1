"""Questions about drawn scenes that a model has never seen, its answers, and how right they are."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from data_pipeline.draws import Draws
from data_pipeline.example import SEG
from data_pipeline.sources.shapes.dataset import Drawn, Shapes
from data_pipeline.sources.shapes.questions import Question
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.matching import NOBODY, match
from pixellm_jax.evaluation.metrics import Scores, Sums, measure, merge, scores, tally
from pixellm_jax.inference.answer import Answer
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.text.answer import MARKER

CANDIDATES = 8
"""Scenes that are looked at for each that is taken."""

_SURE = 16.0
"""Logit of a pixel in a mask of which nothing but its outline is known."""


class Scene(NamedTuple):
    """A scene to be asked about. `number`: its place in the split. masks: of all its things."""

    number: int
    picture: UInt8[np.ndarray, "y x 3"]
    masks: Bool[np.ndarray, "m y x"]
    questions: tuple[Question, ...]


class Mark(NamedTuple):
    """How right a target is. note: its IoU in words."""

    iou: float
    note: str


class Reply(NamedTuple):
    """A question and what came of it.

    predicted, truth: the i-th of them belong together; one is empty where a target was missed, or
    where there is one too many. Targets of the answer come first, in its order. sums: of `metrics`.
    """

    question: Question
    answer: Answer
    predicted: Bool[np.ndarray, "m y x"]
    truth: Bool[np.ndarray, "m y x"]
    sums: tuple[Sums, ...]

    @property
    def giou(self) -> float:
        """Mean IoU of the targets; of a question without any, 1 if the answer has none, too."""
        return scores(merge(*self.sums)).giou if self.sums else 1.0

    @property
    def marks(self) -> list[Mark]:
        """Of every pair of `predicted` and `truth`."""
        marks = []
        for i, part in enumerate(self.sums):
            iou = scores(part).giou
            extra, missed = not self.truth[i].any(), i >= len(self.answer.masks)
            note = "missed" if missed else "one too many" if extra else f"IoU {iou:.2f}"
            marks.append(Mark(iou, note))
        return marks

    @property
    def text(self) -> str:
        """The answer as a sentence: the tokenizer of the shapes has no capital letters."""
        return self.answer.text[:1].upper() + self.answer.text[1:]

    @property
    def expected(self) -> str:
        """The right answer, in the same form."""
        return self.question.answer.replace(SEG, MARKER)

    @property
    def same_words(self) -> bool:
        """Whether the answer is the right one to the word."""
        return _words(self.text) == _words(self.expected)

    @property
    def right_number(self) -> bool:
        """Whether there are as many targets as there should be."""
        return len(self.answer.masks) == len(self.question.targets)


class Summary(NamedTuple):
    """How right many replies are.

    scores: over all targets. right_number: replies with as many targets as there should be. absent:
    questions about what is not there; absent_right: those of them answered without a target.
    """

    scores: Scores
    questions: int
    right_number: int
    absent: int
    absent_right: int


def choose(shapes: Shapes, count: int, *, seed: int, fewest: int) -> list[Scene]:
    """Draws `count` scenes with as many kinds of questions as may be; the model has no part in it.

    Of `CANDIDATES` times as many scenes, those with at least `fewest` things are kept; each next
    one is that whose questions are of the kinds that were asked least so far.

    Raises:
        InputError: there are fewer.
    """
    order = Draws(seed=seed, epoch=0, index=0).permutation(len(shapes))
    drawn = dict[int, Drawn]()
    for tried, number in enumerate(order):
        if tried >= CANDIDATES * count and len(drawn) >= count:
            break
        scene = shapes.draw(number)
        if len(scene.scene.things) >= fewest:
            drawn[number] = scene
    if len(drawn) < count:
        raise InputError(f"{count} scenes are more than the {len(drawn)} there are; ask for fewer")
    asked = Counter[str]()
    chosen = list[Scene]()

    def gain(number: int) -> float:
        kinds = Counter(question.kind for question in drawn[number].questions)
        return sum(1 / (1 + asked[kind] + i) for kind in kinds for i in range(kinds[kind]))

    for _ in range(count):
        best = max(drawn, key=gain)
        asked.update(question.kind for question in drawn[best].questions)
        chosen.append(_scene(best, drawn.pop(best)))
    return chosen


def answer_all(predictor: Predictor, scenes: Sequence[Scene]) -> list[list[Reply]]:
    """Asks every question of every scene; replies scene by scene."""
    pairs = [(scene.picture, q.question) for scene in scenes for q in scene.questions]
    answers = iter(predictor.batch(pairs, progress=sys.stderr.isatty()))
    return [[compare(scene, q, next(answers)) for q in scene.questions] for scene in scenes]


def compare(scene: Scene, question: Question, answer: Answer) -> Reply:
    """Finds out which target of the answer is which of the question's."""
    truth = scene.masks[list(question.targets)]
    logits = np.where(answer.masks, _SURE, -_SURE)
    pairs = match(logits, truth.astype(np.uint8)).tolist()
    pairs.sort(key=lambda pair: (pair[0] == NOBODY, pair))  # as the answer names them, then missed
    nothing = np.zeros((1, *scene.picture.shape[:2]), bool)
    aligned = [
        np.concatenate([nothing, *(nothing if i == NOBODY else masks[i : i + 1] for i in chosen)])
        for masks, chosen in ((answer.masks, [p for p, _ in pairs]), (truth, [t for _, t in pairs]))
    ]
    predicted, right = (masks[1:] for masks in aligned)
    sums = tuple(
        tally(measure(own, true.view(np.uint8)), extra=np.bool_(target == NOBODY))
        for own, true, (_, target) in zip(predicted, right, pairs, strict=True)
    )
    return Reply(question, answer, predicted, right, sums)


def summarise(replies: Iterable[Reply]) -> Summary:
    """Scores of all of them together."""
    replies = list(replies)
    absent = [reply for reply in replies if not reply.question.targets]
    return Summary(
        scores=scores(merge(*(part for reply in replies for part in reply.sums))),
        questions=len(replies),
        right_number=sum(reply.right_number for reply in replies),
        absent=len(absent),
        absent_right=sum(reply.right_number for reply in absent),
    )


def number_markers(text: str, markers: Sequence[Sequence[int]]) -> list[str]:
    """Text between the markers of targets: "A [SEG] and a [SEG]." -> ["A ", " and a ", "."]."""
    cuts = [0, *(int(place) for marker in markers for place in marker), len(text)]
    return [text[start:stop] for start, stop in zip(cuts[::2], cuts[1::2], strict=True)]


def _scene(number: int, drawn: Drawn) -> Scene:
    picture = np.asarray(Image.open(io.BytesIO(drawn.image)).convert("RGB"))
    return Scene(number, picture, drawn.scene.masks(), drawn.questions)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
