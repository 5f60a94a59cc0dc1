"""Answers for users: text, and masks at the size of the image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from pixellm_jax.images.geometry import unfit
from pixellm_jax.inference.request import Completion
from pixellm_jax.text.answer import read_answer
from pixellm_jax.text.vocabulary import Vocabulary


class Answer(NamedTuple):
    """Text with a marker `[SEG]` for every target, and the targets in the order of the markers.

    Example:
        >>> answer = predictor(image, "Please segment the dog.")
        >>> for mask, (start, stop) in zip(answer.masks, answer.spans):
        ...     print(answer.text[start:stop], mask.sum())

    Attributes:
        text: the answer.
        masks: masks at the original size of the (upright) image.
        scores: mean probability inside each mask, from 0 to 1; 0 for an empty mask.
        presence: probability that the language model gave to naming the target at all, that is to
            its first codebook token.
        kept: whether the mask is not empty and scores at least `min_score`. Other masks are
            emptied, not removed, so that masks and markers stay aligned.
        spans: start and stop index in `text` of the words that name each target (a heuristic; empty
            if nothing names it).
        markers: start and stop index in `text` of each target's `[SEG]`.
        finish_reason: "stop" (the model ended its answer), "length" (at the limit of new tokens or
            of the model's positions), "non_finite" (the model returned values that are not finite:
            the text up to there is kept, a mask of such values is emptied), or "running" in a
            stream.
        num_tokens: number of new tokens.
        num_steps: number of forward passes through the language model for them.
        earlier: the previous answers of a chat session.
    """

    text: str
    masks: Bool[np.ndarray, "m y x"]
    scores: Float32[np.ndarray, "m"]
    presence: Float32[np.ndarray, "m"]
    kept: Bool[np.ndarray, "m"]
    spans: Int32[np.ndarray, "m 2"]
    markers: Int32[np.ndarray, "m 2"]
    finish_reason: str
    num_tokens: int
    num_steps: int
    earlier: tuple[Answer, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the model ended the answer by itself."""
        return self.finish_reason == "stop"


class _Mask(NamedTuple):
    """A mask at the size of the image, its score, and two properties."""

    mask: Bool[np.ndarray, "y x"]
    score: float
    kept: bool
    finite: bool


class AnswerBuilder:
    """Builds answers from the completions of one request.

    The completions of a stream may be passed one after the other: each mask is resized to the image
    once.
    """

    def __init__(
        self, vocabulary: Vocabulary, hw: tuple[int, int], canvas: int, min_score: float
    ) -> None:
        """`hw`: size of the image; `canvas`: side of the padded square, both in pixels."""
        self.vocabulary = vocabulary
        self.hw = hw
        self.canvas = canvas
        self.min_score = min_score
        self._masks: list[_Mask] = []

    def __call__(self, completion: Completion, earlier: tuple[Answer, ...] = ()) -> Answer:
        """Return the answer of a completion; `earlier` are the previous answers of a chat."""
        targets = completion.targets
        for logits in targets.mask_logits[len(self._masks) :]:
            self._masks.append(self._resize(logits))
        text = read_answer(self.vocabulary, completion.tokens, targets.codebook_index)
        masks = [item.mask for item in self._masks]
        finite = all(item.finite for item in self._masks) or not completion.finished
        return Answer(
            text=text.text,
            masks=np.stack(masks) if masks else np.zeros((0, *self.hw), bool),
            scores=np.asarray([item.score for item in self._masks], np.float32),
            presence=completion.token_prob[targets.codebook_index[:, 0, 0]],
            kept=np.asarray([item.kept for item in self._masks], bool),
            spans=text.phrases,
            markers=text.markers,
            finish_reason=completion.finish_reason if finite else "non_finite",
            num_tokens=len(completion.tokens),
            num_steps=completion.num_steps,
            earlier=earlier,
        )

    def _resize(self, logits: Float32[np.ndarray, "Y X"]) -> _Mask:
        """Resize mask logits to the image and threshold them."""
        if not np.isfinite(logits).all():
            return _Mask(np.zeros(self.hw, bool), 0.0, kept=False, finite=False)
        resized = unfit(logits[None], self.hw, self.canvas)[0]
        mask = resized > 0
        inside = resized[mask]
        score = float((1 / (1 + np.exp(-inside))).mean(dtype=np.float64)) if inside.size else 0.0
        kept = bool(inside.size) and score >= self.min_score
        return _Mask(mask if kept else np.zeros_like(mask), score, kept, finite=True)
