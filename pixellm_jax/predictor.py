"""The model for people: a picture and a question in, text and one mask per target out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32
from PIL import Image

from pixellm_jax import checkpoint
from pixellm_jax.answer import read_answer
from pixellm_jax.errors import InputError
from pixellm_jax.generate import generate
from pixellm_jax.geometry import fit, unfit
from pixellm_jax.image import read_image
from pixellm_jax.model.pixellm import PixelLM, gather_states
from pixellm_jax.prompt import TEMPLATES, question_ids
from pixellm_jax.vocabulary import Vocabulary

PROMPT_BUCKET = 64
"""Prompts are padded to a multiple of this, so that few lengths are ever compiled."""

LEAST_ANSWER = 64
"""Room for so many new tokens must be left by a prompt, of the positions that the model has."""


class Answer(NamedTuple):
    """Text with the marker `[SEG]` at every target, and the targets in the order of the markers.

    masks: at the original size of the (upright) picture. scores: mean probability inside the mask,
    0 where it is empty. spans: first and last + 1 character of the words in `text` that name the
    target (at best; empty where nothing does). markers: the same for the target's `[SEG]`.
    complete: False if the answer was cut off at the budget of new tokens.
    """

    text: str
    masks: Bool[np.ndarray, "m y x"]
    scores: Float32[np.ndarray, "m"]
    spans: Int32[np.ndarray, "m 2"]
    markers: Int32[np.ndarray, "m 2"]
    complete: bool


class Predictor:
    """Answers questions about pictures, one at a time, by greedy decoding."""

    def __init__(
        self, model: PixelLM, vocabulary: Vocabulary, *, max_new_tokens: int = 512
    ) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 1")
        self.model = model
        self.config = model.config
        self.vocabulary = vocabulary
        self.max_new_tokens = max_new_tokens

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: str | None = None, max_new_tokens: int = 512
    ) -> Predictor:
        """Reads a checkpoint folder made by `pixellm convert`.

        `dtype` ("float32" or "bfloat16") replaces the compute dtype of the checkpoint.

        Raises:
            InputError: `path` is not a checkpoint, or it is damaged.
        """
        path = Path(path)
        model = checkpoint.load_model(path, dtype=dtype)
        vocabulary = checkpoint.read_vocabulary(path, model.config)
        return cls(model, vocabulary, max_new_tokens=max_new_tokens)

    def __call__(
        self,
        image: str | Path | Image.Image | np.ndarray,
        question: str,
    ) -> Answer:
        """Answers `question` about `image`: a path, a PIL image or a uint8 array, in any mode.

        EXIF orientation is applied first: masks belong to the upright picture.

        Raises:
            InputError: an image that cannot be read or is too elongated, a question that is empty
                or too long for the model.
        """
        config = self.config
        picture = read_image(image)
        prompt = self._prompt(question)
        canvas, hw = fit(picture, config.vision.canvas)
        features = _encode(self.model, canvas[None], np.asarray([hw], np.int32))
        padded = np.zeros((1, -(-len(prompt) // PROMPT_BUCKET) * PROMPT_BUCKET), np.int32)
        padded[0, : len(prompt)] = prompt
        generation = generate(
            self.model,
            features,
            padded,
            np.asarray([len(prompt)], np.int32),
            budget=min(self.max_new_tokens, config.language.max_positions - len(prompt)),
            stop=self.vocabulary.eos,
        )
        ids = np.asarray(generation.tokens)[0, : int(generation.length[0])]
        answer = read_answer(self.vocabulary, ids)
        logits = self._masks(generation.states, answer.codebook_index, features.maps)
        masks, scores = _finish(logits, picture.shape[:2], config.vision.canvas)
        return Answer(
            text=answer.text,
            masks=masks,
            scores=scores,
            spans=answer.phrases,
            markers=answer.markers,
            complete=bool(ids[-1] == self.vocabulary.eos),
        )

    def _prompt(self, question: str) -> np.ndarray:
        if not question.strip():
            raise InputError("the question is empty; ask something about the picture")
        if any("\ud800" <= letter <= "\udfff" for letter in question):
            raise InputError(f"the question {question[:80]!a} is not UTF-8; encode it as such")
        template = TEMPLATES[self.config.template]
        prompt = question_ids(
            self.vocabulary, template, question, image_tokens=self.config.image_tokens
        )
        limit = self.config.language.max_positions - min(self.max_new_tokens, LEAST_ANSWER)
        if len(prompt) > limit:
            raise InputError(
                f"the question makes a prompt of {len(prompt)} tokens, the model has room for "
                f"{limit} before an answer; shorten it"
            )
        return prompt

    def _masks(self, states: jax.Array, index: np.ndarray, maps: tuple) -> np.ndarray:
        """Mask logits of the targets, decoded together in a bucket of 1, 2, 4, 8, ... targets."""
        count = len(index)
        if not count:
            side = self.config.mask_grid
            return np.zeros((0, side, side), np.float32)
        padded = np.zeros((1, 1 << (count - 1).bit_length(), *index.shape[1:]), np.int32)
        padded[0, :count] = index
        return np.asarray(_decode(self.model, states, padded, maps))[0, :count]


@jax.jit
def _encode(model: PixelLM, image: jax.Array, image_hw: jax.Array) -> tuple:
    return model.encode_image(image, image_hw)


@jax.jit
def _decode(model: PixelLM, states: jax.Array, index: jax.Array, maps: tuple) -> jax.Array:
    return model.decode_masks(gather_states(states, index), maps)


def _finish(
    logits: Float32[np.ndarray, "m Y X"], hw: tuple[int, int], canvas: int
) -> tuple[Bool[np.ndarray, "m y x"], Float32[np.ndarray, "m"]]:
    """Masks at the original size and their scores; one target's float logits at a time."""
    masks = np.empty((len(logits), *hw), bool)
    scores = np.zeros(len(logits), np.float32)
    for i in range(len(logits)):
        full = unfit(logits[i : i + 1], hw, canvas)[0]
        masks[i] = full > 0
        inside = full[masks[i]]
        if inside.size:
            scores[i] = (1 / (1 + np.exp(-inside))).mean(dtype=np.float64)
    return masks, scores
