"""Conversations and masks of one image -> arrays of fixed shape; several of them -> a batch."""

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
    """A row of a batch (every array without its batch axis), and what became of its example.

    dropped: conversations over budget. damaged: why the example has no conversation at all.
    key: "dataset/split/key" of the example.
    """

    row: Batch
    dropped: int
    key: str
    damaged: str | None = None


class Loaded(NamedTuple):
    """A batch, the keys of its examples, and what was left out of it.

    dropped: number of conversations over budget. damaged: key -> reason of rows without any.
    """

    batch: Batch
    keys: tuple[str, ...]
    dropped: int
    damaged: dict[str, str]


def make_sample(
    example: Example,
    composed: Sequence[Composed],
    vocabulary: Vocabulary,
    data: DataConfig,
    model: ModelConfig,
) -> Sample:
    """One row: the image on the canvas, its conversations packed, the masks of what was kept.

    Without a conversation the row is all padding, and supervises nothing.

    Raises:
        DamagedError: the ids of a conversation hold another number of targets than it has masks.
        InputError: the image cannot be read.
        ValueError: the prefix alone is longer than the budget.
    """
    canvas = model.vision.canvas
    stored = read_image(Image.open(io.BytesIO(example.image)), upright=False)
    image, hw = fit(stored, canvas)
    template = TEMPLATES[model.template]
    encoded = [encode_conversation(vocabulary, template, c.messages, images=1) for c in composed]
    for conversation, c in zip(encoded, composed, strict=True):
        if len(conversation.codebook) != len(c.masks):
            raise DamagedError(f"{len(conversation.codebook)} targets in the ids of {c.messages!r}")
    packed = _pack(encoded, vocabulary, data, model)
    wanted = [mask for number in packed.kept for mask in composed[number].masks]
    masks = np.full((data.targets, *2 * (data.masks or canvas,)), VOID, np.uint8)
    if wanted:
        unique = sorted(set(wanted))
        full = decode_many([example.masks[mask] for mask in unique])
        if example.void is not None:
            full[:, decode_many([example.void])[0] > 0] = VOID
        small = mask_to_canvas(full, canvas, data.masks or canvas)
        masks[: len(wanted)] = small[[unique.index(mask) for mask in wanted]]
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


def collate(samples: Sequence[Sample]) -> Loaded:
    """Stacks rows to a batch."""
    return Loaded(
        stack_rows([sample.row for sample in samples]),
        keys=tuple(s.key for s in samples),
        dropped=sum(s.dropped for s in samples),
        damaged={s.key: s.damaged for s in samples if s.damaged},
    )
