from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sampling import PhiloxSampler

WORD = 1 << 64
KEYS = st.integers(0, WORD - 1)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute one block of Philox4x64-10 from the equations of the paper."""
    a, b, c, d = counter
    k, l = key  # noqa: E741
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = second >> 64 ^ b ^ k, second % WORD, first >> 64 ^ d ^ l, first % WORD
        k, l = (k + 0x9E3779B97F4A7C15) % WORD, (l + 0xBB67AE8584CAA73B) % WORD  # noqa: E741
    return [a, b, c, d]


def words(seed: int, epoch: int, index: int, count: int) -> list[int]:
    blocks = (philox([i, 0, 0, index], [seed, epoch]) for i in range(1, count // 4 + 2))
    return [word for block in blocks for word in block][:count]


def test_published_values_of_the_generator():
    """Known-answer tests of the authors: all words 0, and all words 2^64 - 1."""
    assert philox([0] * 4, [0] * 2)[0] == 0x16554D9ECA36314C
    assert philox([WORD - 1] * 4, [WORD - 1] * 2)[0] == 0x87B092C3013FE90B


@given(KEYS, KEYS, KEYS)
@settings(max_examples=50, deadline=None)
def test_words_are_philox(seed, epoch, index):
    sampler = PhiloxSampler(seed=seed, epoch=epoch, index=index)
    expected = [word >> 11 for word in words(seed, epoch, index, 9)]
    assert [sampler.uniform() * 2**53 for _ in range(9)] == expected


PINNED = """
from data_pipeline.sampling import PhiloxSampler
d = PhiloxSampler(seed=1, epoch=2, index=3)
print([d.index(n) for n in (1, 2, 10, 1000, 10**18)], d.permutation(7), d.subset(10, 4))
print([d.coin() for _ in range(8)], [d.uniform() for _ in range(3)], d.subset(5, 0))
"""
VALUES = """\
[0, 1, 2, 536, 767161997689903864] [6, 2, 0, 1, 4, 5, 3] [8, 3, 9, 0]
[True, False, False, True, False, True, False, True] \
[0.2855002375104959, 0.6081368895953685, 0.1672694305871466] []
"""


def test_values_are_pinned_in_every_process(capsys):
    """A change of these values changes every training run."""
    exec(PINNED, {})
    assert capsys.readouterr().out == VALUES
    command = [sys.executable, "-c", PINNED]
    root = Path(__file__).parents[2]
    other = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert other.stdout == VALUES


def test_samples_depend_on_every_word_of_the_key():
    keys = itertools.product((0, 1, WORD - 1), repeat=3)
    firsts = [PhiloxSampler(seed=s, epoch=e, index=i).uniform() for s, e, i in keys]
    assert len(set(firsts)) == 27


@given(KEYS, st.integers(0, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_subset_and_permutation(seed, n, data):
    size = data.draw(st.integers(0, n))
    numbers = PhiloxSampler(seed=seed, epoch=0, index=0).subset(n, size)
    assert len(set(numbers)) == len(numbers) == size
    assert set(numbers) <= set(range(n))
    everything = PhiloxSampler(seed=seed, epoch=0, index=0).permutation(n)
    assert sorted(everything) == list(range(n))
    assert everything[:size] == numbers


def test_first_samples_of_successive_examples_are_uniform():
    """24 permutations of 4 items, 12 ordered pairs, 6 outcomes: chi-square test at 1e-4."""
    samplers = [PhiloxSampler(seed=0, epoch=e, index=i) for e in range(3) for i in range(2000)]
    for sample, kinds, limit in (
        (lambda d: tuple(d.permutation(4)), 24, 58.6),
        (lambda d: tuple(d.subset(4, 2)), 12, 37.4),
        (lambda d: (d.coin(), int(d.uniform() * 3)), 6, 25.8),
    ):
        counts = Counter(sample(sampler) for sampler in samplers)
        expected = len(samplers) / kinds
        assert len(counts) == kinds
        assert sum((c - expected) ** 2 / expected for c in counts.values()) < limit


@pytest.mark.parametrize("name", ["seed", "epoch", "index"])
@pytest.mark.parametrize("value", [-1, WORD])
def test_rejects_keys_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected 0 <= {name} < 2"):
        PhiloxSampler(**{"seed": 0, "epoch": 0, "index": 0, name: value})


def test_rejects_impossible_samples():
    sampler = PhiloxSampler(seed=0, epoch=0, index=0)
    with pytest.raises(ValueError, match="one of 0"):
        sampler.index(0)
    for n, size in ((2, 3), (2, -1)):
        with pytest.raises(ValueError, match=f"{size} of {n}"):
            sampler.subset(n, size)
