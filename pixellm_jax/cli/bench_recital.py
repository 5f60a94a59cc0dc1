"""A model that recites: answers of a known length, with a known number of targets.

Random weights neither end an answer nor name a target. Here embeddings and head are made so that
every id of a sentence is followed by the next one, and the last by the first. The layers stay as
they are and no shape changes, so a pass through the model costs what it costs otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pixellm_jax.cli.bench_train import PROMPT, QUESTION
from pixellm_jax.config import ModelConfig
from pixellm_jax.inference.request import Question
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.text.prompt import IMAGE_TOKEN
from pixellm_jax.text.vocabulary import Vocabulary

WORDS = 10
"""Ids of a sentence before its target."""

LOUD = 2.0**20
"""Size of the embeddings, beside which little is left of what the layers add."""

STRIDE = 7
"""So many ids later in the sentence begins the answer of each next row."""


def random_model(config: ModelConfig) -> PixelLM:
    """Always the same weights; the language model's matrices are drawn in the compute dtype."""

    def draw(key: jax.Array) -> PixelLM:
        model = PixelLM(key, config)
        for path, variable in nnx.to_flat_state(nnx.state(model.language_model)):
            if "norm" not in ".".join(map(str, path)):
                variable.set_value(variable[...].astype(config.dtype))
        return model

    return jax.jit(draw)(jax.random.key(0))


def sentence(vocabulary: Vocabulary) -> tuple[int, ...]:
    """`WORDS` ids that are nothing but text, and the codebook tokens of one target."""
    text = (index for index in range(vocabulary.size) if index not in vocabulary.marks)
    return (*(next(text) for _ in range(WORDS)), *vocabulary.group)


def recite(model: PixelLM, ids: Sequence[int]) -> PixelLM:
    """A copy that says after each of `ids` the next one, and after the last the first."""
    told = jax.tree.map(lambda leaf: leaf, model)
    language = told.language_model
    shape, dtype = language.head.shape, model.config.dtype
    first, second = jax.random.split(jax.random.key(1))
    signs = jax.random.rademacher(first, shape, jnp.float32)
    before, after = np.asarray(ids), np.roll(ids, -1)
    head = jax.random.rademacher(second, shape, jnp.float32).at[after].set(signs[before])
    language.embedding.set_value((LOUD * signs).astype(dtype))
    language.head.set_value((head * shape[1] ** -0.5).astype(dtype))
    return told


def recital(
    config: ModelConfig, ids: Sequence[int], *, count: int, sentences: int
) -> list[Question]:
    """Questions about pictures of noise, each answered by so many sentences.

    Answers begin at different words: rows that were put in at different times do not reach their
    targets together either.
    """
    draw, canvas = np.random.default_rng(0), config.vision.canvas
    image = np.full(config.image_tokens, IMAGE_TOKEN)
    questions = []
    for row in range(count):
        prompt, words = draw.integers(3, max(ids), PROMPT), draw.integers(3, max(ids), QUESTION)
        words[-1] = ids[STRIDE * row % WORDS]
        questions.append(
            Question(
                np.concatenate([prompt[:-1], image, prompt[-1:], words]).astype(np.int32),
                draw.integers(0, 256, (canvas, canvas, 3), np.uint8),
                (canvas, canvas),
                budget=sentences * len(ids),
            )
        )
    return questions
