"""Export of a checkpoint to the folders of PyTorch weights it was made from, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore

from pixellm_jax.config import ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.files import whole_folder
from pixellm_jax.weights import checkpoint, torch_config, torch_layout
from pixellm_jax.weights.torch_config import ConfigFile
from pixellm_jax.weights.torch_folder import write_safetensors

SHARD_BYTES = 1 << 30
"""Maximum size of a shard; a larger tensor has a file of its own."""

VISION_FOLDER = "vision_tower"

Arrays = Mapping[str, tensorstore.TensorStore]


class ExportedTensor(NamedTuple):
    """A tensor to be written: its name, its size, and how to read it from the checkpoint."""

    name: str
    nbytes: int
    read: Callable[[], np.ndarray]


def export(
    folder: Path, out: Path, *, progress: Callable[[int, int], None] = lambda new, total: None
) -> None:
    """Write `out` (the PixelLM layout) and `out/vision_tower` (CLIP), as safetensors.

    `pixellm convert --hf out --vision out/vision_tower` reads them back. Memory holds the tensors
    of one file at a time.

    Args:
        folder: checkpoint.
        out: a new folder.
        progress: called with the bytes just written and the total.

    Raises:
        InputError: `folder` is not a checkpoint, or `out` exists or cannot be written.
    """
    config = checkpoint.read_config(folder)
    vocabulary = checkpoint.read_vocabulary(folder, config)
    source = checkpoint.read_source(folder)
    params = checkpoint.open_arrays(folder, checkpoint.PARAMS)
    unused = checkpoint.open_arrays(folder, checkpoint.UNUSED)
    checkpoint.check_arrays(folder, config, params)
    imported = [torch_layout.VISION]
    if "config.json" in source:
        imported.append(torch_layout.MODEL)
    expected = [
        entry.name
        for name in imported
        for entry in torch_layout.table(config, kind="unused", source=name)
    ]
    if missing := [name for name in expected if name not in unused]:
        raise InputError(
            f"{folder / checkpoint.UNUSED}: missing {', '.join(missing)}; convert or copy it again"
        )
    tensors = {
        name: list(_tensors(config, params, unused, name))
        for name in (torch_layout.MODEL, torch_layout.VISION)
    }
    total = sum(tensor.nbytes for group in tensors.values() for tensor in group)
    progress(0, total)
    with whole_folder(out) as made:
        vocabulary.save(made)
        (made / VISION_FOLDER).mkdir()
        write_shards(made, tensors[torch_layout.MODEL], lambda new: progress(new, total))
        write_shards(
            made / VISION_FOLDER,
            tensors[torch_layout.VISION],
            lambda new: progress(new, total),
        )
        if "generation_config.json" in source:
            _write_json(made / "generation_config.json", source["generation_config.json"])
        _write_configs(made, config, source)


def _tensors(
    config: ModelConfig, params: Arrays, unused: Arrays, source: str
) -> Iterator[ExportedTensor]:
    """List the tensors of a folder: parameters, trained fusion weights, then unused tensors."""
    for entry in torch_layout.table(config, kind="required", source=source):
        array = params[entry.path]
        itemsize = array.dtype.numpy_dtype.itemsize
        for i, name in enumerate(entry.names):
            layer = array[i] if entry.count else array

            def read(
                layer: tensorstore.TensorStore = layer, entry: torch_layout.Entry = entry
            ) -> np.ndarray:
                return entry.to_torch(checkpoint.read(layer))

            yield ExportedTensor(name, math.prod(entry.torch) * itemsize, read)
    released = torch_layout.released_fusion(config)
    for entry in torch_layout.table(config, kind="optional", source=source):
        array = params[entry.path]
        if not np.array_equal(checkpoint.read(array), released[entry.path]):
            yield _unchanged(entry.name, array)
    for name, array in unused.items():
        if name.startswith("vision_") == (source == torch_layout.VISION):
            yield _unchanged(name, array)
    rows = torch_layout.table(config, kind="unused", source=source)
    shapes = {row.name: row.torch for row in rows}
    for name in sorted(shapes.keys() - unused.keys()):  # zeros, if the model was not imported
        nbytes = 4 * math.prod(shapes[name])
        yield ExportedTensor(name, nbytes, partial(np.zeros, shapes[name], np.float32))


def _unchanged(name: str, array: tensorstore.TensorStore) -> ExportedTensor:
    nbytes = math.prod(array.shape) * array.dtype.numpy_dtype.itemsize
    return ExportedTensor(name, nbytes, lambda: checkpoint.read(array))


def write_shards(
    folder: Path, tensors: list[ExportedTensor], progress: Callable[[int], None]
) -> None:
    """Write files of at most `SHARD_BYTES`, with an index if there are several."""
    groups: list[list[ExportedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    index: dict[str, str] = {}
    for i, group in enumerate(groups):
        file = "model.safetensors"
        if len(groups) > 1:
            file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / file, {tensor.name: tensor.read() for tensor in group})
        index |= {tensor.name: file for tensor in group}
        progress(sum(tensor.nbytes for tensor in group))
    if len(groups) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )


def _write_configs(made: Path, config: ModelConfig, source: dict[str, dict[str, Any]]) -> None:
    """Write the configs of the imported folders, with our own key where they are incomplete."""
    vision = ConfigFile(
        made / VISION_FOLDER / "config.json",
        source.get("vision.json", torch_config.hf_vision(config.vision)),
    )
    model = ConfigFile(
        made / "config.json", source.get("config.json", torch_config.hf_model(config))
    )
    _write_json(vision.path, vision.values)
    _write_json(model.path, model.values)
    if torch_config.OWN_KEY not in model.values:
        rows = torch_layout.table(config, kind="required")
        shapes = {name: row.torch for row in rows for name in row.names}
        vision_config = torch_config.vision_config(vision)
        if torch_config.pixellm_config(model, vision_config, shapes, config.codebook) == config:
            return
    own = {torch_config.OWN_KEY: dataclasses.asdict(config)}
    _write_json(model.path, {**model.values, **own})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
