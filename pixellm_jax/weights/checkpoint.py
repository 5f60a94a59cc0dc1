"""A model folder on disk: opened, checked, and loaded onto devices.

config.json   the model config
params/       Orbax: dotted parameter name -> array
unused/       Orbax: tensors of the imported folders that only an export needs
tokenizer/    files of the tokenizer
source/       configs of the imported folders, for export

`writer` writes such folders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from flax import nnx

from pixellm_jax.config import ModelConfig, from_mapping
from pixellm_jax.errors import InputError
from pixellm_jax.files import read_json
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import weight_sharding
from pixellm_jax.text.prompt import TEMPLATES
from pixellm_jax.text.vocabulary import Vocabulary

CONFIG, PARAMS, UNUSED = "config.json", "params", "unused"
TOKENIZER, SOURCE = "tokenizer", "source"

SHAPES_MODEL = Path(__file__).parents[1] / "assets" / "shapes_model"
"""The checkpoint that comes with the package: a small model for images of rendered shapes."""

_HEADER = b"/.zarray"
_DAMAGES = (ValueError, OSError, RuntimeError, NotImplementedError)
"""Exceptions that tensorstore raises for damaged files."""


def read_config(folder: Path) -> ModelConfig:
    """Return the model config of a checkpoint folder.

    Raises:
        InputError: the folder is not a checkpoint, or its config is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make one with `pixellm convert`")
    if not (folder / PARAMS).is_dir():
        raise InputError(
            f"{folder}: no {PARAMS}/ in it, so it is not a checkpoint; convert a PyTorch "
            f"folder with `pixellm convert --hf {folder} --vision CLIP --out NEW`"
        )
    path = folder / CONFIG
    values = read_json(path)
    try:
        config = from_mapping(ModelConfig, values)
        if config.template not in TEMPLATES:
            names = ", ".join(TEMPLATES)
            raise InputError(f"config.template: found {config.template!r}, expected one of {names}")
    except InputError as error:
        raise InputError(f"{path}: {error}; correct it or convert again") from None
    return config


def read_vocabulary(folder: Path, config: ModelConfig) -> Vocabulary:
    """Return the tokenizer of a checkpoint folder.

    Raises:
        InputError: files are missing or damaged, or the tokenizer belongs to another model.
    """
    vocabulary = Vocabulary.load(folder / TOKENIZER, scales=config.codebook.scales)
    size, tokens_per_scale = vocabulary.size, vocabulary.tokens_per_scale
    if size > config.language.vocabulary or tokens_per_scale != config.codebook.tokens_per_scale:
        raise InputError(
            f"{folder / TOKENIZER}: {size} ids and {tokens_per_scale} codebook tokens per scale, "
            f"{folder / CONFIG} has {config.language.vocabulary} and "
            f"{config.codebook.tokens_per_scale}: not the tokenizer of this model; convert again"
        )
    return vocabulary


def read_source(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the configs of the imported folders, by file name."""
    return {path.name: read_json(path) for path in sorted((folder / SOURCE).glob("*.json"))}


def open_arrays(folder: Path, part: str = PARAMS) -> dict[str, tensorstore.TensorStore]:
    """Open the arrays of a checkpoint, by dotted name; `read` loads them into memory.

    Raises:
        InputError: the files are damaged.
    """
    path = (folder / part).absolute()
    if not path.is_dir():
        return {}
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    try:
        keys = tensorstore.KvStore.open(store).result().list().result()
        names = sorted(key.decode()[: -len(_HEADER)] for key in keys if key.endswith(_HEADER))
        if not names:
            raise ValueError("no arrays in it")
        kind = {"driver": "zarr", "fill_missing_data_reads": False}
        opening = {
            name: tensorstore.open({**kind, "kvstore": {**store, "path": f"{name}/"}}, open=True)
            for name in names
        }
        return {name: future.result() for name, future in opening.items()}
    except _DAMAGES as error:
        raise InputError(f"{path}: {_damage(error)}") from None


def read(array: tensorstore.TensorStore) -> np.ndarray:
    """Load an array, or the part of it that `array[...]` selects.

    Raises:
        InputError: the files are damaged.
    """
    try:
        return array.read().result()
    except _DAMAGES as error:
        raise InputError(_damage(error)) from None


def check_arrays(
    folder: Path, config: ModelConfig, arrays: Mapping[str, tensorstore.TensorStore]
) -> None:
    """Check names and shapes of the arrays against the config.

    Raises:
        InputError: they disagree; every such array is named.
    """
    state = nnx.to_flat_state(nnx.state(abstract_model(config)))
    expected = {".".join(map(str, path)): variable.get_value().shape for path, variable in state}
    actual = {name: tuple(array.shape) for name, array in arrays.items()}
    problems = [
        f"{name}: found {actual.get(name, 'nothing')}, expected {shape}"
        for name, shape in expected.items()
        if actual.get(name) != shape
    ] + [f"{name}: not part of the model" for name in sorted(actual.keys() - expected.keys())]
    if problems:
        raise InputError(
            f"{folder}: {CONFIG} and {PARAMS}/ disagree: {'; '.join(problems)}; undo the change or "
            "convert again"
        )


def load_model(
    folder: Path,
    *,
    dtype: str | None = None,
    sharding: jax.sharding.Sharding | jax.sharding.Mesh | None = None,
) -> PixelLM:
    """Load a model; parameters keep the dtype they are stored in.

    Example:
        >>> model = load_model(Path("pixellm-7b"), dtype="bfloat16")

    Args:
        folder: checkpoint, as `pixellm convert` or a training writes it.
        dtype: compute dtype, instead of the one in the config.
        sharding: of all arrays, or a mesh over which the rules of `sharding.py` spread them; by
            default the first device. Every device reads its own shards.

    Raises:
        InputError: not a checkpoint, or its arrays do not fit its config (each is named).
    """
    folder = Path(folder)
    config = read_config(folder)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    arrays = open_arrays(folder)
    check_arrays(folder, config, arrays)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    graph, state = nnx.split(abstract_model(config))
    for path, variable in nnx.to_flat_state(state):
        array = arrays[".".join(map(str, path))]
        target = sharding
        if isinstance(target, jax.sharding.Mesh):
            target = weight_sharding(variable.get_metadata()["axes"], array.shape, target)
        variable.set_value(restore(array, target))
    return nnx.merge(graph, state)


def restore(
    array: tensorstore.TensorStore, sharding: jax.sharding.Sharding, dtype: Any = None
) -> jax.Array:
    """Load an array straight into its shards, in its stored dtype or in `dtype`.

    Raises:
        InputError: the files are damaged.
    """
    dtype = dtype or array.dtype.numpy_dtype
    return jax.make_array_from_callback(
        array.shape, sharding, lambda part: read(array[part]).astype(dtype, copy=False)
    )


def abstract_model(config: ModelConfig) -> PixelLM:
    """Return the model with shapes instead of arrays; nothing is allocated or computed."""
    return jax.eval_shape(lambda key: PixelLM(key, config), jax.random.key(0))


def _damage(error: Exception) -> str:
    line = str(error).split(" [source")[0] or type(error).__name__  # tensorstore names the file
    return f"not a complete Orbax checkpoint ({line}); convert or copy it again"
