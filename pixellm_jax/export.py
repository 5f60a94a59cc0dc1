"""A checkpoint -> the folders of PyTorch weights it was made from, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pixellm_jax import checkpoint, hf, hf_config
from pixellm_jax.checkpoint import Leaf
from pixellm_jax.config import ModelConfig
from pixellm_jax.folders import whole_folder
from pixellm_jax.tensor_files import write_safetensors

SHARD_BYTES = 1 << 30
"""Small tensors share a file up to this size; a stacked parameter larger than it has its own."""

VISION_FOLDER = "vision_tower"


class Part(NamedTuple):
    """What one array of ours becomes: names and shapes in the file, and how to get the tensors."""

    leaf: Leaf
    shapes: dict[str, tuple[int, ...]]
    tensors: Callable[[np.ndarray], Iterator[tuple[str, np.ndarray]]]


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
    params = checkpoint.read_leaves(folder, checkpoint.PARAMS)
    unused = checkpoint.read_leaves(folder, checkpoint.UNUSED)
    total = sum(leaf.nbytes for leaf in [*params.values(), *unused.values()])
    progress(0, total)
    with whole_folder(out) as made:
        vocabulary.save(made)
        for kind, place in ((hf.MODEL, made), (hf.VISION, made / VISION_FOLDER)):
            place.mkdir(exist_ok=True)
            parts = [*_parts(config, params, kind), *_unused(config, unused, kind)]
            _write_shards(place, parts, lambda new: progress(new, total))
        if "generation_config.json" in source:
            _write_json(made / "generation_config.json", source["generation_config.json"])
        _write_configs(made, config, source)


def _parts(config: ModelConfig, params: dict[str, Leaf], source: str) -> Iterator[Part]:
    for entry in hf.table(config):
        if entry.source != source:
            continue

        def tensors(array: np.ndarray, entry: hf.Entry = entry) -> Iterator:
            layers = array if entry.count else [array]
            for name, layer in zip(entry.names, layers, strict=True):
                yield name, entry.to_torch(layer)

        yield Part(params[entry.path], dict.fromkeys(entry.names, entry.torch), tensors)
    if source == hf.MODEL:
        for path, released in hf.released_fusion(config).items():
            if not np.array_equal(params[path].read(), released):
                yield _same(hf.FUSION[path], params[path])


def _unused(config: ModelConfig, unused: dict[str, Leaf], source: str) -> Iterator[Part]:
    """What was carried along; zeros for a model that never had these tensors."""
    shapes = hf.unused(config, source)
    for name, shape in shapes.items():
        read = partial(np.zeros, shape, np.float32)
        zeros = Leaf(shape=shape, dtype=np.dtype(np.float32), read=read)
        yield _same(name, unused.get(name, zeros))
    for name, leaf in unused.items():
        if name.endswith(hf.DERIVED) and name.startswith("vision_") == (source == hf.VISION):
            yield _same(name, leaf)


def _same(name: str, leaf: Leaf) -> Part:
    return Part(leaf, {name: leaf.shape}, lambda array: iter([(name, array)]))


def _write_shards(folder: Path, parts: list[Part], progress: Callable[[int], None]) -> None:
    """One file per group of parts; an index names them if there are several."""
    groups: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + part.leaf.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.leaf.nbytes
    index: dict[str, str] = {}
    for i, group in enumerate(groups):
        many = len(groups) > 1
        file = (
            f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" if many else "model.safetensors"
        )
        tensors: dict[str, np.ndarray] = {}
        for part in group:
            tensors |= dict(part.tensors(part.leaf.read()))
        write_safetensors(folder / file, tensors)
        index |= dict.fromkeys(tensors, file)
        progress(sum(part.leaf.nbytes for part in group))
    if len(groups) > 1:
        total = sum(part.leaf.nbytes for part in parts)
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )


def _write_configs(made: Path, config: ModelConfig, source: dict[str, dict[str, Any]]) -> None:
    """The configs of the imported folders, with our own key where they do not say it all."""
    vision = made / VISION_FOLDER
    _write_json(
        vision / "config.json", source.get("vision.json", hf_config.hf_vision(config.vision))
    )
    model = source.get("config.json", hf_config.hf_model(config))
    _write_json(made / "config.json", model)
    if hf_config.OWN_KEY in model:
        return
    shapes = {name: entry.torch for entry in hf.table(config) for name in entry.names}
    read_back = hf_config.read_model(made, hf_config.read_vision(vision), shapes, config.codebook)
    if read_back != config:
        own = {hf_config.OWN_KEY: dataclasses.asdict(config)}
        _write_json(made / "config.json", {**model, **own})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
