"""Synthetic dataset of coloured shapes with conversations, generated on the fly without any files.

Two levels:

simple  two to four shapes that do not overlap; questions name one to three of them
full    two to six shapes that may hide parts of each other; all kinds of questions, with the rare
        and hard kinds more frequent in training
"""

from __future__ import annotations

import io
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

import numpy as np
from PIL import Image

from data_pipeline.example import Example, Target, Turn
from data_pipeline.formats.masks import encode
from data_pipeline.sampling import PhiloxSampler
from data_pipeline.sources.shapes.questions import (
    KINDS,
    MAX_TARGETS,
    TRAIN_KINDS,
    Question,
    sample_questions,
)
from data_pipeline.sources.shapes.scene import Scene, SceneSettings, render, sample_scene
from pixellm_jax.errors import InputError

SPLITS = {"train": 1 << 20, "val": 1000, "test": 1000}
"""Number of images per split; every split is sampled from a different seed."""

DATASETS = {"shapes": "full", "shapes_simple": "simple"}
"""Level of each dataset, by name."""

_SCENES = {"simple": SceneSettings(max_things=4, overlap=False), "full": SceneSettings()}
_MAX_TARGETS = {"simple": 3, "full": MAX_TARGETS}
_MIN_SIDE = 64


class GeneratedExample(NamedTuple):
    """A generated scene with its questions and its image as an encoded PNG."""

    scene: Scene
    questions: tuple[Question, ...]
    image: bytes


@dataclass(frozen=True, kw_only=True)
class Shapes(Sequence[Example]):
    """Sequence of the examples of a split, each a pure function of (split, level, index).

    Examples have the kind "ready".

    Example:
        >>> example = Shapes(split="val", level="simple")[0]
        >>> example.conversations[0][0].question

    Attributes:
        level: "simple" or "full".
        side: side of the square images, in pixels.
        questions: number of conversations per image, of one question each.

    Raises:
        InputError: an unknown split or level, a side below 64, or not 1 to 8 questions.
    """

    split: str = "train"
    level: str = "full"
    side: int = 96
    questions: int = 5

    def __post_init__(self) -> None:
        for name, value, known in (("split", self.split, SPLITS), ("level", self.level, _SCENES)):
            if value not in known:
                raise InputError(f"shapes: no {name} {value!r}; choose from {', '.join(known)}")
        if self.side < _MIN_SIDE:
            raise InputError(f"shapes: side={self.side} must be at least {_MIN_SIDE}")
        if not 1 <= self.questions <= 8:
            raise InputError(f"shapes: questions={self.questions} must be 1 to 8")

    @property
    def dataset(self) -> str:
        return {level: name for name, level in DATASETS.items()}[self.level]

    def __len__(self) -> int:
        return SPLITS[self.split]

    def __getitem__(self, index: SupportsIndex) -> Example:  # type: ignore[override]
        number = self._number(index)
        scene, questions, image = self.generate(number)
        return Example(
            key=str(number),
            dataset=self.dataset,
            split=self.split,
            kind="ready",
            image=image,
            hw=(self.side, self.side),
            masks=tuple(map(encode, scene.masks())),
            targets=tuple(Target((f"the {t.name}",), i) for i, t in enumerate(scene.things)),
            conversations=tuple((Turn(q.question, q.answer, q.targets),) for q in questions),
        )

    def generate(self, index: SupportsIndex) -> GeneratedExample:
        """Generate the scene of an example, its image, and its questions with their kinds."""
        number = self._number(index)
        seed = list(SPLITS).index(self.split)
        level = list(_SCENES).index(self.level)
        sampler = PhiloxSampler(seed=seed, epoch=level, index=number)
        scene = sample_scene(sampler, _SCENES[self.level], self.side)
        key, counter = np.array([seed, level], np.uint64), np.array([0, 0, 1, number], np.uint64)
        image = render(scene, sampler, np.random.Philox(key=key, counter=counter))
        kinds = TRAIN_KINDS if self.split == "train" else KINDS
        questions = sample_questions(
            scene,
            sampler,
            self.questions,
            kinds={"names": 1} if self.level == "simple" else kinds,
            max_targets=_MAX_TARGETS[self.level],
        )
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG", compress_level=1)
        return GeneratedExample(scene, questions, stream.getvalue())

    def kinds(self, index: SupportsIndex) -> tuple[str, ...]:
        """Return the kind of each conversation, one of `questions.KINDS`."""
        return tuple(question.kind for question in self.generate(index).questions)

    def _number(self, index: SupportsIndex) -> int:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.dataset}/{self.split} has no example {number} of {len(self)}")
        return number % len(self)
