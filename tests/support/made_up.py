"""Small made-up files for the tests of the readers, and damage to put into them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.errors import DamagedError
from data_pipeline.example import Example, from_json, to_json
from data_pipeline.formats.masks import decode
from data_pipeline.reading import Reading, Source
from pixellm_jax.benchmark_question import Rle
from pixellm_jax.errors import InputError

HW = (5, 7)


def write_picture(path: Path, hw: tuple[int, int] = HW, exif: Image.Exif | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.arange(hw[0] * hw[1] * 3, dtype=np.uint8).reshape(*hw, 3)
    Image.fromarray(pixels).save(path, **({"exif": exif} if exif else {}))
    return path


def write_labels(path: Path, values: Any, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    (image if mode in ("L", "P") else image.convert(mode)).save(path)
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def read_all(source: Source, root: Path, split: str) -> tuple[dict[str, Reading], dict[str, str]]:
    """Readings by key, and the reasons of the damaged entries by key."""
    readings, damaged = {}, {}
    entries = source.entries(root, split)
    assert len({entry.key for entry in entries}) == len(entries)
    for entry in entries:
        try:
            readings[entry.key] = source.read(entry)
            assert readings[entry.key].example.key == entry.key
        except DamagedError as reason:
            assert "\n" not in str(reason)
            damaged[entry.key] = str(reason)
    return readings, damaged


def pixels(rle: Rle | None) -> list[list[int]]:
    assert rle is not None
    return decode(rle).tolist()


def named(example: Example) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    return [(target.phrases, target.ids) for target in example.targets]


def survives(source: Source, root: Path, split: str) -> None:
    """Reads everything; nothing but the documented errors may come out."""
    try:
        for reading in read_all(source, root, split)[0].values():
            example = reading.example
            assert from_json(to_json(example).encode(), example.image) == example
            assert all(tuple(mask["size"]) == example.hw for mask in example.masks)
            assert all(0 <= target.mask < len(example.masks) for target in example.targets)
    except InputError as error:
        assert "\n" not in str(error)


def mutations(path: Path, count: int, seed: int) -> Iterator[bytes]:
    """The file written anew `count` times, each time damaged in another way; then as it was."""
    original, chance = path.read_bytes(), random.Random(seed)
    try:
        for number in range(count):
            if path.suffix == ".json" and number % 2:
                tree = json.loads(original)
                path.write_text(json.dumps(_replace(tree, chance)))
            else:
                path.write_bytes(_scramble(original, chance))
            yield path.read_bytes()
    finally:
        path.write_bytes(original)


def _scramble(data: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice([0, 1, 1, 8, 1000]))
        data = data[:start] + chance.randbytes(chance.choice([0, 1, 1, 4])) + data[end:]
    return data


JUNK = [
    *(None, True, 0, -1, 2**70, 1e308, -0.5, float("nan"), float("inf"), "", "x", "../x", "\ud800"),
    *([], {}, [[]], [None], {"size": [1, 1]}, [0.5, "1"], "/etc/passwd", "flag", "\0"),
]


def _replace(tree: Any, chance: random.Random) -> Any:
    """The tree with one node replaced by junk, left out or doubled."""
    if not isinstance(tree, dict | list) or not tree or chance.random() < 0.15:
        return chance.choice(JUNK)
    place = chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    copy = tree.copy()
    if isinstance(copy, list) and chance.random() < 0.1:
        copy.insert(place, copy[place])
    elif chance.random() < 0.1:
        del copy[place]
    else:
        copy[place] = _replace(copy[place], chance)
    return copy
