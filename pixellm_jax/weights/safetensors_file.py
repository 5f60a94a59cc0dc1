"""Reader of safetensors headers: finds the tensors of a file without reading their values.

A file is the length of the header (8 bytes, little-endian), the header in JSON
(`{name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}`, offsets in bytes after the
header) and the tensors without gaps: https://github.com/huggingface/safetensors#format. The header
is untrusted input: every value is checked before it is used.
"""

from __future__ import annotations

import collections
import json
import math
import os
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from pixellm_jax.errors import InputError
from pixellm_jax.weights.tensor_view import (
    MAX_AXES,
    TensorView,
    contiguous_strides,
    is_size,
)

MAX_HEADER_BYTES = 100_000_000
"""Maximum size of a header (the limit of the format) and of an index."""

AGAIN = "download or save the file again"

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


def find_tensors(stream: BinaryIO) -> dict[str, TensorView]:
    """Return the tensors of a safetensors file by name; only the header is read.

    Raises:
        InputError: the header is damaged, or does not match the file.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise InputError(
            f"a header of {length} bytes in a file of {size}, expected that and {MAX_HEADER_BYTES} "
            f"at most: truncated, or not a safetensors file; {AGAIN}"
        )
    header = parse_json(stream.read(length))
    if not isinstance(header, dict):
        raise InputError(f"the header is not a JSON object, expected tensors; {AGAIN}")
    header.pop("__metadata__", None)
    start = 8 + length
    previous = 0
    views = {}
    ranges = {name: _byte_range(name, entry, size - start) for name, entry in header.items()}
    for name, (begin, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin != previous:
            raise InputError(
                f"tensor {shown(name)} begins at byte {start + begin}, the previous one ends at "
                f"{start + previous}, expected no overlap and no gap; {AGAIN}"
            )
        previous = end
        shape = tuple(header[name]["shape"])
        dtype = _DTYPES[header[name]["dtype"]]
        views[name] = TensorView(dtype, shape, contiguous_strides(shape), start + begin)
    if start + previous != size:
        raise InputError(f"{size} bytes, expected {start + previous}; {AGAIN}")
    return views


def _byte_range(name: str, entry: Any, limit: int) -> tuple[int, int]:
    """Check the entry of a tensor in the header and return its byte range."""
    where = f"tensor {shown(name)}"
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, end]}:
            well_formed = len(shape) <= MAX_AXES and all(map(is_size, [*shape, begin, end]))
        case _:
            well_formed = False
    if not well_formed or not is_size(math.prod(max(length, 1) for length in shape)):
        raise InputError(
            f"{where} has a damaged header, expected dtype, shape and data_offsets; {AGAIN}"
        )
    if kind not in _DTYPES:
        kinds = ", ".join(_DTYPES)
        raise InputError(f"{where} has dtype {shown(kind)}, expected one of {kinds}; convert it")
    if not begin <= end <= limit:
        raise InputError(f"{where} has the bytes {begin} to {end} of {limit}: truncated; {AGAIN}")
    expected = math.prod(shape) * _DTYPES[kind].itemsize
    if end - begin != expected:
        raise InputError(
            f"{where} has {end - begin} bytes, expected {expected} for {kind} {shape}; {AGAIN}"
        )
    return begin, end


def parse_json(content: bytes) -> Any:
    """Parse UTF-8 JSON; an object with a duplicate key is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unrepeated = dict(pairs)
        if len(unrepeated) != len(pairs):
            ((key, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"it has {shown(key)} twice")
        return unrepeated

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected valid JSON ({error}); {AGAIN}") from error


def shown(value: Any) -> str:
    """Format a value from a file for a message: a string quoted and cut, otherwise its type."""
    return repr(value[:120]) if isinstance(value, str) else type(value).__name__
