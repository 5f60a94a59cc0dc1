"""A benchmark question, with all that is needed to ask it and to score the answer."""

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
    """A question about an image and its ground truth.

    Attributes:
        id, picture, hw, expected, groups, descriptions: as in `record.QuestionRecord`; `hw` is the
            height and width of the annotation.
        image: the encoded file. EXIF orientation is not applied, because masks refer to the stored
            pixels.
        messages: earlier questions and answers in turn, then the question. The first begins with
            `<image>`; targets in answers are written `[SEG]`.
        given: the answer that teacher-forced evaluation puts into the prompt; "" if there is none.
        truth: ground-truth masks in the order of `expected`, without void pixels.
        void: pixels that do not count.
        united: the question asks for one region; several predicted masks are parts of it.
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
        """The question as the model reads it, without `<image>`."""
        return self.messages[-1].removeprefix(IMAGE).strip()

    @property
    def about(self) -> str:
        """Common prefix of the ids of questions about the same image."""
        return self.id.rpartition("/")[0]
