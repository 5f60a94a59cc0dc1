"""A model on disk: an Orbax checkpoint with the config and the tokenizer beside it.

config.json   the model config
params/       Orbax: dotted parameter name -> array
unused/       Orbax: tensors of the imported folders that only an export needs
tokenizer/    the tokenizer's files
source/       configs of the imported folders, for export
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from orbax.checkpoint import type_handlers

from pixellm_jax.config import ModelConfig, from_mapping
from pixellm_jax.errors import InputError
from pixellm_jax.folders import whole_folder
from pixellm_jax.hf_config import read_json
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.vocabulary import Vocabulary

CONFIG, PARAMS, UNUSED = "config.json", "params", "unused"
TOKENIZER, SOURCE = "tokenizer", "source"

CHUNK_BYTES = 128 << 20

logging.getLogger("absl").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array to be written, read only when its turn comes.

    A `stacked` leaf is read and written slice by slice along its first axis: `read(i)` gives slice
    i. Of another, `read(0)` gives the whole.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int], np.ndarray]
    stacked: bool = False

    @property
    def size(self) -> int:
        """Entries of the array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.size * self.dtype.itemsize


class _LeafHandler(type_handlers.NumpyHandler):
    """Writes leaves one after the other, and slice by slice, so that memory holds two slices."""

    def __init__(self, written: Callable[[Leaf], None]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._written = written

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for leaf, info, arg in zip(values, infos, args, strict=True):
            for future in await super().serialize([leaf], [info], [arg]):
                future.result()
            self._written(leaf)
        return []

    async def _open_and_write(
        self, value: Leaf, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        spec = tensorstore.Spec(tspec)
        array = await tensorstore.open(spec, create=True, open=True, context=ts_context)
        if not value.stacked:
            await array.write(value.read(0))
            return
        before = None
        for i in range(value.shape[0]):
            part = value.read(i)
            if before is not None:
                await before
            before = array[i].write(part)
        if before is not None:
            await before


def write(
    out: Path,
    *,
    config: ModelConfig,
    params: Mapping[str, Leaf],
    unused: Mapping[str, Leaf],
    vocabulary: Vocabulary,
    source: Mapping[str, Mapping[str, Any]],
    written: Callable[[Leaf], None] = lambda leaf: None,
) -> None:
    """Writes a checkpoint folder, one leaf at a time, under a temporary name that is renamed last.

    `source`: JSON files to keep for export. `written` is called after every leaf, for progress.

    Raises:
        InputError: `out` is taken or cannot be written.
    """
    handlers = type_handlers.create_type_handler_registry((Leaf, _LeafHandler(written)))
    with whole_folder(out) as folder:
        _write_json(folder / CONFIG, dataclasses.asdict(config))
        vocabulary.save(folder / TOKENIZER)
        (folder / SOURCE).mkdir()
        for name, values in source.items():
            _write_json(folder / SOURCE / name, values)
        for name, leaves in ((PARAMS, params), (UNUSED, unused)):
            if not leaves:
                continue
            chunked = {key: _chunks(leaf) for key, leaf in leaves.items()}
            handler = ocp.PyTreeCheckpointHandler(
                type_handler_registry=handlers, use_compression=False
            )
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(
                    (folder / name).absolute(),
                    args=ocp.args.PyTreeSave(dict(leaves), save_args=chunked),
                )


def _chunks(leaf: Leaf) -> ocp.SaveArgs:
    """Chunks on disk: slices of a stacked leaf, so that writing one never touches another."""
    if leaf.stacked and leaf.shape[0]:
        return ocp.SaveArgs(chunk_byte_size=max(leaf.nbytes // leaf.shape[0], 1), shard_axes=(0,))
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)


def read_config(folder: Path) -> ModelConfig:
    """The model config of a checkpoint folder.

    Raises:
        InputError: the folder is not a checkpoint, or its config is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make one with `pixellm convert`")
    if not (folder / PARAMS).is_dir():
        raise InputError(
            f"{folder}: no {PARAMS}/ in it, so it is not a checkpoint of ours; convert a PyTorch "
            f"folder with `pixellm convert --hf {folder} --vision CLIP --out NEW`"
        )
    return from_mapping(ModelConfig, read_json(folder / CONFIG), str(folder / CONFIG))


def read_vocabulary(folder: Path, config: ModelConfig) -> Vocabulary:
    """The tokenizer of a checkpoint folder."""
    return Vocabulary.load(folder / TOKENIZER, scales=config.codebook.scales)


def read_source(folder: Path) -> dict[str, dict[str, Any]]:
    """The configs of the imported folders, by file name."""
    return {path.name: read_json(path) for path in sorted((folder / SOURCE).glob("*.json"))}


def open_arrays(folder: Path, part: str = PARAMS) -> dict[str, tensorstore.TensorStore]:
    """The arrays of a checkpoint by dotted name, on disk; `array[i].read().result()` reads."""
    path = (folder / part).absolute()
    if not path.is_dir():
        return {}
    store = {"driver": "ocdbt", "base": path.as_uri() + "/"}
    return {
        name: tensorstore.open(
            {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}, open=True
        ).result()
        for name in _metadata(path)
    }


def load_model(
    folder: Path, *, dtype: str | None = None, sharding: jax.sharding.Sharding | None = None
) -> PixelLM:
    """The model, its parameters in the dtype they are stored in, restored straight onto `sharding`.

    `dtype` replaces the compute dtype of the config. Without `sharding`: the first device.

    Raises:
        InputError: not a checkpoint, or its arrays are not those of its config (each named).
    """
    folder = Path(folder)
    config = read_config(folder)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    abstract = abstract_model(config)
    graph, state = nnx.split(abstract)
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    path = (folder / PARAMS).absolute()
    found = {name: tuple(meta.shape) for name, meta in _metadata(path).items()}
    problems = [
        f"{name}: found {found.get(name, 'nothing')}, expected {variable.get_value().shape}"
        for name, variable in variables.items()
        if found.get(name) != variable.get_value().shape
    ] + [f"{name}: not part of the model" for name in found.keys() - variables.keys()]
    if problems:
        raise InputError(f"{folder}: {CONFIG} and {PARAMS}/ disagree: {'; '.join(problems)}")
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=sharding)
        for name, meta in _metadata(path).items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(path, target)
    for name, variable in variables.items():
        variable.set_value(arrays[name])
    return nnx.merge(graph, state)


def abstract_model(config: ModelConfig) -> PixelLM:
    """The model with shapes instead of arrays: no memory, no time."""
    return jax.eval_shape(lambda key: PixelLM(key, config), jax.random.key(0))


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return dict(checkpointer.metadata(path).item_metadata.tree)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a complete Orbax checkpoint ({line}); convert again"
        ) from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
