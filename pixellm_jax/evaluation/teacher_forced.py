"""Questions of a benchmark with their answers in the prompt (mode `given`): masks alone count.

So the referring numbers of the paper were made (docs/reference_notes.md 4.7). The questions
about a picture share a sequence (`prompt.pack`), which changes no number, and many pictures share a
batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from pixellm_jax.batch import Batch, Packed, make_row, stack_rows
from pixellm_jax.benchmark_question import GIVEN, BenchmarkQuestion
from pixellm_jax.config import ModelConfig
from pixellm_jax.evaluation.prompts import Canvases, encode_question
from pixellm_jax.evaluation.scoring import TOO_LONG, Answered, no_masks, sound
from pixellm_jax.images.geometry import unfit
from pixellm_jax.inference.compilation import CompileCounter, bucket
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.stopwatch import Stopwatch
from pixellm_jax.text.prompt import TEMPLATES, EncodedConversation, pack
from pixellm_jax.text.vocabulary import Vocabulary

LENGTH, TARGETS = 1024, 32
"""Positions and targets of a row, if no single question needs more."""

SHORTEST, FEWEST = 128, 8
"""The least buckets of both."""


class _Asked(NamedTuple):
    """A question whose targets are the last `targets` ones of its conversation."""

    question: BenchmarkQuestion
    conversation: EncodedConversation
    targets: int


class _Row(NamedTuple):
    """A packed row (every array without its batch axis), and the questions in it."""

    row: Batch
    asked: tuple[_Asked, ...]


def answer_given(
    model: PixelLM,
    vocabulary: Vocabulary,
    asked: Iterable[BenchmarkQuestion],
    watch: Stopwatch,
    left_out: dict[str, str],
    *,
    rows: int,
) -> Iterator[Answered]:
    """Masks of all targets, `rows` pictures at once; what fills up the last batch is dropped.

    Questions without a given answer have no masks. `left_out`: as of `answer_generated`.
    """
    config, counter = model.config, CompileCounter()
    canvases = Canvases(config.vision.canvas, left_out)
    waiting: dict[tuple[int, int], list[_Row]] = {}  # by length and targets
    for _, own in itertools.groupby(asked, lambda question: question.about):
        ready = list[_Asked]()
        for question in own:
            with watch("io"):
                if canvases(question) is None:
                    continue
                template = TEMPLATES[config.template]
                conversation = encode_question(vocabulary, template, question, question.given)
                count = len(question.truth) if question.given else 0
                length = len(conversation.ids) - 1 + config.image_tokens
            if count and length <= config.language.max_positions:
                ready.append(_Asked(question, conversation, count))
                continue
            reason = TOO_LONG if count else GIVEN
            yield Answered(question, no_masks(question), question.given, reason)
        while ready:
            with watch("io"):
                laid = canvases(ready[0].question)
                assert laid is not None
                row, ready = _pack(ready, config, laid)
            shape = len(row.row.tokens), len(row.row.target_valid)
            waiting.setdefault(shape, []).append(row)
            if len(waiting[shape]) == rows:
                yield from _decode(model, counter, waiting.pop(shape), rows)
    for rest in waiting.values():
        yield from _decode(model, counter, rest, rows)


def _pack(
    asked: Sequence[_Asked], config: ModelConfig, laid: tuple[np.ndarray, tuple[int, int]]
) -> tuple[_Row, list[_Asked]]:
    """A row of as many questions about a picture as it holds, and the others."""
    first = asked[0].conversation
    packed = pack(
        [each.conversation for each in asked],
        image_tokens=config.image_tokens,
        length=max(LENGTH, len(first.ids) - 1 + config.image_tokens),
        targets=max(TARGETS, len(first.codebook)),
    )
    packed = _resize(
        packed,
        length=bucket(int((packed.segment >= 0).sum()), SHORTEST, 2),
        targets=bucket(int(packed.target_valid.sum()), FEWEST, 2),
    )
    image, hw = laid
    # The model does not read the masks.
    masks = np.zeros((len(packed.target_valid), 1, 1), np.uint8)
    row = make_row(packed, image=image, image_hw=hw, masks=masks)
    kept = set(packed.kept)
    own = tuple(asked[number] for number in packed.kept)
    return _Row(row, own), [each for number, each in enumerate(asked) if number not in kept]


def _decode(
    model: PixelLM, counter: CompileCounter, waiting: Sequence[_Row], rows: int
) -> Iterator[Answered]:
    """Runs one batch; the last row stands in for those that are missing."""
    padded = [*waiting, *[waiting[-1]] * (rows - len(waiting))]
    batch = stack_rows([each.row for each in padded])
    logits = np.asarray(counter.call(_mask_logits, model, batch))
    for own, (row, asked) in zip(logits, waiting, strict=False):
        for number, each in enumerate(asked, 1):
            slots = np.flatnonzero(row.target_valid & (row.target_conversation == number))
            found, reason = sound(own[slots[-each.targets :]], GIVEN)
            masks = unfit(found, each.question.hw, model.config.vision.canvas)
            yield Answered(each.question, masks, each.question.given, reason)


@jax.jit
def _mask_logits(model: PixelLM, batch: Batch) -> Float[Array, "b m Y X"]:
    return model(batch).mask_logits


def _resize(packed: Packed, *, length: int, targets: int) -> Packed:
    """Pad the sequence and target axes, or cut padding off, to the given sizes."""
    return packed._replace(
        tokens=_resize_axis(packed.tokens, length, 0),
        segment=_resize_axis(packed.segment, length, -1),
        position=_resize_axis(packed.position, length, 0),
        loss_mask=_resize_axis(packed.loss_mask, length, 0),
        codebook_index=_resize_axis(packed.codebook_index, targets, 0),
        target_conversation=_resize_axis(packed.target_conversation, targets, 0),
        target_valid=_resize_axis(packed.target_valid, targets, 0),
    )


def _resize_axis(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    padding = [(0, max(size - len(array), 0))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array[:size], padding, constant_values=fill)
