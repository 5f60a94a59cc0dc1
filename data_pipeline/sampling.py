"""The random decisions of one example: a pure function of (seed, epoch, index).

Nothing is shared and nothing is carried on, so the same example of the same epoch gets the same
questions on any host, in any worker process and after any resume, on every platform.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

_WORD = 1 << 64


@runtime_checkable
class Sampler(Protocol):
    """Source of the random decisions of a transform; `PhiloxSampler` implements it."""

    def index(self, n: int) -> int:
        """One of 0, ..., n - 1."""
        ...

    def coin(self) -> bool:
        """Heads or tails."""
        ...

    def uniform(self) -> float:
        """A number in [0, 1)."""
        ...

    def subset(self, n: int, size: int) -> list[int]:
        """`size` different numbers out of 0, ..., n - 1, in the order in which they were drawn."""
        ...

    def permutation(self, n: int) -> list[int]:
        """All of 0, ..., n - 1; entry i is the number of the thing that comes to place i."""
        ...


class PhiloxSampler:
    """Sampler by a counter-based generator, each uniform over what is possible.

    The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    2011). Key words (seed, epoch), counter words (i, 0, 0, index) for i = 1, 2, ...: blocks of four
    64-bit words r, in streams that never meet. Sampler are made of them here:

        index(n)   floor(r n / 2^64)
        coin       index(2) == 1
        uniform    floor(r / 2^11) / 2^53
        subset     the first `size` steps of a Fisher-Yates shuffle of 0, ..., n - 1: step i swaps
                   place i with place i + index(n - i); permutation: all n steps

    numpy keeps the words of a bit generator for ever, but not what its `Generator` makes of them.
    `index` prefers some numbers to others by less than n / 2^64.

    Raises:
        ValueError: seed, epoch or index is negative or needs more than 64 bits.
    """

    def __init__(self, *, seed: int, epoch: int, index: int) -> None:
        for name, value in (("seed", seed), ("epoch", epoch), ("index", index)):
            if not 0 <= value < _WORD:
                raise ValueError(f"{name} is {value}, expected 0 <= {name} < 2^64")
        key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, 0, index], np.uint64)
        self._words = np.random.Philox(key=key, counter=counter)

    def index(self, n: int) -> int:
        """One of 0, ..., n - 1.

        Raises:
            ValueError: there is nothing to choose from.
        """
        if n < 1:
            raise ValueError(f"cannot choose one of {n}")
        return self._word() * n // _WORD

    def coin(self) -> bool:
        return self.index(2) == 1

    def uniform(self) -> float:
        return (self._word() >> 11) / (1 << 53)

    def subset(self, n: int, size: int) -> list[int]:
        """`size` different numbers out of 0, ..., n - 1, in the order in which they were drawn.

        Raises:
            ValueError: there are fewer than `size`.
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
