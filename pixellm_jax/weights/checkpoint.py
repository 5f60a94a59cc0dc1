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
from pixellm_jax.files import read_json, whole_folder
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import weight_sharding
from pixellm_jax.text.prompt import TEMPLATES
from pixellm_jax.text.vocabulary import Vocabulary

CONFIG, PARAMS, UNUSED = "config.json", "params", "unused"
TOKENIZER, SOURCE = "tokenizer", "source"

SHAPES_MODEL = Path(__file__).parents[1] / "assets" / "shapes_model"
"""The checkpoint that comes with the package: a small model of drawn shapes."""

CHUNK_BYTES = 128 << 20
TOGETHER_BYTES = 4 << 20

_HEADER = b"/.zarray"
_DAMAGES = (ValueError, OSError, RuntimeError, NotImplementedError)  # as tensorstore raises them


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
    """Writes leaves one after the other, and slice by slice, so that memory holds two slices.

    Small leaves go together: every call waits for the disk.
    """

    def __init__(self, written: Callable[[Leaf], None]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._written = written
        self._errors: list[Exception] = []

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        begin = 0
        for end in range(1, len(values) + 1):
            following = sum(leaf.nbytes for leaf in values[begin : end + 1])
            if end < len(values) and following <= TOGETHER_BYTES:
                continue
            part = slice(begin, end)
            for future in await super().serialize(values[part], infos[part], args[part]):
                future.result()
            if self._errors:
                raise self._errors[0]
            for leaf in values[part]:
                self._written(leaf)
            begin = end
        return []

    async def _open_and_write(
        self, value: Leaf, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        try:
            await self._write(value, tspec, ts_context)
        except Exception as error:  # raised once the others have ended, or they outlive their loop
            self._errors.append(error)

    async def _write(
        self, value: Leaf, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        spec = tensorstore.Spec(tspec)
        array = await tensorstore.open(spec, create=True, open=True, context=ts_context)
        if not value.stacked:
            await array.write(value.read(0))
            return
        before = None
        try:
            for i in range(value.shape[0]):
                part = value.read(i)
                if before is not None:
                    await before
                before = array[i].write(part)
        finally:
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
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(  # other processes know nothing of it
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"write{own}"
    )
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
                type_handler_registry=handlers,
                use_compression=False,
                multiprocessing_options=alone,
            )
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
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
    """The tokenizer of a checkpoint folder.

    Raises:
        InputError: files are missing or damaged, or it is the tokenizer of another model.
    """
    vocabulary = Vocabulary.load(folder / TOKENIZER, scales=config.codebook.scales)
    found = vocabulary.size, vocabulary.tokens_per_scale
    if found[0] > config.language.vocabulary or found[1] != config.codebook.tokens_per_scale:
        raise InputError(
            f"{folder / TOKENIZER}: {found[0]} ids and {found[1]} codebook tokens per scale, "
            f"{folder / CONFIG} has {config.language.vocabulary} and "
            f"{config.codebook.tokens_per_scale}: not the tokenizer of this model; convert again"
        )
    return vocabulary


def read_source(folder: Path) -> dict[str, dict[str, Any]]:
    """The configs of the imported folders, by file name."""
    return {path.name: read_json(path) for path in sorted((folder / SOURCE).glob("*.json"))}


def open_arrays(folder: Path, part: str = PARAMS) -> dict[str, tensorstore.TensorStore]:
    """The arrays of a checkpoint by dotted name, on disk; `read` brings them into memory.

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
    """An array that is on disk, or the part of it that `array[...]` selects.

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
    """The arrays are those of the config.

    Raises:
        InputError: they are not; each is named.
    """
    state = nnx.to_flat_state(nnx.state(abstract_model(config)))
    wanted = {".".join(map(str, path)): variable.get_value().shape for path, variable in state}
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    problems = [
        f"{name}: found {found.get(name, 'nothing')}, expected {shape}"
        for name, shape in wanted.items()
        if found.get(name) != shape
    ] + [f"{name}: not part of the model" for name in sorted(found.keys() - wanted.keys())]
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
    """The model, its parameters in the dtype they are stored in, restored straight onto `sharding`.

    `dtype` replaces the compute dtype of the config. `sharding`: for all arrays, or a mesh over
    which they are spread by the rules of `sharding.py`; by default the first device.

    Raises:
        InputError: not a checkpoint, or its arrays are not those of its config (each named).
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
        array, place = arrays[".".join(map(str, path))], sharding
        if isinstance(place, jax.sharding.Mesh):
            place = weight_sharding(variable.get_metadata()["axes"], array.shape, place)
        variable.set_value(restore(array, place))
    return nnx.merge(graph, state)


def restore(
    array: tensorstore.TensorStore, sharding: jax.sharding.Sharding, dtype: Any = None
) -> jax.Array:
    """An array that is on disk, read straight into its shards, in its own or another dtype.

    Raises:
        InputError: the files are damaged.
    """
    kept = dtype or array.dtype.numpy_dtype
    return jax.make_array_from_callback(
        array.shape, sharding, lambda part: read(array[part]).astype(kept, copy=False)
    )


def abstract_model(config: ModelConfig) -> PixelLM:
    """The model with shapes instead of arrays: no memory, no time."""
    return jax.eval_shape(lambda key: PixelLM(key, config), jax.random.key(0))


def _damage(error: Exception) -> str:
    line = str(error).split(" [source")[0] or type(error).__name__  # tensorstore names the file
    return f"not a complete Orbax checkpoint ({line}); convert or copy it again"


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
