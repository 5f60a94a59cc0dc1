"""Greedy decoding of one fixed batch, without an engine."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from pixellm_jax.inference.decoding import DecodeState, decode, prefill, read_prefix, resize
from pixellm_jax.inference.sampling import Sampling
from pixellm_jax.model.pixellm import ImageFeatures, PixelLM
from pixellm_jax.text.prompt import prefix_length


def generate(
    model: PixelLM,
    image: ImageFeatures,
    tokens: Int[np.ndarray, "b t"],
    length: Int[np.ndarray, "b"],
    *,
    budget: int,
    stop: int,
    group: tuple[int, ...] = (),
) -> DecodeState:
    """Decode prompts about one image each, padded on the right; their prefixes are equally long."""
    start = prefix_length(tokens[0])
    prefix = read_prefix(model, image.tokens, image.token_valid, tokens[:, :start])
    b = len(tokens)
    sampling = Sampling(np.zeros(b, np.uint32), np.zeros(b, np.float32), np.ones(b, np.float32))
    language = model.language_model
    state = prefill(
        language,
        [prefix],
        tokens[:, start:],
        length - start,
        np.full(b, budget, np.int32),
        sampling,
        token_capacity=budget,
    )
    state = resize(state, np.arange(b), capacity=tokens.shape[1] + budget + len(group))
    return decode(language, state, budget, stop=stop, group=group)[0]
