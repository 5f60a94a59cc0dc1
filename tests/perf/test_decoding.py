"""`pixellm bench generate`: answers of known length, attributed times, and a fair baseline."""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from data_pipeline.sources.shapes.tokenizer import FOLDER
from pixellm_jax.cli.main import main
from pixellm_jax.inference.compilation import CompileCounter
from pixellm_jax.inference.engine import Engine, EngineConfig
from pixellm_jax.inference.prepare import prepare_for_inference
from pixellm_jax.inference.request import Completion, Request
from pixellm_jax.model.quantize import GROUP
from pixellm_jax.perf import decoding
from pixellm_jax.perf.baseline import generate, make_baseline
from pixellm_jax.perf.decoding import (
    SENTENCE_WORDS,
    START_STRIDE,
    STEPS_PER_SYNC,
    make_reciting,
    make_requests,
    make_sentence,
    random_model,
    run_engine,
    step_bytes,
)
from pixellm_jax.perf.sizes import TINY
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights import checkpoint

ROWS, SENTENCES = 2, 3


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.with_codebook(FOLDER, **dataclasses.asdict(TINY.codebook))


@pytest.fixture(scope="module")
def weights():
    return random_model(TINY)


# Weights four times as large make the layers' outputs a thousand times as large, as training may.
@pytest.mark.parametrize(("at_once", "size"), [(0, 1), (100, 1), (100, 4)])
def test_answers_repeat_the_sentence(weights, vocabulary, at_once, size):
    ids = make_sentence(vocabulary)
    scaled = jax.tree.map(lambda leaf: size * leaf, weights)
    model = prepare_for_inference(make_reciting(scaled, ids))
    config = EngineConfig(
        max_batch=ROWS,
        steps_per_sync=STEPS_PER_SYNC,
        max_new_tokens=SENTENCES * len(ids),
        max_tokens_per_step=at_once,
    )
    engine = Engine(model, vocabulary, config)
    answers = dict(engine.generate(make_requests(TINY, ids, count=ROWS, sentences=SENTENCES)))
    assert sorted(answers) == list(range(ROWS))
    for row, result in answers.items():
        start = START_STRIDE * row % SENTENCE_WORDS + 1
        expected = np.roll(ids, -start)
        np.testing.assert_array_equal(result.tokens, np.tile(expected, SENTENCES))
        assert result.finish_reason == "length"
        assert len(result.targets.mask_logits) == SENTENCES
        assert (result.token_prob > 0.9).all()
        # The last id needs no step, and the prefill counts as the step of the first.
        per_sentence = SENTENCE_WORDS + (1 if at_once else len(vocabulary.group))
        assert result.num_steps == SENTENCES * per_sentence


class Scripted(Engine):
    """Engine that takes the given (seconds, steps) at each sync."""

    def __init__(self, syncs: list[tuple[float, int]]) -> None:
        self.syncs, self.now, self.num_steps, self.requests = syncs, 0.0, 0, list[Request]()
        self.counter = CompileCounter()
        self.counter.compiled.update(decode=2, encode=1)

    @property
    def idle(self) -> bool:
        return not self.syncs

    def add_request(self, request: Request) -> int:
        self.requests.append(request)
        return len(self.requests)

    def step(self) -> list[tuple[int, Completion]]:
        seconds, passes = self.syncs.pop(0)
        self.now, self.num_steps = self.now + seconds, self.num_steps + passes
        return []


def test_times_are_attributed(monkeypatch):
    """Syncs of 1 + 8, 8, 4 and 2 steps at 0.1 s; 0.2 s for the prefill, 2 s for the masks."""
    engine = Scripted([(1.0, 9), (0.8, 8), (0.4, 4), (2.2, 2)])
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: engine.now)
    run = run_engine(engine, [Request(np.zeros(2, np.int32))] * 3)
    assert (len(engine.requests), run.steps, run.compiled) == (3, 22, 3)
    np.testing.assert_allclose(run[:4], [0.2, 0.1, 2.0, 4.4], rtol=1e-9)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_step_bytes(weights, kind):
    language = TINY.language
    d, f, v = language.width, language.mlp, language.vocabulary
    matrices = language.layers * (4 * d * d + 3 * d * f)
    scales = {
        None: 0,
        "int8": language.layers * (4 * d + 2 * f + d),
        "int4": language.layers * (4 * d * (d // GROUP) + 2 * f * (d // GROUP) + d * (f // GROUP)),
    }[kind]
    stored = matrices * {None: 4, "int8": 1, "int4": 0.5}[kind] + 4 * scales
    norms = (2 * language.layers + 1) * d
    rows, positions = 3, 5
    cache = rows * positions * language.layers * 2 * d
    expected = stored + 4 * (v * d + norms + rows * d + cache)
    assert step_bytes(prepare_for_inference(weights, weights=kind), rows, positions) == expected


def rows_of(table: str) -> list[dict[str, str]]:
    """Return the rows of a printed table by column name; columns are two blanks apart."""
    head, *lines = [
        [cell for cell in line.split("  ") if cell.strip()] for line in table.strip().splitlines()
    ]
    names = [name.strip() for name in head]
    return [dict(zip(names, map(str.strip, line), strict=True)) for line in lines]


@pytest.mark.torch
def test_command(capsys, monkeypatch):
    monkeypatch.setattr(decoding, "RECOMPUTED_TOKENS", 3)
    command = f"bench generate --size tiny --batch {ROWS} --masks {SENTENCES} --repeat 2 --peer"
    assert main(command.split()) == 0
    heading, engine, baselines = capsys.readouterr().out.split("\n\n")
    assert "1.0 M parameters" in heading and "GB/s copied" in heading
    plain, forward = rows_of(engine)
    assert [plain["codebook tokens"], forward["codebook tokens"]] == ["one by one", "at once"]
    assert int(plain["steps"]) == SENTENCES * 16 - 1 and int(forward["steps"]) == SENTENCES * 11 - 1
    for row in (plain, forward):
        made = ROWS * (SENTENCES * 16 - 1) / int(row["steps"])
        assert float(row["tokens/s"]) == pytest.approx(1e3 * made / float(row["ms/step"]), rel=0.05)
        low, high = map(float, row["spread"].split("-"))
        assert 0 < low <= float(row["ms/step"]) <= high
    cached, recomputed = rows_of(baselines)
    assert [cached["LLaVA"], recomputed["LLaVA"]] == ["cached", "recomputed"]
    for row in (cached, recomputed):
        for name, engine_row in (("speedup one by one", plain), ("speedup at once", forward)):
            ratio = float(engine_row["tokens/s"]) / float(row["tokens/s"])
            assert float(row[name]) == pytest.approx(ratio, rel=0.05)


@pytest.mark.torch
@pytest.mark.parametrize("cache", [True, False])
def test_baseline_does_the_documented_work(cache):
    """Same weights as ours in number; CLIP and the prefix once, or again for every token."""
    config = dataclasses.replace(TINY, dtype="bfloat16")
    baseline = make_baseline(config)
    assert {str(weight.dtype) for weight in baseline.parameters()} == {"torch.bfloat16"}
    ours = nnx.to_flat_state(nnx.state(checkpoint.abstract_model(config).language_model))
    theirs = [*baseline.model.language_model.parameters(), *baseline.lm_head.parameters()]
    assert sum(weight.numel() for weight in theirs) == sum(value.size for _, value in ours)
    encoded, lengths, tokens = [], [], 5
    baseline.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    layer = baseline.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    length = 70 + config.image_tokens
    run = generate(baseline, rows=2, length=length, tokens=tokens, cache=cache)
    assert run.prefill > 0 and run.step > 0
    assert len(encoded) == (1 if cache else tokens)
    later = [1] * (tokens - 1) if cache else [length + i for i in range(1, tokens)]
    assert lengths == [length, *later]


def test_baseline_needs_torch(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench", "generate", "--size", "tiny", "--peer"]) == 2
    error = capsys.readouterr().err
    assert error == "pixellm bench: --peer needs PyTorch: pip install 'pixellm_jax[bench]'\n"


@pytest.mark.slow
def test_a_checkpoint_in_every_precision(capsys):
    """With the shipped checkpoint: the traffic of a step falls with the bits of a weight."""
    command = f"bench generate --checkpoint {checkpoint.SHAPES_MODEL} --batch 1 --masks 3"
    kinds = ["float32", "bfloat16", "int8", "int4"]
    assert main([*command.split(), "--repeat", "1", "--precision", *kinds]) == 0
    heading, engine = capsys.readouterr().out.split("\n\n")
    assert "2.6 M parameters" in heading
    rows = [row for row in rows_of(engine) if row["codebook tokens"] == "one by one"]
    assert [row["precision"] for row in rows] == kinds
    moved = [float(row["MB/step"]) for row in rows]
    assert moved == sorted(moved, reverse=True) and moved[0] > 1.9 * moved[1]
    command = f"bench generate --checkpoint {checkpoint.SHAPES_MODEL} --masks 50"
    assert main(command.split()) == 2
    assert "is longer than the 512 positions of the model" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--batch 1 0", "--masks 2", "--repeat 0"])
def test_small_numbers_are_refused(wrong, capsys):
    assert main(f"bench generate --size tiny {wrong}".split()) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "at least" in error
