"""Input and output of the model: `Batch` and `Prediction`.

One image is one packed sequence: the prefix (system text and image) once, then its conversations
one after the other. A token attends to the prefix and to its own conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32, Num, UInt8

from pixellm_jax.config import ModelConfig

Array = Any
"""A NumPy array on the host, a JAX array on the device, a `ShapeDtypeStruct` in `spec`."""


class Batch(NamedTuple):
    """A batch of images with their packed conversations; every ragged axis has a validity mask.

    Attributes:
        image: u8 RGB canvas, the image in the top left corner and zero outside `image_hw`. A float
            image is taken as already normalised (`check` accepts u8 only).
        image_hw: height and width of the fitted image on the canvas, in pixels.
        tokens: ids; `prompt.IMAGE_TOKEN` at every image position.
        segment: 0 prefix, 1.. conversation, -1 padding.
        position: rotary position; each conversation continues from the end of the prefix.
        loss_mask: the token is supervised.
        codebook_index: sequence index of the state *before* each codebook token.
        masks: target masks with values 0, 1 and `geometry.VOID`; they cover the canvas at any
            square resolution.
        target_valid: the target slot is filled.
        target_conversation: segment of the conversation that contains the target; 0 in unfilled
            slots.
    """

    image: Num[Array, "b y x 3"]
    image_hw: Int32[Array, "b 2"]
    tokens: Int32[Array, "b t"]
    segment: Int32[Array, "b t"]
    position: Int32[Array, "b t"]
    loss_mask: Bool[Array, "b t"]
    codebook_index: Int32[Array, "b m s k"]
    masks: UInt8[Array, "b m Y X"]
    target_valid: Bool[Array, "b m"]
    target_conversation: Int32[Array, "b m"]


class Packed(NamedTuple):
    """The conversations of one image in one sequence: the shared prefix once, then each in turn.

    `text.prompt.pack` builds it; `make_row` adds the image and the masks.

    Attributes:
        tokens: `prompt.IMAGE_TOKEN` at every image position; 0 in the padding.
        segment: 0 prefix, 1.. conversation, -1 padding. A token attends to the prefix and to its
            own segment.
        position: counts through the prefix; each conversation continues from its end.
        loss_mask: the token is supervised, at the state before it.
        codebook_index: sequence index of the state *before* each codebook token; for the first
            token of a conversation, that is the last state of the prefix.
        target_conversation: segment of the target's conversation; 0 where not `target_valid`.
        target_valid: the target slot is filled.
        kept: segment i + 1 is conversation `kept[i]` of the input.
        dropped: number of conversations that did not fit the budget of positions or targets.
    """

    tokens: Int32[np.ndarray, "t"]
    segment: Int32[np.ndarray, "t"]
    position: Int32[np.ndarray, "t"]
    loss_mask: Bool[np.ndarray, "t"]
    codebook_index: Int32[np.ndarray, "m s k"]
    target_conversation: Int32[np.ndarray, "m"]
    target_valid: Bool[np.ndarray, "m"]
    kept: tuple[int, ...]
    dropped: int


class Prediction(NamedTuple):
    """Output of the model: hidden states and next-token logits per position, masks per target.

    Attributes:
        hidden: states of the language model after the final norm.
        text_logits: logits of the *next* token.
        mask_logits: fused logits on a grid of `config.mask_grid`; positive means inside.
    """

    hidden: Float[Array, "b t d"]
    text_logits: Float[Array, "b t v"]
    mask_logits: Float[Array, "b m Y X"]


def make_row(
    packed: Packed,
    *,
    image: UInt8[np.ndarray, "y x 3"],
    image_hw: tuple[int, int],
    masks: UInt8[np.ndarray, "m Y X"],
) -> Batch:
    """Assemble one row of a batch: the arrays of `Batch` without their leading `b`."""
    return Batch(
        image=image,
        image_hw=np.asarray(image_hw, np.int32),
        tokens=packed.tokens,
        segment=packed.segment,
        position=packed.position,
        loss_mask=packed.loss_mask,
        codebook_index=packed.codebook_index,
        masks=masks,
        target_valid=packed.target_valid,
        target_conversation=packed.target_conversation,
    )


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Stack rows of equal shapes into a batch on the host."""
    return Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))


def spec(config: ModelConfig, *, batch: int, length: int, targets: int, masks: int) -> Batch:
    """Return the shapes and dtypes of a batch, for `jax.eval_shape` and ahead-of-time compilation.

    Args:
        config: model configuration.
        batch: number of images.
        length: sequence positions per image.
        targets: target slots per image.
        masks: side of the target masks in pixels.
    """
    canvas, codebook = config.vision.canvas, config.codebook

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    return Batch(
        image=array("uint8", canvas, canvas, 3),
        image_hw=array("int32", 2),
        tokens=array("int32", length),
        segment=array("int32", length),
        position=array("int32", length),
        loss_mask=array("bool", length),
        codebook_index=array("int32", targets, codebook.scales, codebook.tokens_per_scale),
        masks=array("uint8", targets, masks, masks),
        target_valid=array("bool", targets),
        target_conversation=array("int32", targets),
    )


def check(batch: Batch, config: ModelConfig) -> None:
    """Check shapes, dtypes, token ids, image positions and target indices on the host.

    JAX would silently clamp an index that is out of range.

    Raises:
        ValueError: a field is wrong; the message says which, what was found and what was expected.
    """
    expected = spec(
        config,
        batch=batch.tokens.shape[0],
        length=batch.tokens.shape[1],
        targets=batch.target_valid.shape[1],
        masks=batch.masks.shape[-1],
    )
    for name, array, want in zip(Batch._fields, batch, expected, strict=True):
        if array.shape != want.shape or array.dtype != want.dtype:
            raise ValueError(
                f"batch.{name}: found {array.dtype}{list(array.shape)}, "
                f"expected {want.dtype}{list(want.shape)}"
            )
    tokens, segment = np.asarray(batch.tokens), np.asarray(batch.segment)
    if tokens.max(initial=0) >= config.language.vocabulary:
        raise ValueError(
            f"batch.tokens: id {tokens.max()} is outside the vocabulary of "
            f"{config.language.vocabulary}"
        )
    image_positions = (tokens < 0).sum(axis=1)
    if not np.isin(image_positions, (0, config.image_tokens)).all():
        raise ValueError(
            f"batch.tokens: {image_positions.tolist()} image positions per row, "
            f"expected {config.image_tokens} (or 0)"
        )
    valid = np.asarray(batch.target_valid)
    index = np.asarray(batch.codebook_index)[valid]
    if index.size and (index.min() < 0 or index.max() >= tokens.shape[1]):
        raise ValueError(
            f"batch.codebook_index: {index.min()}..{index.max()} leaves the sequence of "
            f"{tokens.shape[1]}"
        )
    conversation = np.where(valid, batch.target_conversation, 0)
    last = segment.max(axis=1, initial=0)
    if (conversation < 0).any() or (conversation > last[:, None]).any():
        raise ValueError(
            f"batch.target_conversation: names a conversation that is not in the row: found "
            f"{conversation.tolist()}, the last conversations are {last.tolist()}"
        )
