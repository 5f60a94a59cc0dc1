"""Read and write the weights of a Hugging Face style folder, one tensor at a time.

A folder holds `model.safetensors` or `pytorch_model.bin`, or shards of one of them
(`model-00001-of-00002.safetensors`, ...) with an index, `model.safetensors.index.json` or
`pytorch_model.bin.index.json`, whose `weight_map` says which shard holds which tensor.

A safetensors file is the length of its header (8 bytes, little-endian), the header in JSON
(`{name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}`, in bytes after the header)
and the tensors without gaps: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors.numpy

from pixellm_jax.errors import InputError
from pixellm_jax.torch_archive import MAX_AXES, TensorView, find_tensors, is_size

MAX_HEADER_BYTES = 100_000_000
"""Limit of a safetensors header (the format's own) and of an index."""

_FAMILIES = (("model", ".safetensors"), ("pytorch_model", ".bin"))
_AGAIN = "download or save the file again"
_COMPLETE = "download the complete folder again"

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that is still on disk.

    `dtype` is `ml_dtypes.bfloat16` for bfloat16. The first element lies at byte `position` of
    `file`; `strides` count elements, one per axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    position: int
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Read the tensor into a fresh, writable, C-ordered array of `shape` and `dtype`.

        Only the bytes from the first to the last element are read; no map of the file is kept.
        Raises `InputError` if the file cannot be read or is shorter than when it was opened.
        """
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        axes = zip(self.shape, self.strides, strict=True)
        span = np.empty(1 + sum((length - 1) * stride for length, stride in axes), self.dtype)
        try:
            with open(self.file, "rb") as stream:
                stream.seek(self.position)
                found = stream.readinto(span.view(np.uint8).data)
        except OSError as error:
            raise InputError(_unreadable(self.file, error)) from error
        if found != span.nbytes:
            raise InputError(
                f"{self.file}: {found} bytes of tensor {_shown(self.name)}, expected "
                f"{span.nbytes}: the file was cut after it had been opened; {_AGAIN}"
            )
        if self.strides == _contiguous(self.shape):
            return span.reshape(self.shape)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(span, self.shape, strides).copy()


def open_folder(folder: Path) -> dict[str, LazyTensor]:
    """Find the tensors of a folder by name; only the headers of its files are read.

    The order of preference is safetensors, then .bin, and in each one file, shards with an index,
    shards without one; a set with missing shards is passed over where there is a complete one.

    Raises `InputError` if the folder or one of its files is missing, incomplete or damaged, if the
    index and its shards disagree, or if there are no tensors.
    """
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "nothing there"
        raise InputError(f"{folder}: {found}, expected a folder with weights; correct the path")
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
    """Find the tensors of one file by name; only its headers are read.

    A file that does not end with `.safetensors` is read as an archive of `torch.save`.
    Raises `InputError` if the file is missing, damaged or not of its kind.
    """
    try:
        with open(file, "rb") as stream:
            head = stream.read(64).lstrip()
            stream.seek(0)
            if head.startswith(b"version https://git-lfs"):
                raise InputError("a Git LFS pointer, expected weights; run git lfs pull")
            if head[:5].lower() in (b"<html", b"<!doc"):
                raise InputError(f"a web page, expected weights; {_AGAIN}")
            find = _find_safetensors if file.suffix == ".safetensors" else find_tensors
            found = find(stream)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except OSError as error:
        raise InputError(_unreadable(file, error)) from error
    return {name: LazyTensor(name=name, file=file, **vars(view)) for name, view in found.items()}


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors to a safetensors file, bfloat16 included, with the metadata `format: pt`.

    The file appears under its name only when it is whole: a reader never meets half of it.
    Raises `InputError` if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    # save_file takes the memory as it lies, so anything else than C order would be scrambled.
    ordered = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # of an ordinary new file; save_file makes one for its owner only
        safetensors.numpy.save_file(ordered, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be written ({error}); check that its folder exists, may be written to "
            "and has space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@dataclass(frozen=True)
class _Weights:
    """The files of one kind in a folder; `weight_map` is tensor -> file, empty without an index."""

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
    """Return the names that shards in the folder call for: `STEM-00001-of-00003.SUFFIX`, ..."""
    pattern = re.compile(rf"{stem}-[0-9]{{5}}-of-([0-9]{{5}}){re.escape(suffix)}")
    counts = {match[0]: match[1] for match in map(pattern.fullmatch, os.listdir(folder)) if match}
    if not counts:
        return []
    last = max(counts.values())
    names = {f"{stem}-{number:05}-of-{last}{suffix}" for number in range(1, int(last) + 1)}
    if strays := sorted(counts.keys() - names):
        raise InputError(
            f"{folder}: {_listed(strays)} beside shards 1 to {int(last)} of {int(last)}, expected "
            "one set; remove one of them or add an index"
        )
    return sorted(names)


def _read_index(index: Path, suffix: str) -> dict[str, str]:
    """Return the weight map of an index: tensor name -> plain file name in the same folder."""
    size = os.path.getsize(index)
    if size > MAX_HEADER_BYTES:
        raise InputError(f"{index}: {size} bytes, expected {MAX_HEADER_BYTES} at most; {_COMPLETE}")
    try:
        content = _json(index.read_bytes())
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
                f"{index}: tensor {_shown(name)} lies in {_shown(shard)}, expected a plain name of "
                f"a {suffix} file; put the shards beside the index and correct the name"
            )
    return weight_map


def _merge(weights: _Weights, shards: dict[str, dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """Join the tensors of the files, and report together all in which files and index disagree."""
    tensors: dict[str, LazyTensor] = {}
    problems: dict[str, list[str]] = {"in two files": []}
    for held in shards.values():
        problems["in two files"] += sorted(tensors.keys() & held.keys())
        tensors |= held
    if weights.weight_map:
        problems["named by the index and not in their shard"] = [
            f"{name} ({shard})"
            for name, shard in weights.weight_map.items()
            if name not in shards[shard]
        ]
        problems["in a shard and not named by the index"] = sorted(
            tensors.keys() - weights.weight_map.keys()
        )
    found = [f"{len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names]
    if found:
        report = f"expected each tensor once, found {'; '.join(found)}"
        raise InputError(f"{weights.source}: {report}; {_COMPLETE}")
    if not tensors:
        raise InputError(f"{weights.source}: no tensors, expected weights; {_COMPLETE}")
    return tensors


def _find_safetensors(stream: BinaryIO) -> dict[str, TensorView]:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise InputError(
            f"a header of {length} bytes in a file of {size}, expected that and {MAX_HEADER_BYTES} "
            f"at most: truncated, or no safetensors file; {_AGAIN}"
        )
    header = _json(stream.read(length))
    if not isinstance(header, dict):
        raise InputError(f"the header is no JSON object, expected tensors; {_AGAIN}")
    header.pop("__metadata__", None)
    start = 8 + length
    previous = 0
    views = {}
    ranges = {name: _byte_range(name, entry, size - start) for name, entry in header.items()}
    for name, (begin, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin != previous:
            raise InputError(
                f"tensor {_shown(name)} begins at byte {start + begin}, the one before it ends at "
                f"{start + previous}, expected no overlap and no gap; {_AGAIN}"
            )
        previous = end
        shape = tuple(header[name]["shape"])
        dtype = _DTYPES[header[name]["dtype"]]
        views[name] = TensorView(dtype, shape, _contiguous(shape), start + begin)
    if start + previous != size:
        raise InputError(f"{size} bytes, expected {start + previous}; {_AGAIN}")
    return views


def _byte_range(name: str, entry: Any, limit: int) -> tuple[int, int]:
    """Check the entry of a tensor in a safetensors header and return where its bytes lie."""
    where = f"tensor {_shown(name)}"
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, end]}:
            proper = len(shape) <= MAX_AXES and all(map(is_size, [*shape, begin, end]))
        case _:
            proper = False
    if not proper or not is_size(math.prod(max(length, 1) for length in shape)):
        raise InputError(
            f"{where} has a damaged header, expected dtype, shape and data_offsets; {_AGAIN}"
        )
    if kind not in _DTYPES:
        kinds = ", ".join(_DTYPES)
        raise InputError(f"{where} has dtype {_shown(kind)}, expected one of {kinds}; convert it")
    if not begin <= end <= limit:
        raise InputError(f"{where} lies at bytes {begin} to {end} of {limit}: truncated; {_AGAIN}")
    expected = math.prod(shape) * _DTYPES[kind].itemsize
    if end - begin != expected:
        raise InputError(
            f"{where} has {end - begin} bytes, expected {expected} for {kind} {shape}; {_AGAIN}"
        )
    return begin, end


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a C-ordered array in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _json(content: bytes) -> Any:
    """Parse JSON in UTF-8 in which no object has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unrepeated = dict(pairs)
        if len(unrepeated) != len(pairs):
            ((key, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"it has {_shown(key)} twice")
        return unrepeated

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no valid JSON, where it was expected ({error}); {_AGAIN}") from error


def _shown(value: Any) -> str:
    return repr(value[:120]) if isinstance(value, str) else type(value).__name__


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(_shown, names[:10]))
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"


def _unreadable(file: Path, error: OSError) -> str:
    return f"{file}: cannot be read ({error.strerror or error}); check the path and its permissions"
