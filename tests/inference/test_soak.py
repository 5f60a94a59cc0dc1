"""Soak test: two thousand questions of every kind through one predictor."""

from __future__ import annotations

import gc
import io
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from data_pipeline.sources.shapes.dataset import Shapes
from pixellm_jax.errors import InputError
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.weights.checkpoint import SHAPES_MODEL

COUNT, PICTURES, SCENES, LONGEST, MOST = 2000, 200, 150, 2000, 12
BUDGET, ROWS = 128, 8

RUBBISH = ["the", "red", "circles", "ASSISTANT:", "犬", "[SEG0]", "[SEG]", "</s>", "?", "and", "x"]

# What Python, XLA and the allocator may hold back. Arrays that leak are counted one by one, too.
GROWTH, LEFT = 150 << 20, 1 << 20


def resident() -> int:
    """Resident memory of this process in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def held() -> int:
    """Bytes of all arrays on the device."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def questioner(scenes: list, draw: np.random.Generator) -> Callable[[int], str]:
    """Questions about picture `p`: proper ones, chains of them, lists of names, and rubbish."""

    def chain(p: int) -> str:
        """Up to 2,000 characters, cut anywhere; the short ones are empty or a letter."""
        length = int(np.exp(draw.uniform(0, np.log(LONGEST)))) - 1
        own = " ".join(question.question for question in scenes[p].questions)
        return (own * (length // len(own) + 1))[:length].strip()

    def names(p: int) -> str:
        scene = scenes[p].scene
        colours = [thing.colour for thing in scene.things]
        shapes = [thing.shape for thing in scene.things]
        count = draw.integers(0, MOST + 1)
        things = [f"the {draw.choice(colours)} {draw.choice(shapes)}" for _ in range(count)]
        return f"Where are {', '.join(things)}?"

    def proper(p: int) -> str:
        return draw.choice([question.question for question in scenes[p].questions])

    def rubbish(p: int) -> str:
        return " ".join(draw.choice(RUBBISH, draw.integers(1, 40)))

    def ask(picture: int) -> str:
        kind = draw.choice([proper, chain, names, rubbish], p=[0.4, 0.3, 0.2, 0.1])
        return kind(picture % SCENES)

    return ask


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_thousand_questions(capsys):
    draw = np.random.default_rng(0)
    source = Shapes(split="test")
    scenes = [source.generate(number) for number in range(SCENES)]
    pictures = [np.asarray(Image.open(io.BytesIO(scene.image))) for scene in scenes]
    noise = draw.integers(1, 130, (PICTURES - SCENES, 2))
    pictures += [draw.integers(0, 256, (*shape, 3), np.uint8) for shape in noise]
    ask = questioner(scenes, draw)

    # Questions about one picture come near each other, and at times an old one comes back.
    order = np.sort(draw.integers(0, PICTURES, COUNT))
    order[::7] = draw.integers(0, PICTURES, len(order[::7]))
    pairs = [(int(picture), ask(int(picture))) for picture in order]
    assert max(len(words) for _, words in pairs) > LONGEST * 0.9

    before = held()
    predictor = Predictor.load(SHAPES_MODEL, max_new_tokens=BUDGET, max_batch=ROWS)
    begin, found, memory = time.perf_counter(), {}, list[int]()
    for number, answer in predictor.each((pictures[p], words) for p, words in pairs):
        assert number not in found
        if isinstance(answer, InputError):
            found[number] = str(answer)
        else:
            height, width, _ = pictures[pairs[number][0]].shape
            assert answer.masks.shape == (len(answer.markers), height, width)
            found[number] = (answer.text, answer.finish_reason, len(answer.masks))
        if len(found) % 250 == 0:
            memory.append(resident())
    seconds = time.perf_counter() - begin

    assert sorted(found) == list(range(COUNT))
    refused = {number for number, answer in found.items() if isinstance(answer, str)}
    answers = [answer for answer in found.values() if not isinstance(answer, str)]
    compiled = predictor.engine.counter.compiled
    with capsys.disabled():
        targets = Counter(count for _, _, count in answers)
        print(
            f"\n{COUNT} questions in {seconds:.0f} s, {len(refused)} refused; "
            f"ended by {dict(Counter(reason for _, reason, _ in answers))}; "
            f"answers by targets {dict(sorted(targets.items()))}; "
            f"MiB after every 250: {[size >> 20 for size in memory]}; compiled {dict(compiled)}, "
            f"{compiled.total()} in all"
        )
    for number in refused:
        words = pairs[number][1]
        assert ("empty" if not words else "tokens, the model has room for") in found[number]
        assert not words or len(words) > LONGEST / 4
    assert {reason for _, reason, _ in answers} == {"stop", "length"}
    assert set(targets) >= {0, 1, 2, 3, 4, 5, 6}
    assert memory[-1] - memory[len(memory) // 2] < GROWTH
    predictor.engine.reset()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(predictor.model)))
    assert held() - before - weights < LEFT  # of 200 pictures and 2,000 questions nothing is kept
    rows, lengths, capacities = 2, 7, 16
    assert compiled["prefill"] <= rows * lengths
    assert compiled["decode"] <= rows * capacities
    assert compiled["decode_masks"] <= 4
    for number in draw.choice(sorted(set(found) - refused), 20, replace=False):
        picture, words = pairs[number]
        answer = predictor(pictures[picture], words)
        assert (answer.text, answer.finish_reason, len(answer.masks)) == found[number]
