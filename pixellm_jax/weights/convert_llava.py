"""A LLaVA folder and a CLIP folder -> the checkpoint that a training starts from."""

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
from pixellm_jax.weights.checkpoint import Leaf
from pixellm_jax.weights.source import SourceFolders, constant, whole

DISCARDED = ("model.mm_projector.", "model.vision_tower.")
"""What a LLaVA folder may hold and a training does not start from: its projector, linear or not, is
not of PixelLM's shape (the released script draws its own, docs/reference_notes.md 4.4), and the
vision tower is read from the CLIP folder."""

TABLES = ("language_model.embedding", "language_model.head")
"""The parameters that have a row per id."""


class Start(NamedTuple):
    """What a start was made of.

    rows: of the embeddings: those of LLaVA, those of the checkpoint. drawn: modules with random
    values. discarded: tensors of the LLaVA folder that are not used.
    """

    config: ModelConfig
    rows: tuple[int, int]
    drawn: tuple[str, ...]
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
    """Reads a LLaVA (or LLaMA) folder and a CLIP folder; writes a checkpoint at `out`.

    The weights of the language model and of the vision encoder stay as they are. The tokenizer
    grows by the codebook, and embeddings and head are brought to its size. What LLaVA does not have
    (projectors, codebook, pixel decoder) is drawn as a new `PixelLM` draws it, fixed by `seed` on
    one kind of device. `template` and `position_resize` override "llava_v1" and "correct".
    `progress` is called with the bytes just written and the bytes in all. Memory holds the new
    parts, and either two layers of a tensor or one table of embeddings, before and after it grows.

    Raises:
        InputError: anything wrong with the folders, all tensors in one report; or with the sizes.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: expected 0 to {2**32 - 1}; choose another")
    folders = SourceFolders.open(model, vision, lora_alpha)
    if torch_config.is_pixellm(folders.shapes):
        raise InputError(
            f"{model}: a PixelLM folder, it has a codebook and a pixel decoder of its own; convert "
            "it without --from-llava, or name a LLaVA folder"
        )
    config = torch_config.read_start(model, folders.vision_config, folders.shapes, codebook, canvas)
    config = dataclasses.replace(
        config,
        template=template or config.template,
        vision=dataclasses.replace(
            config.vision, position_resize=position_resize or config.vision.position_resize
        ),
    )
    vocabulary = Vocabulary.with_codebook(
        model, tokens_per_scale=codebook.tokens_per_scale, scales=codebook.scales
    )
    entries = [
        entry
        for entry in torch_layout.table(config)
        if entry.source == torch_layout.VISION or entry.path.startswith("language_model.")
    ]
    unused = {
        torch_layout.MODEL: {},
        torch_layout.VISION: torch_layout.unused(config, torch_layout.VISION),
    }
    folders.check(entries, unused, ignored=DISCARDED)

    params = {entry.path: folders.leaf(entry) for entry in entries}
    rows = config.language.vocabulary
    language = dataclasses.replace(config.language, vocabulary=vocabulary.size)
    config = dataclasses.replace(config, language=language)
    scale = torch_config.read_initializer_range(model)
    for index, path in enumerate(TABLES):
        random = np.random.default_rng([seed, index])
        params[path] = _with_rows(params[path], vocabulary.size, scale, random)
    drawn = _draw(jax.random.key(seed), config, frozenset(params))
    tensors = folders.tensors
    folders.write(
        out,
        config=config,
        params=params | {path: constant(np.asarray(array)) for path, array in drawn.items()},
        unused={
            name: whole(tensors[torch_layout.VISION][name]) for name in unused[torch_layout.VISION]
        },
        vocabulary=vocabulary,
        source={},
        progress=progress,
    )
    return Start(
        config=config,
        rows=(rows, vocabulary.size),
        drawn=tuple(sorted({path.split(".")[0] for path in drawn})),
        discarded=tuple(name for name in tensors[torch_layout.MODEL] if name.startswith(DISCARDED)),
    )


def _with_rows(old: Leaf, size: int, scale: float, random: np.random.Generator) -> Leaf:
    """A table cut or brought to `size` rows; the new ones ~ N(0, scale).

    So does `resize_token_embeddings` of transformers 4.31 with the exact length, which is how the
    released script makes them (docs/reference_notes.md 6.1). Later releases draw around the
    mean of the old rows instead.
    """
    rows, width = old.shape
    new = random.normal(0, scale, (max(size - rows, 0), width)).astype(old.dtype)

    def read(_: int) -> np.ndarray:
        grown = np.empty((size, width), old.dtype)
        grown[:rows] = old.read(0)[:size]
        grown[rows:] = new
        return grown

    return Leaf(shape=(size, width), dtype=old.dtype, read=read)


@partial(jax.jit, static_argnames=("config", "held"))
def _draw(key: jax.Array, config: ModelConfig, held: frozenset[str]) -> dict[str, jax.Array]:
    """The parameters of a new model that are not `held`; those are never computed."""
    state = nnx.to_flat_state(nnx.state(PixelLM(key, config)))
    named = {".".join(map(str, path)): variable.get_value() for path, variable in state}
    return {name: array for name, array in named.items() if name not in held}
