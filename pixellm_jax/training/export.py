"""Export of a training run as a model folder, with LoRA pairs merged into the base weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import tensorstore

from pixellm_jax.errors import InputError
from pixellm_jax.files import read_optional_json, write_whole
from pixellm_jax.model.lora import LORA
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.checkpoints import CHECKPOINTS, STATE
from pixellm_jax.training.state import Blueprint
from pixellm_jax.weights import checkpoint
from pixellm_jax.weights.writer import Leaf, write_checkpoint

MODEL = "model"
"""Folder of the exported model in the folder of a run."""


def update_model(
    run: Path,
    step: int,
    blueprint: Blueprint,
    vocabulary: Vocabulary,
    *,
    init: Path | None = None,
    dtype: str | None = None,
) -> None:
    """Write the model of a step to RUN/model, unless it is there; replace the model of another.

    RUN/model.json records what RUN/model holds. Arguments as for `write_model`.

    Raises:
        InputError: a folder is damaged or cannot be written, or RUN/model is not of this run.
    """
    folder = run / MODEL
    note = run / f"{MODEL}.json"
    expected = {"step": step, "dtype": dtype}
    if folder.exists() and read_optional_json(note) == expected:
        return
    if note.exists():  # otherwise the folder is not ours to remove
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        write_whole(note, "{}\n")  # from here on an incomplete folder is known as ours
    write_model(run, step, folder, blueprint, vocabulary, init=init, dtype=dtype)
    write_whole(note, json.dumps(expected) + "\n")


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
    """Write the weights of a step as a checkpoint folder, one layer in memory at a time.

    Args:
        run: folder of the run.
        step: a saved step.
        out: folder to write, which must not exist.
        blueprint: blueprint of the run.
        vocabulary: vocabulary of the model.
        init: checkpoint that provides frozen weights; its unused tensors and configs are copied,
            for export to PyTorch.
        dtype: dtype of all weights; by default the dtypes of `init`, or float32.

    Raises:
        InputError: a folder is damaged, or `out` exists or cannot be written.
    """
    folder = run.absolute() / CHECKPOINTS / str(step)
    saved = checkpoint.open_arrays(folder, STATE)
    initial = checkpoint.open_arrays(init) if init is not None else {}
    arrays = {}
    for name in blueprint.shapes:
        if name in blueprint.trainable:
            array = saved.get(f"trainable.{name}")
        else:
            array = saved.get(f"frozen.{name}", initial.get(name))
        if array is None:
            raise InputError(
                f"{folder} has no {name}; check that it is a step of this run, with the same --init"
            )
        arrays[name] = array
    dtypes = {
        name: np.dtype(dtype) if dtype else _stored_dtype(initial.get(name, array))
        for name, array in arrays.items()
    }
    unused = checkpoint.open_arrays(init, checkpoint.UNUSED) if init is not None else {}
    write_checkpoint(
        out,
        config=blueprint.config,
        params={
            name: _merged_leaf(name, arrays, dtypes[name], blueprint)
            for name in arrays
            if LORA not in name.split(".")
        },
        unused={name: _copied_leaf(array) for name, array in unused.items()},
        vocabulary=vocabulary,
        source=checkpoint.read_source(init) if init is not None else {},
    )


def _stored_dtype(array: tensorstore.TensorStore) -> np.dtype:
    return np.dtype(array.dtype.numpy_dtype)


def _copied_leaf(array: tensorstore.TensorStore) -> Leaf:
    return Leaf(
        shape=tuple(array.shape), dtype=_stored_dtype(array), read=lambda _: checkpoint.read(array)
    )


def _merged_leaf(
    name: str, arrays: dict[str, tensorstore.TensorStore], dtype: np.dtype, blueprint: Blueprint
) -> Leaf:
    """Return the array of a name, plus the product of its LoRA pair if it has one."""
    array = arrays[name]
    module = name.rpartition(".")[0]
    down, up = (arrays.get(f"{module}.{LORA}.{half}") for half in ("down", "up"))
    stacked = blueprint.axes[name].split()[:1] == ["layer"]
    lora = blueprint.train.lora
    pair = (down, up) if name.endswith(".weight") and down is not None and up is not None else None

    def read(index: int) -> np.ndarray:
        value = checkpoint.read(array[index] if stacked else array)
        if pair is not None and lora is not None:
            left, right = (checkpoint.read(half[index]).astype(np.float32) for half in pair)
            added = lora.alpha / lora.rank * np.tensordot(left, right, axes=1)
            value = value.astype(np.float32) + added
        return value.astype(dtype, copy=False)

    return Leaf(shape=tuple(array.shape), dtype=dtype, read=read, stacked=stacked)
