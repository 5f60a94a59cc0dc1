"""Two thousand questions of every kind through one predictor."""

from __future__ import annotations

import gc
from pathlib import Path

import jax
import numpy as np
import pytest

from pixellm_jax.errors import InputError
from pixellm_jax.predictor import Predictor

COUNT, PICTURES, LONGEST = 2000, 200, 2000
WORDS = [
    "the",
    "dog",
    "in",
    "this",
    "image",
    "is",
    "It",
    "Please",
    "segment",
    "ASSISTANT:",
    "犬",
    "[SEG0]",
    "</s>",
    "?",
    ",",
    "x",
]

# What Python, XLA and the allocator may hold back; a leak of one prefix per picture would be more.
GROWTH = 150 << 20


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_thousand_questions(varied):
    draw = np.random.default_rng(0)
    jax.config.update("jax_disable_most_optimizations", True)
    predictor = Predictor(varied.model, varied.vocabulary, max_new_tokens=40, rows=4)
    shapes = draw.integers(1, 130, (PICTURES, 2))
    pictures = [draw.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]

    def question() -> str:
        """1 to 2,000 characters, most of them few; some are empty."""
        length = int(np.exp(draw.uniform(0, np.log(LONGEST))))
        return " ".join(draw.choice(WORDS, length // 2 + 1))[:length].strip()

    # Questions about one picture come near each other, and at times an old one comes back.
    order = np.sort(draw.integers(0, PICTURES, COUNT))
    order[::7] = draw.integers(0, PICTURES, len(order[::7]))
    pairs = [(int(picture), question()) for picture in order]
    found, memory = {}, list[int]()
    for number, answer in predictor.each((pictures[p], words) for p, words in pairs):
        assert number not in found
        if isinstance(answer, InputError):
            found[number] = answer
        else:
            assert answer.masks.shape == (len(answer.markers), *shapes[pairs[number][0]])
            found[number] = (answer.text, answer.reason, len(answer.masks))
        if len(found) % 250 == 0:
            memory.append(resident())
    jax.config.update("jax_disable_most_optimizations", False)

    assert sorted(found) == list(range(COUNT))
    refused = [number for number, answer in found.items() if isinstance(answer, InputError)]
    assert refused == [] or all(not pairs[number][1] for number in refused)
    answers = [answer for answer in found.values() if not isinstance(answer, InputError)]
    assert {reason for _, reason, _ in answers} == {"stop", "length"}
    assert {targets for _, _, targets in answers} >= {0, 1, 2, 3}
    assert memory[-1] - memory[len(memory) // 2] < GROWTH
    compiled = predictor.engine.programs.compiled
    rows, lengths, capacities = 2, 7, 16
    assert compiled["prefill"] <= rows * lengths
    assert compiled["decode"] <= rows * capacities
    assert compiled["decode_masks"] <= 3
    for number in draw.choice(COUNT, 20, replace=False):
        picture, words = pairs[number]
        if words:
            answer = predictor(pictures[picture], words)
            assert (answer.text, answer.reason, len(answer.masks)) == found[number]
