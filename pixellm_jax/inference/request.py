"""Interface of the engine: a `Request` in, a `Completion` out, both in token ids."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8

from pixellm_jax.errors import InputError
from pixellm_jax.inference.decoding import Prefix
from pixellm_jax.text.prompt import prefix_length

MAX_TEMPERATURE = 1e6
"""Highest temperature that is accepted; sampling is uniform long before it."""


class EncodedImage(NamedTuple):
    """An image as the engine caches it, possibly with a conversation about it.

    Attributes:
        prefix: key-value cache of the prompt up to the end of the image (and of the conversation).
        maps: feature maps from which the pixel decoder decodes masks.
    """

    prefix: Prefix
    maps: tuple[jax.Array, ...]


class Request(NamedTuple):
    """A prompt about one image, with its sampling parameters.

    Attributes:
        tokens: the whole prompt, with `IMAGE_TOKEN` at every image position. With a `context`, only
            the tokens that follow it.
        canvas: the image as `geometry.fit` places it on the padded square.
        hw: height and width of the image on the canvas.
        context: `Completion.context` of an earlier request, instead of an image.
        max_new_tokens: limit of the answer; None for the engine's limit.
        temperature: see `sampling.Sampling`.
        top_p: see `sampling.Sampling`.
        seed: see `sampling.Sampling`.
        stream: also return partial completions.
        keep_context: return `Completion.context` with the final completion.
    """

    tokens: Int32[np.ndarray, "t"]
    canvas: UInt8[np.ndarray, "y x 3"] | None = None
    hw: tuple[int, int] = (0, 0)
    context: EncodedImage | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stream: bool = False
    keep_context: bool = False

    @property
    def prefix_length(self) -> int:
        """Number of `tokens` in the image's prefix (0 with a `context`, which contains it)."""
        return 0 if self.context is not None else prefix_length(self.tokens)

    @property
    def suffix(self) -> Int32[np.ndarray, "t"]:
        """The tokens after the prefix."""
        return self.tokens[self.prefix_length :]

    @property
    def prompt_length(self) -> int:
        """Number of positions before the answer."""
        cached = 0 if self.context is None else int(self.context.prefix.length[0])
        return cached + len(self.tokens)


class Targets(NamedTuple):
    """Decoded targets of an answer, in the order in which it names them.

    Attributes:
        codebook_index: index in the answer's tokens of each codebook token.
        states: hidden states that predicted these tokens.
        mask_logits: mask logits of the whole canvas; positive means inside.
    """

    codebook_index: Int32[np.ndarray, "m s k"]
    states: Float[np.ndarray, "m s k d"]
    mask_logits: Float32[np.ndarray, "m Y X"]


class Completion(NamedTuple):
    """A generated answer; a partial one where `finish_reason` is "running".

    Attributes:
        tokens: new ids, the stop token included.
        token_prob: probability of each token when it was selected; 1 for jump-forward tokens (see
            `decoding.decode`).
        targets: the targets whose masks are decoded. A codebook group at the end of a partial
            completion may not be among them yet.
        finish_reason: "stop" (the model ended its answer), "length" (at the limit of new tokens or
            of the model's positions), "non_finite" (the model returned values that are not finite)
            or "running" (not finished).
        num_steps: forward passes through the language model, the prompt's included.
        context: image, prompt and answer, for a follow-up request.
    """

    tokens: Int32[np.ndarray, "t"]
    token_prob: Float32[np.ndarray, "t"]
    targets: Targets
    finish_reason: str
    num_steps: int
    context: EncodedImage | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the final completion of its request."""
        return self.finish_reason != "running"


def check_question(question: str) -> None:
    """Check a question before a model sees it.

    Raises:
        InputError: it is empty, or holds bytes that are not text.
    """
    if not question.strip():
        raise InputError("the question is empty; ask something about the image")
    if any("\ud800" <= letter <= "\udfff" for letter in question):
        raise InputError(f"the question {question[:80]!a} is not UTF-8; encode it as such")


def check_sampling(*, temperature: Any = 0.0, top_p: Any = 1.0, seed: Any = 0) -> None:
    """Check sampling parameters before a model sees them.

    Raises:
        InputError: a parameter of the wrong type, or outside its range.
    """
    if not (_is_number(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
        raise InputError(
            f"temperature={temperature!r}: expected a number from 0 to {MAX_TEMPERATURE:g}"
        )
    if not (_is_number(top_p) and 0 < top_p <= 1):
        raise InputError(f"top_p={top_p!r}: expected a probability above 0, up to 1")
    if not isinstance(seed, numbers.Integral):
        raise InputError(f"seed={seed!r}: expected a whole number")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not math.isnan(value)
