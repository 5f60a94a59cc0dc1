"""Model input of a benchmark question: its prompt in ids, and its image on the canvas."""

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
    """Encode a question, the turns before it, and its answer ("" if the model is to write it).

    Every `[SEG]` of an answer becomes a codebook token group.
    """
    messages = [*question.messages, answer]
    for turn in range(1, len(messages), 2):
        messages[turn] = messages[turn].replace(MARKER, vocabulary.group_text)
    return encode_conversation(vocabulary, template, messages, images=1)


class CanvasCache:
    """Reads images and fits them to the canvas; the last one is cached for the next question.

    Args:
        canvas: side of the padded square in pixels.
        left_out: receives the images that cannot be decoded or are too elongated, with the reason.
    """

    def __init__(self, canvas: int, left_out: dict[str, str]) -> None:
        self._canvas = canvas
        self._left_out = left_out
        self._about = ""
        self._cached: tuple[np.ndarray, tuple[int, int]] | None = None

    def __call__(
        self, question: BenchmarkQuestion
    ) -> tuple[UInt8[np.ndarray, "y x 3"], tuple[int, int]] | None:
        """Return the canvas and the fitted (height, width); None if the image is left out."""
        if question.about != self._about:
            self._cached = None
            self._about = question.about
            try:
                with Image.open(io.BytesIO(question.image)) as file:
                    image = read_image(file, upright=False)
                self._cached = fit(image, self._canvas)
            except InputError as error:
                self._left_out[question.about] = str(error)
        return self._cached
