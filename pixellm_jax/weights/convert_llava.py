"""Conversion of a LLaVA folder and a CLIP folder to the checkpoint that a training starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from pixellm_jax.config import CodebookConfig, ModelConfig, VisionConfig
from pixellm_jax.errors import InputError
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights import torch_config, torch_layout
from pixellm_jax.weights.source import SourceFolders, in_memory
from pixellm_jax.weights.writer import Leaf

DISCARDED = ("model.mm_projector.", "model.vision_tower.")
"""Prefixes of LLaVA tensors that a training does not start from. LLaVA's projector, linear or not,
does not have PixelLM's shape (the released script initialises a new one, docs/reference_notes.md
4.4), and the vision tower is read from the CLIP folder."""

TABLES = ("language_model.embedding", "language_model.head")
"""Parameters that have a row per id."""


class Start(NamedTuple):
    """Report of a conversion from LLaVA.

    Attributes:
        config: the model.
        rows: number of embedding rows in LLaVA and in the checkpoint.
        initialised: modules with new random values.
        discarded: tensors of the LLaVA folder that are not used.
    """

    config: ModelConfig
    rows: tuple[int, int]
    initialised: tuple[str, ...]
    discarded: tuple[str, ...]


def start_from_llava(
    model: Path,
    vision: Path,
    out: Path,
    *,
    codebook: CodebookConfig,
    canvas: int = VisionConfig.canvas,
    template: str | None = None,
    position_resize: str | None = None,
    lora_alpha: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda new, total: None,
) -> Start:
    """Convert a LLaVA (or LLaMA) folder and a CLIP folder.

    The weights of the language model and of the vision encoder stay as they are. The tokenizer
    grows by the codebook, and embeddings and head are resized to match. What LLaVA does not have
    (projectors, codebook, pixel decoder) is initialised as in a new `PixelLM`; the values depend
    on `seed` and the kind of device only. Memory holds the new parts, and either two layers of a
    tensor or one table of embeddings, before and after it grows.

    Args:
        model: LLaVA folder.
        vision: CLIP folder.
        out: new checkpoint folder.
        codebook: tokens per scale and scales.
        canvas: side of the square image in pixels, a multiple of the patch size.
        template: conversation template, instead of "llava_v1".
        position_resize: form of the position table, instead of "correct".
        lora_alpha: scale of LoRA tensors, instead of adapter_config.json.
        seed: of the new parts, 0 to 2**32 - 1.
        progress: called with the bytes just written and the total.

    Raises:
        InputError: anything wrong with the folders or sizes; all wrong tensors are in one report.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: expected 0 to {2**32 - 1}; choose another")
    folders = SourceFolders.open(model, vision, lora_alpha)
    if torch_config.is_pixellm(folders.shapes):
        raise InputError(
            f"{model}: a PixelLM folder, which already has a codebook and a pixel decoder; convert "
            "it without --from-llava, or give a LLaVA folder"
        )
    config = torch_config.llava_start_config(
        folders.model_json,
        folders.vision_config,
        folders.shapes,
        codebook,
        canvas=canvas,
        template=template,
        position_resize=position_resize,
    )
    vocabulary = Vocabulary.with_codebook(
        model, tokens_per_scale=codebook.tokens_per_scale, scales=codebook.scales
    )
    entries = [
        entry
        for entry in torch_layout.table(config)
        if entry.source == torch_layout.VISION or entry.path.startswith("language_model.")
    ]
    folders.check(entries, ignored=DISCARDED)

    params = folders.params(entries)
    old_rows = config.language.vocabulary
    language = dataclasses.replace(config.language, vocabulary=vocabulary.size)
    config = dataclasses.replace(config, language=language)
    scale = torch_config.initializer_range(folders.model_json)
    for index, path in enumerate(TABLES):
        random = np.random.default_rng([seed, index])
        params[path] = _resize_table(params[path], vocabulary.size, scale, random)
    new = _initialise(jax.random.key(seed), config, frozenset(params))
    folders.write(
        out,
        config=config,
        params=params | {path: in_memory(np.asarray(array)) for path, array in new.items()},
        unused=folders.unused(entries),
        vocabulary=vocabulary,
        source={},
        progress=progress,
    )
    names = folders.tensors[torch_layout.MODEL]
    return Start(
        config=config,
        rows=(old_rows, vocabulary.size),
        initialised=tuple(sorted({path.split(".")[0] for path in new})),
        discarded=tuple(name for name in names if name.startswith(DISCARDED)),
    )


def _resize_table(old: Leaf, size: int, scale: float, random: np.random.Generator) -> Leaf:
    """Cut or extend a table to `size` rows; the new rows are N(0, scale).

    This is `resize_token_embeddings` of transformers 4.31 with the exact length, as the released
    script calls it (docs/reference_notes.md 6.1). Later releases sample around the mean of the
    old rows instead.
    """
    rows, width = old.shape
    new = random.normal(0, scale, (max(size - rows, 0), width)).astype(old.dtype)

    def read(_: int) -> np.ndarray:
        table = np.empty((size, width), old.dtype)
        table[:rows] = old.read(0)[:size]
        table[rows:] = new
        return table

    return Leaf(shape=(size, width), dtype=old.dtype, read=read)


@partial(jax.jit, static_argnames=("config", "known"))
def _initialise(key: jax.Array, config: ModelConfig, known: frozenset[str]) -> dict[str, jax.Array]:
    """Initialise the parameters of a new model; those in `known` are never computed."""
    state = nnx.to_flat_state(nnx.state(PixelLM(key, config)))
    named = {".".join(map(str, path)): variable.get_value() for path, variable in state}
    return {name: array for name, array in named.items() if name not in known}
