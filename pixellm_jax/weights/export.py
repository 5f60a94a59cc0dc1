"""A checkpoint -> the folders of PyTorch weights it was made from, bit for bit."""

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
from pixellm_jax.weights.torch_folder import write_safetensors

SHARD_BYTES = 1 << 30
"""Tensors share a file up to this size; a larger one has its own."""

VISION_FOLDER = "vision_tower"

Arrays = Mapping[str, tensorstore.TensorStore]


class ExportedTensor(NamedTuple):
    """One tensor of the file: its name, its size, and how to read it from the checkpoint."""

    name: str
    nbytes: int
    read: Callable[[], np.ndarray]


def export(
    folder: Path, out: Path, *, progress: Callable[[int, int], None] = lambda new, total: None
) -> None:
    """Writes `out` (the PixelLM layout) and `out/vision_tower` (CLIP), as safetensors.

    `pixellm convert --hf out --vision out/vision_tower` reads them back. One file's tensors at a
    time are in memory. `progress` is called with the bytes just written and the bytes in all.

    Raises:
        InputError: `folder` is not a checkpoint, or `out` is taken or cannot be written.
    """
    config = checkpoint.read_config(folder)
    vocabulary = checkpoint.read_vocabulary(folder, config)
    source = checkpoint.read_source(folder)
    params = checkpoint.open_arrays(folder, checkpoint.PARAMS)
    unused = checkpoint.open_arrays(folder, checkpoint.UNUSED)
    checkpoint.check_arrays(folder, config, params)
    imported = (
        [torch_layout.VISION, torch_layout.MODEL]
        if "config.json" in source
        else [torch_layout.VISION]
    )
    wanted = [name for kind in imported for name in torch_layout.unused(config, kind)]
    if missing := [name for name in wanted if name not in unused]:
        raise InputError(
            f"{folder / checkpoint.UNUSED}: missing {', '.join(missing)}; convert or copy it again"
        )
    tensors = {
        k: list(_tensors(config, params, unused, k))
        for k in (torch_layout.MODEL, torch_layout.VISION)
    }
    total = sum(tensor.nbytes for some in tensors.values() for tensor in some)
    progress(0, total)
    with whole_folder(out) as made:
        vocabulary.save(made)
        (made / VISION_FOLDER).mkdir()
        for kind, place in (
            (torch_layout.MODEL, made),
            (torch_layout.VISION, made / VISION_FOLDER),
        ):
            write_shards(place, tensors[kind], lambda new: progress(new, total))
        if "generation_config.json" in source:
            _write_json(made / "generation_config.json", source["generation_config.json"])
        _write_configs(made, config, source)


def _tensors(
    config: ModelConfig, params: Arrays, unused: Arrays, source: str
) -> Iterator[ExportedTensor]:
    """All tensors of a folder: the table's, trained fusion weights, and what was carried along."""
    for entry in torch_layout.table(config):
        array = params[entry.path]
        itemsize = array.dtype.numpy_dtype.itemsize
        for i, name in enumerate(entry.names if entry.source == source else []):
            layer = array[i] if entry.count else array

            def read(
                layer: tensorstore.TensorStore = layer, entry: torch_layout.Entry = entry
            ) -> np.ndarray:
                return entry.to_torch(checkpoint.read(layer))

            yield ExportedTensor(name, math.prod(entry.torch) * itemsize, read)
    if source == torch_layout.MODEL:
        for path, released in torch_layout.released_fusion(config).items():
            if not np.array_equal(checkpoint.read(params[path]), released):
                yield _same(torch_layout.FUSION[path], params[path])
    shapes = torch_layout.unused(config, source)
    for name, array in unused.items():
        if name.startswith("vision_") == (source == torch_layout.VISION):
            yield _same(name, array)
    for name in sorted(shapes.keys() - unused.keys()):  # a model that never had them
        nbytes = 4 * math.prod(shapes[name])
        yield ExportedTensor(name, nbytes, partial(np.zeros, shapes[name], np.float32))


def _same(name: str, array: tensorstore.TensorStore) -> ExportedTensor:
    nbytes = math.prod(array.shape) * array.dtype.numpy_dtype.itemsize
    return ExportedTensor(name, nbytes, lambda: checkpoint.read(array))


def write_shards(
    folder: Path, tensors: list[ExportedTensor], progress: Callable[[int], None]
) -> None:
    """Files of about `SHARD_BYTES`, and an index if there are several."""
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
        many = len(groups) > 1
        file = (
            f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" if many else "model.safetensors"
        )
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
    """The configs of the imported folders, with our own key where they do not say it all."""
    vision = made / VISION_FOLDER
    _write_json(
        vision / "config.json", source.get("vision.json", torch_config.hf_vision(config.vision))
    )
    model = source.get("config.json", torch_config.hf_model(config))
    _write_json(made / "config.json", model)
    if torch_config.OWN_KEY not in model:
        shapes = {name: entry.torch for entry in torch_layout.table(config) for name in entry.names}
        seen = torch_config.read_vision(vision)
        if torch_config.read_model(made, seen, shapes, config.codebook) == config:
            return
    own = {torch_config.OWN_KEY: dataclasses.asdict(config)}
    _write_json(made / "config.json", {**model, **own})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
