"""Tensors on disk: how to read one, and where it is in its file.

`torch_file` and `safetensors_file` return a `TensorView` (dtype, shape, strides, position) for each
tensor from the headers they parse, and `torch_folder` reads the tensors. The limits and checks that
both formats need are here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

MAX_AXES = 32
"""Maximum number of axes of a tensor, the limit of NumPy 1."""


@runtime_checkable
class Tensor(Protocol):
    """A tensor that is read when needed (`torch_folder.LazyTensor`, `source.MergedTensor`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray: ...


@dataclass(frozen=True)
class TensorView:
    """A tensor in a file: the first element is at byte `position`; `strides` count elements."""

    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    position: int


def is_size(value: Any) -> bool:
    """Return whether a value read from a file is a length or offset that is safe to compute with.

    Such a value is an integer from 0 to 2**48 - 1: products and sums of a few stay exact.
    """
    return type(value) is int and 0 <= value < 1 << 48


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a C-ordered array, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
