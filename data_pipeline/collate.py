"""Collation: conversations and masks of an image -> one packed row; packed rows -> a batch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.errors import DamagedError
from data_pipeline.example import Example
from data_pipeline.formats.masks import decode_many
from data_pipeline.transforms import Composed
from pixellm_jax.batch import Batch, Packed, make_row, stack_rows
from pixellm_jax.config import ModelConfig
from pixellm_jax.images.geometry import VOID, fit, mask_to_canvas
from pixellm_jax.images.read import read_image
from pixellm_jax.text.prompt import TEMPLATES, EncodedConversation, encode_conversation, pack
from pixellm_jax.text.vocabulary import Vocabulary


class Sample(NamedTuple):
    """Packed row of one example."""

    row: Batch
    """A batch whose arrays have no batch axis."""
    dropped: int
    """Number of conversations over budget."""
    key: str
    """Key "dataset/split/key" of the example."""
    damaged: str | None = None
    """Reason why a damaged example has an empty row."""


class LoadedBatch(NamedTuple):
    """A batch, the keys of its examples, and what was left out of it."""

    batch: Batch
    keys: tuple[str, ...]
    """Key "dataset/split/key" of each row."""
    dropped: int
    """Number of conversations over budget."""
    damaged: dict[str, str]
    """Key and reason of each damaged example, whose row is empty."""


def make_sample(
    example: Example,
    composed: Sequence[Composed],
    vocabulary: Vocabulary,
    data: DataConfig,
    model: ModelConfig,
) -> Sample:
    """Return the row of an example: image on the canvas, packed conversations, their masks.

    Without conversations the row is all padding and has no loss.

    Raises:
        DamagedError: the ids of a conversation have another number of codebook groups than it has
            masks.
        InputError: the image cannot be read.
        ValueError: the prefix alone exceeds the budget of positions.
    """
    canvas = model.vision.canvas
    mask_side = data.masks or canvas
    pixels = read_image(Image.open(io.BytesIO(example.image)), upright=False)
    image, hw = fit(pixels, canvas)
    template = TEMPLATES[model.template]
    encoded = [encode_conversation(vocabulary, template, c.messages, images=1) for c in composed]
    for conversation, c in zip(encoded, composed, strict=True):
        if len(conversation.codebook) != len(c.masks):
            raise DamagedError(f"{len(conversation.codebook)} targets in the ids of {c.messages!r}")
    packed = _pack(encoded, vocabulary, data, model)
    indices = [mask for number in packed.kept for mask in composed[number].masks]
    masks = np.full((data.targets, mask_side, mask_side), VOID, np.uint8)
    if indices:
        unique = sorted(set(indices))
        full = decode_many([example.masks[index] for index in unique])
        if example.void is not None:
            full[:, decode_many([example.void])[0] > 0] = VOID
        resized = mask_to_canvas(full, canvas, mask_side)
        masks[: len(indices)] = resized[[unique.index(index) for index in indices]]
    row = make_row(packed, image=image, image_hw=hw, masks=masks)
    return Sample(row, packed.dropped, f"{example.dataset}/{example.split}/{example.key}")


def _pack(
    encoded: Sequence[EncodedConversation],
    vocabulary: Vocabulary,
    data: DataConfig,
    model: ModelConfig,
) -> Packed:
    if encoded:
        sizes = {"length": data.length, "targets": data.targets}
        return pack(encoded, image_tokens=model.image_tokens, **sizes)
    zeros = np.zeros(data.length, np.int32)
    return Packed(
        tokens=zeros,
        segment=zeros - 1,
        position=zeros,
        loss_mask=zeros > 0,
        codebook_index=np.zeros((data.targets, *np.shape(vocabulary.codebook)), np.int32),
        target_conversation=np.zeros(data.targets, np.int32),
        target_valid=np.zeros(data.targets, bool),
        kept=(),
        dropped=0,
    )


def collate(samples: Sequence[Sample]) -> LoadedBatch:
    """Stack rows into a batch."""
    return LoadedBatch(
        stack_rows([sample.row for sample in samples]),
        keys=tuple(s.key for s in samples),
        dropped=sum(s.dropped for s in samples),
        damaged={s.key: s.damaged for s in samples if s.damaged},
    )
