"""`pixellm bench train`: the same work at every size, its parts, and a comparable baseline."""

from __future__ import annotations

import pytest

from pixellm_jax.batch import check
from pixellm_jax.cli.main import main
from pixellm_jax.perf.baseline import make_baseline, make_train_step
from pixellm_jax.perf.sizes import BENCH_SIZES, TINY
from pixellm_jax.perf.train_step import ANSWER_TOKENS, random_batch
from tests.support.small_training import small_model

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
@pytest.mark.torch
def test_command(capsys, monkeypatch):
    monkeypatch.setitem(BENCH_SIZES, "tiny", small_model())
    command = "bench train --size tiny --batch 8 --questions 2 --repeat 2 --parts --peer"
    assert main(command.split()) == 0
    heading, table, *parts = capsys.readouterr().out.split("\n\n")
    assert "recipe all" in heading and "GB/s copied" in heading
    head, *lines = table.strip().splitlines()
    assert "speedup" in head
    (cells,) = (line.split() for line in lines)
    assert int(cells[0]) == 2
    seconds, baseline, ratio = float(cells[1]), float(cells[-3]), float(cells[-1])
    low, high = map(float, cells[2].split("-"))
    assert 0 < low <= seconds <= high
    assert ratio == pytest.approx(baseline / seconds, rel=0.1, abs=0.06)
    (part,) = parts
    for name in ("vision encoder", "language model", "forward and backward", "update"):
        assert name in part


@pytest.mark.torch
def test_baseline_trains_all_but_clip_with_a_row_per_question():
    baseline = make_baseline(TINY)
    rows = []
    baseline.model.vision_tower.register_forward_hook(
        lambda _, inputs, out: rows.append(len(inputs[0]))
    )
    step = make_train_step(baseline, rows=3, length=70 + TINY.image_tokens, supervised=5)
    step()
    assert rows == [3]
    for name, weight in baseline.named_parameters():
        assert (weight.grad is None) == ("vision_tower" in name), name


@pytest.mark.parametrize("questions", [1, 3])
def test_batch_has_one_target_per_question(questions):
    batch = random_batch(TINY, images=2, questions=questions)
    check(batch, TINY)
    codes = TINY.codebook.scales * TINY.codebook.tokens_per_scale
    assert batch.target_valid.shape == (2, questions) and batch.target_valid.all()
    assert int(batch.loss_mask.sum()) == 2 * questions * (ANSWER_TOKENS + codes)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("--size tiny --repeat 0", "must be at least 1"),
        ("--size tiny --questions 0", "must be at least 1"),
        ("--size tiny --batch 3", "no multiple of the"),
        ("--size 7b --batch 8 --peer", "--recipe all"),
    ],
)
def test_bad_options_are_one_line(wrong, named, capsys):
    assert main(["bench", "train", *wrong.split()]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and named in error
