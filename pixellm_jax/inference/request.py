"""What goes into the engine and what comes out of it: questions and results, both in ids."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8

from pixellm_jax.inference.decoding import Prefix


class Seen(NamedTuple):
    """A picture that was read: where its rows start, and what its masks are decoded from."""

    prefix: Prefix
    maps: tuple[jax.Array, ...]


class Question(NamedTuple):
    """A prompt about a picture.

    tokens: the whole prompt, with `IMAGE_TOKEN` at the image positions.
    canvas, hw: the picture as `geometry.fit` lays it.
    seen: in place of a picture, `Result.seen` of an earlier question; then `tokens` are only those
        that follow on it.
    budget: most new tokens; that of the engine where None.
    temperature, top_p, seed: see `sampling.Sampling`.
    stream: results are given on the way, too. keep: the last one has `seen`.
    """

    tokens: Int32[np.ndarray, "t"]
    canvas: UInt8[np.ndarray, "y x 3"] | None = None
    hw: tuple[int, int] = (0, 0)
    seen: Seen | None = None
    budget: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stream: bool = False
    keep: bool = False

    @property
    def shared(self) -> int:
        """Tokens that all questions about the picture begin with: up to the one after the image."""
        return 0 if self.seen is not None else int(np.flatnonzero(self.tokens < 0)[-1]) + 2

    @property
    def own(self) -> Int32[np.ndarray, "t"]:
        """The tokens after these."""
        return self.tokens[self.shared :]

    @property
    def length(self) -> int:
        """Positions before the answer."""
        before = 0 if self.seen is None else int(self.seen.prefix.length[0])
        return before + len(self.tokens)


class Targets(NamedTuple):
    """Targets of an answer, in order.

    codebook_index: in the answer's tokens, of each codebook token. states: that predicted these
        tokens. mask_logits: of the whole canvas; positive means inside.
    """

    codebook_index: Int32[np.ndarray, "m s k"]
    states: Float[np.ndarray, "m s k d"]
    mask_logits: Float32[np.ndarray, "m Y X"]


class Result(NamedTuple):
    """An answer, up to where it is.

    tokens: new ids, the stop token included. chance: the probability that each had when it was
        chosen; 1 for ids that follow by themselves (see `generate.decode`).
    targets: the complete groups in `tokens`.
    reason: why it ended: "stop", "length" (its budget, or the model's positions) or "damaged"
        (numbers that are not finite); "running" where it has not ended.
    passes: through the language model, reading the question included.
    seen: picture, question and answer, for a question that follows.
    """

    tokens: Int32[np.ndarray, "t"]
    chance: Float32[np.ndarray, "t"]
    targets: Targets
    reason: str
    passes: int
    seen: Seen | None = None
