"""The answer that a person gets: text, and masks at the size of the picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from pixellm_jax.images.geometry import unfit
from pixellm_jax.inference.request import Result
from pixellm_jax.text.answer import read_answer
from pixellm_jax.text.vocabulary import Vocabulary


class Answer(NamedTuple):
    """Text with the marker `[SEG]` at every target, and the targets in the order of the markers.

    masks: at the original size of the (upright) picture.
    scores: mean probability inside the mask, 0 where it is empty. presence: the probability that
        the language model gave to naming a target there at all (to its first codebook token).
    kept: not empty, and with a score of `min_score` at least. The masks of the others are emptied,
        so that masks and markers stay in step.
    spans: first and last + 1 character of the words in `text` that name the target (at best; empty
        where nothing does). markers: the same for the target's `[SEG]`.
    reason: why the text ended: "stop" (the model was done), "length" (at the budget of new tokens
        or the model's last position) or "damaged" (numbers that are not finite came up: what was
        said before is kept, a mask of such numbers is emptied); "running" in a stream.
    tokens, passes: new tokens, and the passes through the language model that they took.
    earlier: in a conversation, the answers before this one.
    """

    text: str
    masks: Bool[np.ndarray, "m y x"]
    scores: Float32[np.ndarray, "m"]
    presence: Float32[np.ndarray, "m"]
    kept: Bool[np.ndarray, "m"]
    spans: Int32[np.ndarray, "m 2"]
    markers: Int32[np.ndarray, "m 2"]
    reason: str
    tokens: int
    passes: int
    earlier: tuple[Answer, ...] = ()

    @property
    def complete(self) -> bool:
        """The model said all that it wanted to say."""
        return self.reason == "stop"


class AnswerMaker:
    """Makes answers of the results about one picture.

    Results that grow, as in a stream, may be given one after the other: each mask is brought to the
    picture's size once.
    """

    def __init__(
        self, vocabulary: Vocabulary, hw: tuple[int, int], canvas: int, min_score: float
    ) -> None:
        self.vocabulary, self.hw, self.canvas, self.min_score = vocabulary, hw, canvas, min_score
        self._made: list[tuple[np.ndarray, float, bool, bool]] = []

    def __call__(self, result: Result, earlier: tuple[Answer, ...] = ()) -> Answer:
        """`result` for people."""
        targets = result.targets
        for logits in targets.mask_logits[len(self._made) :]:
            self._made.append(self._make(logits))
        tokens, count = result.tokens, len(targets.codebook_index)
        groups = self.vocabulary.find_groups(tokens)
        if len(groups) > count:  # a group of a stream whose masks are still to come
            tokens = tokens[: groups[count, 0, 0]]
        said = read_answer(self.vocabulary, tokens)
        masks, scores, kept, sound = zip(*self._made, strict=True) if self._made else ((),) * 4
        return Answer(
            text=said.text,
            masks=np.stack(masks) if masks else np.zeros((0, *self.hw), bool),
            scores=np.asarray(scores, np.float32),
            presence=result.chance[targets.codebook_index[:, 0, 0]],
            kept=np.asarray(kept, bool),
            spans=said.phrases,
            markers=said.markers,
            reason=result.reason if all(sound) or result.reason == "running" else "damaged",
            tokens=len(result.tokens),
            passes=result.passes,
            earlier=earlier,
        )

    def _make(self, logits: Float32[np.ndarray, "Y X"]) -> tuple[np.ndarray, float, bool, bool]:
        """Mask, score, whether it is kept, and whether its numbers are finite."""
        if not np.isfinite(logits).all():
            return np.zeros(self.hw, bool), 0.0, False, False
        full = unfit(logits[None], self.hw, self.canvas)[0]
        mask = full > 0
        inside = full[mask]
        score = float((1 / (1 + np.exp(-inside))).mean(dtype=np.float64)) if inside.size else 0.0
        kept = bool(inside.size) and score >= self.min_score
        return mask if kept else np.zeros_like(mask), score, kept, True
