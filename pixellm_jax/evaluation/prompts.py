"""A question of a benchmark as the model takes it: ids, and its picture on the canvas."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pixellm_jax.benchmark_question import BenchmarkQuestion
from pixellm_jax.errors import InputError
from pixellm_jax.images.geometry import fit
from pixellm_jax.images.read import read_image
from pixellm_jax.text.answer import MARKER
from pixellm_jax.text.prompt import EncodedConversation, Template, encode_conversation
from pixellm_jax.text.vocabulary import Vocabulary


def encode_question(
    vocabulary: Vocabulary, template: Template, question: BenchmarkQuestion, answer: str
) -> EncodedConversation:
    """The conversation up to the question and its `answer` ("": the model is to write it).

    Every `[SEG]` of an answer becomes the codebook's tokens.
    """
    messages = [*question.messages, answer]
    for turn in range(1, len(messages), 2):
        messages[turn] = messages[turn].replace(MARKER, vocabulary.group_text)
    return encode_conversation(vocabulary, template, messages, images=1)


class Canvases:
    """Lays pictures on the canvas; that of the last question is kept for the next one.

    `left_out` is told of pictures that cannot be decoded or are too elongated, and why.
    """

    def __init__(self, canvas: int, left_out: dict[str, str]) -> None:
        self.canvas, self.left_out = canvas, left_out
        self._about = ""
        self._laid: tuple[np.ndarray, tuple[int, int]] | None = None

    def __call__(
        self, question: BenchmarkQuestion
    ) -> tuple[UInt8[np.ndarray, "y x 3"], tuple[int, int]] | None:
        """Canvas and fitted size; None if the picture is left out."""
        if question.about != self._about:
            self._laid, self._about = None, question.about
            try:
                with Image.open(io.BytesIO(question.image)) as image:
                    picture = read_image(image, upright=False)
                self._laid = fit(picture, self.canvas)
            except InputError as error:
                self.left_out[question.about] = str(error)
        return self._laid
