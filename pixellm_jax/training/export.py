"""A training run -> a model folder, with LoRA pairs merged into the weights beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorstore

from pixellm_jax.errors import InputError
from pixellm_jax.model.lora import LORA
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.checkpoints import CHECKPOINTS, STATE
from pixellm_jax.training.state import Blueprint
from pixellm_jax.weights import checkpoint
from pixellm_jax.weights.writer import Leaf, write_checkpoint

MODEL = "model"


def write_model(
    run: Path,
    step: int,
    out: Path,
    blueprint: Blueprint,
    vocabulary: Vocabulary,
    *,
    init: Path | None = None,
    dtype: str | None = None,
) -> None:
    """Writes the weights of a step as a checkpoint folder, one layer in memory at a time.

    init: where frozen weights are; its unused tensors and configs go along, for export to PyTorch.
    dtype: of all weights; without it they keep that of `init`, or float32.

    Raises:
        InputError: a folder is damaged, or `out` is taken or cannot be written.
    """
    folder = run.absolute() / CHECKPOINTS / str(step)
    saved = checkpoint.open_arrays(folder, STATE)
    first = checkpoint.open_arrays(init) if init is not None else {}
    arrays = {}
    for name in blueprint.shapes:
        if name in blueprint.trainable:
            array = saved.get(f"trainable.{name}")
        else:
            array = saved.get(f"frozen.{name}", first.get(name))
        if array is None:
            raise InputError(
                f"{folder}: has no {name}; is it a step of this run, and was --init the same?"
            )
        arrays[name] = array
    kept = {
        name: np.dtype(dtype) if dtype else _stored(first.get(name, array))
        for name, array in arrays.items()
    }
    unused = checkpoint.open_arrays(init, checkpoint.UNUSED) if init is not None else {}
    write_checkpoint(
        out,
        config=blueprint.config,
        params={
            name: _leaf(name, arrays, kept[name], blueprint)
            for name in arrays
            if LORA not in name.split(".")
        },
        unused={name: _plain(array) for name, array in unused.items()},
        vocabulary=vocabulary,
        source=checkpoint.read_source(init) if init is not None else {},
    )


def _stored(array: tensorstore.TensorStore) -> np.dtype:
    return np.dtype(array.dtype.numpy_dtype)


def _plain(array: tensorstore.TensorStore) -> Leaf:
    return Leaf(
        shape=tuple(array.shape), dtype=_stored(array), read=lambda _: checkpoint.read(array)
    )


def _leaf(
    name: str, arrays: dict[str, tensorstore.TensorStore], dtype: np.dtype, blueprint: Blueprint
) -> Leaf:
    """The array of a name, and the product of its LoRA pair if it has one."""
    array = arrays[name]
    module = name.rpartition(".")[0]
    down, up = (arrays.get(f"{module}.{LORA}.{half}") for half in ("down", "up"))
    stacked = blueprint.axes[name].split()[:1] == ["layer"]
    lora = blueprint.train.lora
    pair = (down, up) if name.endswith(".weight") and down is not None and up is not None else None

    def read(index: int) -> np.ndarray:
        value = checkpoint.read(array[index] if stacked else array)
        if pair is not None and lora is not None:
            first, second = (checkpoint.read(half[index]).astype(np.float32) for half in pair)
            added = lora.alpha / lora.rank * np.tensordot(first, second, axes=1)
            value = value.astype(np.float32) + added
        return value.astype(dtype, copy=False)

    return Leaf(shape=tuple(array.shape), dtype=dtype, read=read, stacked=stacked)
