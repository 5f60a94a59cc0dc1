"""Quiz about rendered scenes: questions, the answers of a model, and their scores."""

from __future__ import annotations

import io
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from data_pipeline.example import SEG
from data_pipeline.sampling import PhiloxSampler
from data_pipeline.sources.shapes.dataset import GeneratedExample, Shapes
from data_pipeline.sources.shapes.questions import Question
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.matching import UNMATCHED, match
from pixellm_jax.evaluation.metrics import Scores, Sums, measure, merge, scores, tally
from pixellm_jax.inference.answer import Answer
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.text.answer import MARKER

CANDIDATES = 8
"""Scenes considered for each scene that is selected."""

_CERTAIN_LOGIT = 16.0
"""Magnitude of the logits that stand for a binary mask, where the model's logits are not kept."""


class Scene(NamedTuple):
    """A scene of a split, and the questions about it.

    Attributes:
        number: position in the split.
        image: RGB.
        masks: one per object of the scene.
        questions: questions; their targets are indices into `masks`.
    """

    number: int
    image: UInt8[np.ndarray, "y x 3"]
    masks: Bool[np.ndarray, "m y x"]
    questions: tuple[Question, ...]


class TargetScore(NamedTuple):
    """IoU of one target, and the same in words: "IoU 0.93", "missed" or "one too many"."""

    iou: float
    note: str


class Reply(NamedTuple):
    """A question, the model's answer, and the two matched target by target.

    Attributes:
        question: the question.
        answer: the model's answer.
        predicted: masks of the answer in its order, then an empty mask per missed target.
        truth: the matching true masks; empty where the answer has a target too many.
        sums: intersection and union of each pair.
    """

    question: Question
    answer: Answer
    predicted: Bool[np.ndarray, "m y x"]
    truth: Bool[np.ndarray, "m y x"]
    sums: tuple[Sums, ...]

    @property
    def giou(self) -> float:
        """Mean IoU of the targets; 1 where neither question nor answer has a target."""
        return scores(merge(*self.sums)).giou if self.sums else 1.0

    @property
    def target_scores(self) -> list[TargetScore]:
        """Score of every pair of `predicted` and `truth`."""
        result = []
        for i, part in enumerate(self.sums):
            iou = scores(part).giou
            extra = not self.truth[i].any()
            missed = i >= len(self.answer.masks)
            note = "missed" if missed else "one too many" if extra else f"IoU {iou:.2f}"
            result.append(TargetScore(iou, note))
        return result

    @property
    def text(self) -> str:
        """The answer, capitalised: the tokenizer of the shapes has no capital letters."""
        return self.answer.text[:1].upper() + self.answer.text[1:]

    @property
    def expected(self) -> str:
        """The true answer, with the same marker for every target."""
        return self.question.answer.replace(SEG, MARKER)

    @property
    def same_words(self) -> bool:
        """Whether the answer has exactly the words of the true one."""
        return _words(self.text) == _words(self.expected)

    @property
    def right_number(self) -> bool:
        """Whether the answer has as many targets as the question."""
        return len(self.answer.masks) == len(self.question.targets)


class Summary(NamedTuple):
    """Scores over many replies.

    Attributes:
        scores: gIoU and cIoU over all targets.
        questions: number of questions.
        right_number: answers with the right number of targets.
        absent: questions about an object that is not in the scene.
        absent_right: such questions that were answered without a target.
    """

    scores: Scores
    questions: int
    right_number: int
    absent: int
    absent_right: int


class Quiz(NamedTuple):
    """The scenes of a quiz, the replies scene by scene, and their summary.

    Attributes:
        scenes: scenes.
        replies: for each scene, a reply per question.
        summary: scores over all replies.
        seconds: wall time of all answers, compilation included.
    """

    scenes: list[Scene]
    replies: list[list[Reply]]
    summary: Summary
    seconds: float


def select_scenes(shapes: Shapes, count: int, *, seed: int, min_objects: int) -> list[Scene]:
    """Select `count` scenes with as varied kinds of questions as possible, independent of a model.

    Greedy: out of `CANDIDATES` times as many random scenes, each next one is the scene whose
    questions are of the kinds selected least so far.

    Args:
        shapes: split to select from.
        count: number of scenes.
        seed: seed of the random order.
        min_objects: scenes with fewer objects are skipped.

    Raises:
        InputError: the split has fewer such scenes.
    """
    order = PhiloxSampler(seed=seed, epoch=0, index=0).permutation(len(shapes))
    candidates = dict[int, GeneratedExample]()
    for tried, index in enumerate(order):
        if tried >= CANDIDATES * count and len(candidates) >= count:
            break
        drawn = shapes.generate(index)
        if len(drawn.scene.things) >= min_objects:
            candidates[index] = drawn
    if len(candidates) < count:
        raise InputError(
            f"{count} scenes are more than the {len(candidates)} there are; ask for fewer"
        )
    selected_kinds = Counter[str]()
    selected = list[Scene]()

    def gain(index: int) -> float:
        kinds = Counter(question.kind for question in candidates[index].questions)
        return sum(1 / (1 + selected_kinds[kind] + i) for kind in kinds for i in range(kinds[kind]))

    for _ in range(count):
        best = max(candidates, key=gain)
        selected_kinds.update(question.kind for question in candidates[best].questions)
        selected.append(_make_scene(best, candidates.pop(best)))
    return selected


def run_quiz(predictor: Predictor, scenes: Sequence[Scene]) -> Quiz:
    """Ask every question of every scene in one batch, and score the answers."""
    begin = time.perf_counter()
    pairs = [(scene.image, question.question) for scene in scenes for question in scene.questions]
    answers = iter(predictor.batch(pairs, progress=sys.stderr.isatty()))
    replies = [
        [score_answer(scene, question, next(answers)) for question in scene.questions]
        for scene in scenes
    ]
    seconds = time.perf_counter() - begin
    summary = summarise([reply for scene_replies in replies for reply in scene_replies])
    return Quiz(list(scenes), replies, summary, seconds)


def score_answer(scene: Scene, question: Question, answer: Answer) -> Reply:
    """Match the targets of an answer to the targets of its question, and score every pair."""
    truth = scene.masks[list(question.targets)]
    logits = np.where(answer.masks, _CERTAIN_LOGIT, -_CERTAIN_LOGIT)
    pairs = match(logits, truth.astype(np.uint8)).tolist()
    pairs.sort(key=lambda pair: (pair[0] == UNMATCHED, pair))  # in the answer's order, then missed
    empty = np.zeros((1, *scene.image.shape[:2]), bool)
    predicted, true = (
        np.concatenate([empty, *(empty if i == UNMATCHED else masks[i : i + 1] for i in indices)])[
            1:
        ]
        for masks, indices in (
            (answer.masks, [prediction for prediction, _ in pairs]),
            (truth, [target for _, target in pairs]),
        )
    )
    sums = tuple(
        tally(measure(mask, true_mask.view(np.uint8)), extra=np.bool_(target == UNMATCHED))
        for mask, true_mask, (_, target) in zip(predicted, true, pairs, strict=True)
    )
    return Reply(question, answer, predicted, true, sums)


def summarise(replies: Sequence[Reply]) -> Summary:
    """Score many replies together."""
    absent = [reply for reply in replies if not reply.question.targets]
    return Summary(
        scores=scores(merge(*(part for reply in replies for part in reply.sums))),
        questions=len(replies),
        right_number=sum(reply.right_number for reply in replies),
        absent=len(absent),
        absent_right=sum(reply.right_number for reply in absent),
    )


def split_at_markers(text: str, markers: Sequence[Sequence[int]]) -> list[str]:
    """Return the text between target markers: "A [SEG] and a [SEG]." -> ["A ", " and a ", "."]."""
    cuts = [0, *(int(position) for marker in markers for position in marker), len(text)]
    return [text[start:stop] for start, stop in zip(cuts[::2], cuts[1::2], strict=True)]


def _make_scene(index: int, drawn: GeneratedExample) -> Scene:
    image = np.asarray(Image.open(io.BytesIO(drawn.image)).convert("RGB"))
    return Scene(index, image, drawn.scene.masks(), drawn.questions)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
