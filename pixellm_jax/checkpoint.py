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

logging.getLogger("absl").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of a checkpoint that is read only when its turn to be written comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


class _LeafHandler(type_handlers.NumpyHandler):
    """Writes leaves one after the other, so that no more than one is ever in memory."""

    def __init__(self, written: Callable[[Leaf], None]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._written = written

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for leaf, info, arg in zip(values, infos, args, strict=True):
            for future in await super().serialize([leaf.read()], [info], [arg]):
                future.result()
            self._written(leaf)
        return []


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
            chunked = {key: ocp.SaveArgs(chunk_byte_size=128 << 20) for key in leaves}
            handler = ocp.PyTreeCheckpointHandler(
                type_handler_registry=handlers, use_compression=False
            )
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(
                    (folder / name).absolute(),
                    args=ocp.args.PyTreeSave(dict(leaves), save_args=chunked),
                )


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


def read_leaves(folder: Path, part: str = PARAMS) -> dict[str, Leaf]:
    """The arrays of a checkpoint, to be read one at a time (dotted names)."""
    path = (folder / part).absolute()
    if not path.is_dir():
        return {}
    tree = _metadata(path)

    def leaf(name: str, meta: Any) -> Leaf:
        def read() -> np.ndarray:
            item = {name: jax.ShapeDtypeStruct(meta.shape, meta.dtype)}
            restore = ocp.args.PyTreeRestore(
                item=item,
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
                partial_restore=True,
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                return checkpointer.restore(path, args=restore)[name]

        return Leaf(shape=tuple(meta.shape), dtype=np.dtype(meta.dtype), read=read)

    return {name: leaf(name, meta) for name, meta in tree.items()}


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
