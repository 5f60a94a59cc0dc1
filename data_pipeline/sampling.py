"""Counter-based random sampler of one example: a pure function of (seed, epoch, index).

There is no global and no running state, so an example of an epoch gets the same questions on any
host, in any worker process, after any resume and on every platform.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

_WORD = 1 << 64


@runtime_checkable
class Sampler(Protocol):
    """Source of the random decisions of a transform; `PhiloxSampler` implements it."""

    def index(self, n: int) -> int:
        """Sample an integer from 0, ..., n - 1."""
        ...

    def coin(self) -> bool:
        """Sample a boolean, True with probability 1/2."""
        ...

    def uniform(self) -> float:
        """Sample a number in [0, 1)."""
        ...

    def subset(self, n: int, size: int) -> list[int]:
        """Sample `size` integers from 0, ..., n - 1 without replacement, in sampling order."""
        ...

    def permutation(self, n: int) -> list[int]:
        """Sample a permutation of 0, ..., n - 1: entry i is the item that moves to position i."""
        ...


class PhiloxSampler:
    """Sampler that uses a counter-based generator; every method samples uniformly.

    The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    2011). Key words (seed, epoch) and counter words (i, 0, 0, index) for i = 1, 2, ... give blocks
    of four 64-bit words r; streams of different keys or indices never overlap. The methods compute

        index(n)     floor(r n / 2^64)
        coin         index(2) == 1
        uniform      floor(r / 2^11) / 2^53
        subset       the first `size` steps of a Fisher-Yates shuffle of 0, ..., n - 1: step i swaps
                     positions i and i + index(n - i)
        permutation  all n steps of that shuffle

    NumPy guarantees the words of a bit generator across versions, but not the numbers that its
    `Generator` computes from them. The bias of `index` is below n / 2^64.

    Example:
        >>> sampler = PhiloxSampler(seed=1, epoch=2, index=3)
        >>> sampler.permutation(7)
        [0, 5, 3, 1, 6, 4, 2]

    Args:
        seed: seed of the run.
        epoch: pass over the dataset.
        index: position of the example.

    Raises:
        ValueError: seed, epoch or index is negative or needs more than 64 bits.
    """

    def __init__(self, *, seed: int, epoch: int, index: int) -> None:
        for name, value in (("seed", seed), ("epoch", epoch), ("index", index)):
            if not 0 <= value < _WORD:
                raise ValueError(f"{name} is {value}, expected 0 <= {name} < 2^64")
        key = np.array([seed, epoch], np.uint64)
        counter = np.array([0, 0, 0, index], np.uint64)
        self._words = np.random.Philox(key=key, counter=counter)

    def index(self, n: int) -> int:
        """Sample an integer from 0, ..., n - 1.

        Raises:
            ValueError: n is below 1.
        """
        if n < 1:
            raise ValueError(f"cannot choose one of {n}")
        return self._word() * n // _WORD

    def coin(self) -> bool:
        return self.index(2) == 1

    def uniform(self) -> float:
        return (self._word() >> 11) / (1 << 53)

    def subset(self, n: int, size: int) -> list[int]:
        """Sample `size` integers from 0, ..., n - 1 without replacement, in sampling order.

        Raises:
            ValueError: `size` is negative or above n.
        """
        if not 0 <= size <= n:
            raise ValueError(f"cannot choose {size} of {n}")
        numbers = list(range(n))
        for i in range(size):
            j = i + self.index(n - i)
            numbers[i], numbers[j] = numbers[j], numbers[i]
        return numbers[:size]

    def permutation(self, n: int) -> list[int]:
        return self.subset(n, n)

    def _word(self) -> int:
        return int(self._words.random_raw())
