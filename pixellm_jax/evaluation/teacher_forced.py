"""Teacher-forced evaluation (mode "given"): the answers are in the prompt, and only masks count.

The referring numbers of the paper were produced like this (docs/reference_notes.md 4.7). The
questions about an image share a packed sequence (`prompt.pack`), which changes no number, and
several images share a batch.
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
from pixellm_jax.evaluation.prompts import CanvasCache, encode_question
from pixellm_jax.evaluation.record import TOO_LONG
from pixellm_jax.evaluation.scoring import Answered, empty_non_finite, no_masks
from pixellm_jax.images.geometry import unfit
from pixellm_jax.inference.compilation import CompileCounter, bucket
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.stopwatch import Stopwatch
from pixellm_jax.text.prompt import TEMPLATES, EncodedConversation, pack
from pixellm_jax.text.vocabulary import Vocabulary

MAX_LENGTH = 1024
"""Positions of a packed row, unless a single question needs more."""

MAX_TARGETS = 32
"""Targets of a packed row, unless a single question needs more."""

MIN_LENGTH_BUCKET = 128
MIN_TARGETS_BUCKET = 8


class _Encoded(NamedTuple):
    """A question whose targets are the last `targets` targets of its conversation."""

    question: BenchmarkQuestion
    conversation: EncodedConversation
    targets: int


class _Row(NamedTuple):
    """A packed row, every array without its batch axis, and its questions."""

    row: Batch
    questions: tuple[_Encoded, ...]


def answer_teacher_forced(
    model: PixelLM,
    vocabulary: Vocabulary,
    questions: Iterable[BenchmarkQuestion],
    watch: Stopwatch,
    left_out: dict[str, str],
    *,
    max_batch: int,
) -> Iterator[Answered]:
    """Decode the masks of all targets. Questions without a given answer have no masks.

    Args:
        model: the model.
        vocabulary: its vocabulary.
        questions: questions about the same image must be adjacent.
        watch: times the activity "io".
        left_out: receives the images that cannot be used, with the reason.
        max_batch: images per batch; the last batch is padded to it.
    """
    config = model.config
    template = TEMPLATES[config.template]
    counter = CompileCounter()
    canvases = CanvasCache(config.vision.canvas, left_out)
    pending: dict[tuple[int, int], list[_Row]] = {}  # by length and targets
    for _, group in itertools.groupby(questions, lambda question: question.about):
        encoded = list[_Encoded]()
        for question in group:
            with watch("io"):
                if canvases(question) is None:
                    continue
                conversation = encode_question(vocabulary, template, question, question.given)
                targets = len(question.truth) if question.given else 0
                length = len(conversation.ids) - 1 + config.image_tokens
            if targets and length <= config.language.max_positions:
                encoded.append(_Encoded(question, conversation, targets))
                continue
            reason = TOO_LONG if targets else GIVEN
            yield Answered(question, no_masks(question), question.given, reason)
        while encoded:
            with watch("io"):
                canvas = canvases(encoded[0].question)
                assert canvas is not None
                row, encoded = _pack(encoded, config, canvas)
            shape = len(row.row.tokens), len(row.row.target_valid)
            pending.setdefault(shape, []).append(row)
            if len(pending[shape]) == max_batch:
                yield from _decode(model, counter, pending.pop(shape), max_batch)
    for rows in pending.values():
        yield from _decode(model, counter, rows, max_batch)


def _pack(
    encoded: Sequence[_Encoded], config: ModelConfig, canvas: tuple[np.ndarray, tuple[int, int]]
) -> tuple[_Row, list[_Encoded]]:
    """Pack as many questions about an image as fit into a row; return the row and the rest."""
    first = encoded[0].conversation
    packed = pack(
        [item.conversation for item in encoded],
        image_tokens=config.image_tokens,
        length=max(MAX_LENGTH, len(first.ids) - 1 + config.image_tokens),
        targets=max(MAX_TARGETS, len(first.codebook)),
    )
    packed = _resize(
        packed,
        length=bucket(int((packed.segment >= 0).sum()), MIN_LENGTH_BUCKET, 2),
        targets=bucket(int(packed.target_valid.sum()), MIN_TARGETS_BUCKET, 2),
    )
    image, hw = canvas
    # The model does not read the masks.
    masks = np.zeros((len(packed.target_valid), 1, 1), np.uint8)
    row = make_row(packed, image=image, image_hw=hw, masks=masks)
    kept = set(packed.kept)
    rest = [item for number, item in enumerate(encoded) if number not in kept]
    return _Row(row, tuple(encoded[number] for number in packed.kept)), rest


def _decode(
    model: PixelLM, counter: CompileCounter, rows: Sequence[_Row], max_batch: int
) -> Iterator[Answered]:
    """Run one batch, padded with copies of the last row."""
    padded = [*rows, *[rows[-1]] * (max_batch - len(rows))]
    batch = stack_rows([item.row for item in padded])
    logits = np.asarray(counter.call(_mask_logits, model, batch))
    for row_logits, (row, questions) in zip(logits, rows, strict=False):
        for number, item in enumerate(questions, 1):
            slots = np.flatnonzero(row.target_valid & (row.target_conversation == number))
            target_logits, reason = empty_non_finite(row_logits[slots[-item.targets :]], GIVEN)
            masks = unfit(target_logits, item.question.hw, model.config.vision.canvas)
            yield Answered(item.question, masks, item.question.given, reason)


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
