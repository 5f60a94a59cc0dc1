"""Streaming writer of checkpoint folders: parameters go to disk one layer at a time.

Orbax saves whole trees of arrays that are in memory. Here a type handler of ours gives it `Leaf`
objects, which are read only when they are written. This file alone knows those internals of Orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from pixellm_jax.config import ModelConfig
from pixellm_jax.files import whole_folder
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights.checkpoint import CONFIG, PARAMS, SOURCE, TOKENIZER, UNUSED

CHUNK_BYTES = 128 << 20
"""Size of a chunk of an array on disk."""

GROUP_BYTES = 4 << 20
"""Small leaves are written together up to this size, because every call waits for the disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """An array to be written, read only when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int], np.ndarray]
    """`read(i)` returns slice i of a stacked leaf; `read(0)` returns any other leaf."""
    stacked: bool = False
    """The leaf is read and written slice by slice along its first axis."""

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def write_checkpoint(
    out: Path,
    *,
    config: ModelConfig,
    params: Mapping[str, Leaf],
    unused: Mapping[str, Leaf],
    vocabulary: Vocabulary,
    source: Mapping[str, Mapping[str, Any]],
    on_written: Callable[[Leaf], None] = lambda leaf: None,
) -> None:
    """Write a checkpoint folder (layout: see `checkpoint`).

    The folder has a temporary name until it is complete.

    Args:
        out: a new folder.
        config: goes to `config.json`.
        params: parameters by dotted name.
        unused: further tensors to keep for export.
        vocabulary: its files are copied.
        source: JSON files to keep for export, by name.
        on_written: called after each leaf, for progress.

    Raises:
        InputError: `out` exists or cannot be written.
    """
    handlers = type_handlers.create_type_handler_registry((Leaf, _LeafHandler(on_written)))
    process = jax.process_index()
    single_process = ocp.options.MultiprocessingOptions(  # the other processes do not take part
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"write{process}",
    )
    with _quiet_orbax(), whole_folder(out) as folder:
        _write_json(folder / CONFIG, dataclasses.asdict(config))
        vocabulary.save(folder / TOKENIZER)
        (folder / SOURCE).mkdir()
        for name, values in source.items():
            _write_json(folder / SOURCE / name, values)
        for name, leaves in ((PARAMS, params), (UNUSED, unused)):
            if not leaves:
                continue
            chunks = {key: _chunks(leaf) for key, leaf in leaves.items()}
            handler = ocp.PyTreeCheckpointHandler(
                type_handler_registry=handlers,
                use_compression=False,
                multiprocessing_options=single_process,
            )
            with ocp.Checkpointer(handler, multiprocessing_options=single_process) as checkpointer:
                checkpointer.save(
                    (folder / name).absolute(),
                    args=ocp.args.PyTreeSave(dict(leaves), save_args=chunks),
                )


class _LeafHandler(type_handlers.NumpyHandler):
    """Write leaves one after the other and slice by slice, with at most two slices in memory."""

    def __init__(self, on_written: Callable[[Leaf], None]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._on_written = on_written
        self._errors: list[Exception] = []

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        begin = 0
        for end in range(1, len(values) + 1):
            nbytes = sum(leaf.nbytes for leaf in values[begin : end + 1])
            if end < len(values) and nbytes <= GROUP_BYTES:
                continue
            group = slice(begin, end)
            for future in await super().serialize(values[group], infos[group], args[group]):
                future.result()
            if self._errors:
                raise self._errors[0]
            for leaf in values[group]:
                self._on_written(leaf)
            begin = end
        return []

    async def _open_and_write(
        self, value: Leaf, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        try:
            await self._write(value, tspec, ts_context)
        except Exception as error:
            # Raised after the other writes of the group: they must not outlive their event loop.
            self._errors.append(error)

    async def _write(
        self, value: Leaf, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        spec = tensorstore.Spec(tspec)
        array = await tensorstore.open(spec, create=True, open=True, context=ts_context)
        if not value.stacked:
            await array.write(value.read(0))
            return
        previous = None
        try:
            for i in range(value.shape[0]):
                layer = value.read(i)
                if previous is not None:
                    await previous
                previous = array[i].write(layer)
        finally:
            if previous is not None:
                await previous


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silence the warnings that Orbax logs about every checkpoint with a type handler."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _chunks(leaf: Leaf) -> ocp.SaveArgs:
    """Return the chunk layout: one slice of a stacked leaf never shares a chunk with another."""
    if leaf.stacked and leaf.shape[0]:
        return ocp.SaveArgs(chunk_byte_size=max(leaf.nbytes // leaf.shape[0], 1), shard_axes=(0,))
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
