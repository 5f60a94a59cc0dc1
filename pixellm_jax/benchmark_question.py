"""A question of a benchmark, with all that is needed to ask it and to score its answer."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

GENERATED = "generated"
"""Mode of an evaluation in which the model writes its answers (free-running)."""

GIVEN = "given"
"""Mode in which the answers, codebook tokens included, are in the prompt (teacher-forced)."""

IMAGE = "<image>"
"""Stands for an image in the text of a message."""


class Rle(TypedDict):
    """A mask in COCO's compressed run-length encoding; `size` is [height, width]."""

    size: list[int]
    counts: str


class BenchmarkQuestion(NamedTuple):
    """What is asked about a picture, and what is right. Sizes are those of the annotation.

    id, picture, hw, expected, groups, descriptions: as in `question_record.QuestionRecord`.
    image: the encoded file; EXIF orientation is not applied, for masks lie on the stored pixels.
    messages: earlier questions and answers in turn, and the question. The first begins with
        `<image>`; targets in answers are written `[SEG]`.
    given: the answer that mode `given` puts into the prompt; "" where nothing can be given.
    truth: the targets in the order of `expected`; void pixels are in none of them.
    united: the question asks for one region, of which several predicted masks are the parts.
    """

    id: str
    picture: str
    image: bytes
    hw: tuple[int, int]
    messages: tuple[str, ...]
    given: str
    expected: str
    truth: tuple[Rle, ...]
    void: Rle | None
    groups: tuple[str, ...]
    descriptions: tuple[str, ...]
    united: bool

    @property
    def question(self) -> str:
        """The question as the model reads it, without the picture's mark."""
        return self.messages[-1].removeprefix(IMAGE).strip()

    @property
    def about(self) -> str:
        """What questions about the same picture have in common."""
        return self.id.rpartition("/")[0]
