"""Hugging Face model folders: weights found by name, read one tensor at a time, and written.

A folder holds `model.safetensors` or `pytorch_model.bin`, or shards of one of them
(`model-00001-of-00002.safetensors`, ...) with an index, `model.safetensors.index.json` or
`pytorch_model.bin.index.json`, whose `weight_map` maps each tensor to its shard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import safetensors.numpy

from pixellm_jax.errors import InputError
from pixellm_jax.files import whole_file
from pixellm_jax.weights import safetensors_file, torch_file
from pixellm_jax.weights.safetensors_file import (
    AGAIN,
    MAX_HEADER_BYTES,
    parse_json,
    shown,
)
from pixellm_jax.weights.tensor_view import contiguous_strides

_FAMILIES = (("model", ".safetensors"), ("pytorch_model", ".bin"))
_COMPLETE = "download the complete folder again"


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor on disk.

    Example:
        tensors = open_folder(Path("clip-vit-large-patch14-336"))
        tensors["vision_model.post_layernorm.bias"].read()  # f32[1024]
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    """`ml_dtypes.bfloat16` for bfloat16."""
    file: Path
    position: int
    """Offset of the first element in the file, in bytes."""
    strides: tuple[int, ...]
    """In elements, one per axis."""

    def read(self) -> np.ndarray:
        """Read the tensor into a fresh, writable, C-ordered array of `shape` and `dtype`.

        Only the bytes from the first to the last element are read; the file is not memory-mapped.

        Raises:
            InputError: the file cannot be read, or is shorter than when it was opened.
        """
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        axes = zip(self.shape, self.strides, strict=True)
        span = np.empty(1 + sum((length - 1) * stride for length, stride in axes), self.dtype)
        try:
            with open(self.file, "rb") as stream:
                stream.seek(self.position)
                count = stream.readinto(span.view(np.uint8).data)
        except OSError as error:
            raise InputError(_unreadable(self.file, error)) from error
        if count != span.nbytes:
            raise InputError(
                f"{self.file}: {count} bytes of tensor {shown(self.name)}, expected "
                f"{span.nbytes}: the file was truncated after it had been opened; {AGAIN}"
            )
        if self.strides == contiguous_strides(self.shape):
            return span.reshape(self.shape)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(span, self.shape, strides).copy()


def open_folder(folder: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a folder by name; only the headers of its files are read.

    The order of preference is safetensors, then .bin, and for each a single file, shards with an
    index, shards without one. A set with missing shards is skipped if another is complete.

    Raises:
        InputError: the folder or a file is missing, incomplete or damaged, index and shards
            disagree, or there are no tensors.
    """
    if not os.path.isdir(folder):
        kind = "a file" if os.path.exists(folder) else "nothing there"
        raise InputError(f"{folder}: {kind}, expected a folder with weights; correct the path")
    problems = []
    for stem, suffix in _FAMILIES:
        try:
            weights = _find_weights(folder, stem, suffix)
        except OSError as error:
            raise InputError(_unreadable(folder, error)) from error
        missing = [name for name in weights.names if not os.path.isfile(folder / name)]
        if missing:
            problems.append(
                f"{weights.source}: {len(missing)} of {len(weights.names)} shards are not in the "
                f"folder: {_listed(missing)}; {_COMPLETE}"
            )
        elif weights.names:
            return _merge(weights, {name: open_file(folder / name) for name in weights.names})
    problems.append(
        f"{folder}: no weights in it, expected model.safetensors, pytorch_model.bin or shards of "
        "one of them; correct the path or download the model"
    )
    raise InputError(problems[0])


def open_file(file: Path) -> dict[str, LazyTensor]:
    """Return the tensors of one file by name; only its headers are read.

    A file that does not end with `.safetensors` is read as an archive of `torch.save`.

    Raises:
        InputError: the file is missing, damaged or of another kind.
    """
    try:
        with open(file, "rb") as stream:
            head = stream.read(64).lstrip()
            stream.seek(0)
            if head.startswith(b"version https://git-lfs"):
                raise InputError("a Git LFS pointer, expected weights; run git lfs pull")
            if head[:5].lower() in (b"<html", b"<!doc"):
                raise InputError(f"a web page, expected weights; {AGAIN}")
            reader = safetensors_file if file.suffix == ".safetensors" else torch_file
            views = reader.find_tensors(stream)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except OSError as error:
        raise InputError(_unreadable(file, error)) from error
    return {name: LazyTensor(name=name, file=file, **vars(view)) for name, view in views.items()}


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors to a safetensors file, bfloat16 included, with the metadata `format: pt`.

    The file is written atomically: a reader never sees half of it.

    Raises:
        InputError: the file cannot be written.
    """
    # save_file ignores strides: an array that is not C-ordered would be scrambled.
    ordered = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        with whole_file(path) as made:
            made.touch()
            mode = made.stat().st_mode  # save_file would remove the permissions of group and others
            safetensors.numpy.save_file(ordered, made, metadata={"format": "pt"})
            made.chmod(mode)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be written ({error}); check that its folder exists, may be written to "
            "and has space"
        ) from error


@dataclass(frozen=True)
class _Weights:
    """Files of one kind in a folder; `weight_map` maps tensor to file, empty without an index."""

    source: Path
    names: list[str]
    weight_map: dict[str, str]


def _find_weights(folder: Path, stem: str, suffix: str) -> _Weights:
    """Find one file, shards with an index, or shards without one, in this order."""
    single = folder / f"{stem}{suffix}"
    index = folder / f"{stem}{suffix}.index.json"
    if os.path.isfile(single):
        return _Weights(single, [single.name], {})
    if os.path.isfile(index):
        weight_map = _read_index(index, suffix)
        return _Weights(index, sorted(set(weight_map.values())), weight_map)
    return _Weights(folder, _numbered(folder, stem, suffix), {})


def _numbered(folder: Path, stem: str, suffix: str) -> list[str]:
    """Return the names of all shards that belong to the shards in the folder.

    They have the form `STEM-00001-of-00003.SUFFIX`.
    """
    pattern = re.compile(rf"{stem}-[0-9]{{5}}-of-([0-9]{{5}}){re.escape(suffix)}")
    counts = {match[0]: match[1] for match in map(pattern.fullmatch, os.listdir(folder)) if match}
    if not counts:
        return []
    last = max(counts.values())
    names = {f"{stem}-{number:05}-of-{last}{suffix}" for number in range(1, int(last) + 1)}
    if strays := sorted(counts.keys() - names):
        raise InputError(
            f"{folder}: {_listed(strays)} next to shards 1 to {int(last)} of {int(last)}, expected "
            "one set; remove one of them or add an index"
        )
    return sorted(names)


def _read_index(index: Path, suffix: str) -> dict[str, str]:
    """Return the weight map of an index: tensor name -> plain file name in the same folder."""
    size = os.path.getsize(index)
    if size > MAX_HEADER_BYTES:
        raise InputError(f"{index}: {size} bytes, expected {MAX_HEADER_BYTES} at most; {_COMPLETE}")
    try:
        content = parse_json(index.read_bytes())
    except InputError as error:
        raise InputError(f"{index}: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map, expected tensor and shard names; {_COMPLETE}")
    for name, shard in weight_map.items():
        # A plain name on every system: "C:x" and "a\\b" are paths elsewhere.
        plain = isinstance(shard, str) and PureWindowsPath(shard).name == shard
        if not plain or not shard.endswith(suffix):
            raise InputError(
                f"{index}: tensor {shown(name)} is in {shown(shard)}, expected the plain name of "
                f"a {suffix} file; put the shards next to the index and correct the name"
            )
    return weight_map


def _merge(weights: _Weights, shards: dict[str, dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """Join the tensors of the files; report all contradictions of files and index together."""
    tensors: dict[str, LazyTensor] = {}
    problems: dict[str, list[str]] = {"in two files": []}
    for shard_tensors in shards.values():
        problems["in two files"] += sorted(tensors.keys() & shard_tensors.keys())
        tensors |= shard_tensors
    if weights.weight_map:
        problems["named by the index and not in their shard"] = [
            f"{name} ({shard})"
            for name, shard in weights.weight_map.items()
            if name not in shards[shard]
        ]
        problems["in a shard and not named by the index"] = sorted(
            tensors.keys() - weights.weight_map.keys()
        )
    faults = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if faults:
        report = f"expected each tensor once, found {'; '.join(faults)}"
        raise InputError(f"{weights.source}: {report}; {_COMPLETE}")
    if not tensors:
        raise InputError(f"{weights.source}: no tensors, expected weights; {_COMPLETE}")
    return tensors


def _listed(names: Sequence[str]) -> str:
    first = ", ".join(map(shown, names[:10]))
    return first if len(names) <= 10 else f"{first} and {len(names) - 10} more"


def _unreadable(file: Path, error: OSError) -> str:
    return f"{file}: cannot be read ({error.strerror or error}); check the path and its permissions"
