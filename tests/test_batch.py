"""The contract: `spec` gives its shapes, `check` finds what would go wrong in silence."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from pixellm_jax.batch import Batch, check, spec
from pixellm_jax.config import (
    CodebookConfig,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from pixellm_jax.images.geometry import VOID
from pixellm_jax.model.pixellm import PixelLM

CONFIG = ModelConfig(
    vision=VisionConfig(
        width=14, heads=2, layers=3, mlp=29, patch=3, canvas=15, table=7, taps=(-1, 1)
    ),
    language=LanguageConfig(
        vocabulary=53, width=11, layers=2, heads=6, kv_heads=2, head=10, mlp=23
    ),
    codebook=CodebookConfig(tokens_per_scale=3, scales=2),
    decoder=DecoderConfig(width=24, heads=3, mlp=19, depth=1),
    image_grid=3,
)
B, LENGTH, TARGETS, MASKS = 2, 37, 5, 13


def valid() -> Batch:
    """Row 0 has two conversations and two targets, row 1 one of each; the last slots are empty."""
    shapes = spec(CONFIG, batch=B, length=LENGTH, targets=TARGETS, masks=MASKS)
    batch = Batch(*(np.zeros(field.shape, field.dtype) for field in shapes))
    batch.image_hw[:] = 15, 11
    batch.tokens[:, :10], batch.tokens[:, 1:10] = 1, -200
    batch.tokens[:, 10:] = 52
    batch.segment[:, 10:] = 1
    batch.segment[0, 20:] = 2
    batch.segment[:, 35:] = -1
    batch.position[:] = np.arange(LENGTH)
    batch.loss_mask[:, 30:35] = True
    batch.codebook_index[:, :2] = LENGTH - 1
    batch.masks[:] = VOID
    batch.target_valid[0, :2] = batch.target_valid[1, :1] = True
    batch.target_conversation[0, :2] = 1, 2
    batch.target_conversation[1, 0] = 1
    return batch


def put(name: str, place: tuple | int, value: object) -> Batch:
    batch = valid()
    getattr(batch, name)[place] = value
    return batch


def test_a_valid_batch_is_accepted():
    check(valid(), CONFIG)


def test_empty_slots_may_hold_anything():
    batch = valid()
    batch.codebook_index[~batch.target_valid] = -7
    batch.target_conversation[~batch.target_valid] = 99
    batch.masks[~batch.target_valid] = 77
    check(batch, CONFIG)


def test_rows_of_text_and_batches_without_targets_are_accepted():
    check(put("tokens", 1, 3), CONFIG)
    batch = valid()
    slots = ("codebook_index", "masks", "target_valid", "target_conversation")
    check(batch._replace(**{name: getattr(batch, name)[:, :0] for name in slots}), CONFIG)


FAULTS = {
    "dtype": (
        valid()._replace(image=valid().image.astype(np.float32)),
        r"batch\.image: found float32",
    ),
    "shape": (
        valid()._replace(position=valid().position[:, :-1]),
        r"batch\.position: found int32\[2, 36\], expected int32\[2, 37\]",
    ),
    "rows": (
        valid()._replace(image=valid().image[:1]),
        r"batch\.image: found uint8\[1, 15, 15, 3\]",
    ),
    "canvas": (
        valid()._replace(image=valid().image[:, :-1]),
        r"batch\.image: found uint8\[2, 14, 15, 3\]",
    ),
    "masks not square": (valid()._replace(masks=valid().masks[:, :, 1:]), r"batch\.masks: found"),
    "other N": (
        valid()._replace(codebook_index=valid().codebook_index[..., :2]),
        r"batch\.codebook_index: found int32\[2, 5, 2, 2\], expected int32\[2, 5, 2, 3\]",
    ),
    "wide integers": (
        valid()._replace(tokens=valid().tokens.astype(np.int64)),
        r"batch\.tokens: found int64",
    ),
    "id beyond the vocabulary": (
        put("tokens", (1, 30), 53),
        r"batch\.tokens: id 53 .* vocabulary of 53",
    ),
    "image cut off": (
        put("tokens", (0, 9), 3),
        r"batch\.tokens: \[8, 9\] image positions .* expected 9",
    ),
    "two images": (put("tokens", (1, 20), -200), r"batch\.tokens: \[9, 10\] image positions"),
    "index before the sequence": (
        put("codebook_index", (1, 0, 1, 2), -1),
        r"batch\.codebook_index: -1\.\.36 leaves the sequence of 37",
    ),
    "index behind the sequence": (
        put("codebook_index", (0, 1, 0, 0), 37),
        r"batch\.codebook_index: 36\.\.37 leaves",
    ),
    "conversation of another row": (
        put("target_conversation", (1, 0), 2),
        r"batch\.target_conversation: names a conversation that is not in the row",
    ),
    "no conversation": (
        put("target_conversation", (0, 1), -1),
        r"batch\.target_conversation: names",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_kind_of_fault_is_named(fault):
    batch, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        check(batch, CONFIG)


@pytest.mark.parametrize(("scales", "tokens"), [(1, 3), (2, 1), (3, 2)])
def test_spec_is_what_the_model_takes(scales, tokens):
    config = dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(CONFIG.vision, taps=(-1, 1, 2)[:scales]),
        codebook=CodebookConfig(scales=scales, tokens_per_scale=tokens),
    )
    shapes = spec(config, batch=B, length=LENGTH, targets=TARGETS, masks=MASKS)
    model = jax.eval_shape(partial(PixelLM, config=config), jax.random.key(0))
    found = jax.eval_shape(lambda model, batch: model(batch), model, shapes)
    assert found.hidden.shape == (B, LENGTH, 11)
    assert found.text_logits.shape == (B, LENGTH, 53)
    assert found.mask_logits.shape == (B, TARGETS, 20, 20)
    check(Batch(*(np.zeros(field.shape, field.dtype) for field in shapes)), config)
