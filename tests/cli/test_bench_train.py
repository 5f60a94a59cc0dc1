"""`pixellm bench train`: the same work at every size, its parts, and a peer that does as much."""

from __future__ import annotations

import pytest

from pixellm_jax.batch import check
from pixellm_jax.cli import bench_train
from pixellm_jax.cli.main import main
from pixellm_jax.perf import baseline
from pixellm_jax.perf.sizes import TINY
from tests.support.small_training import small_model

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
@pytest.mark.torch
def test_command(capsys, monkeypatch):
    monkeypatch.setitem(bench_train.BENCH_SIZES, "tiny", small_model())
    command = "bench train --size tiny --batch 8 --questions 2 --repeat 2 --parts --peer"
    assert main(command.split()) == 0
    heading, table, *parts = capsys.readouterr().out.split("\n\n")
    assert "recipe all" in heading and "GB/s copied" in heading
    head, *lines = table.strip().splitlines()
    assert "ours is faster by" in head
    (cells,) = (line.split() for line in lines)
    assert int(cells[0]) == 2
    seconds, peer, ratio = float(cells[1]), float(cells[-3]), float(cells[-1])
    low, high = map(float, cells[2].split("-"))
    assert 0 < low <= seconds <= high
    assert ratio == pytest.approx(peer / seconds, rel=0.1, abs=0.06)
    (part,) = parts
    for name in ("vision encoder", "language model", "forward and backward", "update"):
        assert name in part


@pytest.mark.torch
def test_the_peer_trains_all_but_clip_with_a_row_for_every_question():
    peer = baseline.make_peer(TINY)
    rows = []
    peer.model.vision_tower.register_forward_hook(lambda _, given, out: rows.append(len(given[0])))
    call = baseline.train(peer, rows=3, length=70 + TINY.image_tokens, supervised=5)
    call()
    assert rows == [3]
    for name, weight in peer.named_parameters():
        assert (weight.grad is None) == ("vision_tower" in name), name


@pytest.mark.parametrize("questions", [1, 3])
def test_a_batch_has_an_answer_of_one_target_for_every_question(questions):
    batch = bench_train.random_batch(TINY, images=2, questions=questions)
    check(batch, TINY)
    codes = TINY.codebook.scales * TINY.codebook.tokens_per_scale
    assert batch.target_valid.shape == (2, questions) and batch.target_valid.all()
    assert int(batch.loss_mask.sum()) == 2 * questions * (bench_train.ANSWER + codes)


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
