"""A run: it learns, survives a kill at any moment, and ends cleanly when interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from pixellm_jax.config import MeshConfig
from pixellm_jax.errors import InputError
from pixellm_jax.sharding import make_mesh
from pixellm_jax.training.checkpoints import CHECKPOINTS, RunCheckpoints
from pixellm_jax.training.config import OptimizerConfig
from pixellm_jax.training.export import write_model
from pixellm_jax.training.loop import fit
from pixellm_jax.training.state import make_blueprint
from pixellm_jax.training.validation import Validation
from pixellm_jax.weights import checkpoint
from tests.support.small_training import (
    lora_train,
    small_loader,
    small_model,
    small_train,
    small_vocabulary,
)
from tests.support.training_process import SECONDS

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 12, 3


pytestmark = pytest.mark.usefixtures("quick_compilation")


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1):
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(config, jax.devices()[: data * fsdp * tensor])


def train(run: Path, config, mesh=None, **options):
    batches = small_loader()
    try:
        blueprint = make_blueprint(small_model(), config)
        return fit(blueprint, batches, run=run, mesh=mesh or mesh_of(), **options)
    finally:
        batches.close()


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def start(run: Path, cache: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "tests.support.training_process", str(run), str(STEPS)]
    command += [str(SAVE_EVERY)]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-2000:]
    return output


def final(run: Path) -> list[np.ndarray]:
    with np.load(run / "final.npz") as file:
        return [file[name] for name in file.files]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("undisturbed")
    finish(start(run, cache))
    return run


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Wait until this process, not an earlier one, has logged a step."""
    path = run / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    while True:
        assert process.poll() is None, "it ended before it could be killed"
        if path.exists() and path.stat().st_mtime_ns != before:
            lines = path.read_text().splitlines()
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
                return
        time.sleep(0.005)


def assert_same_run(undisturbed: Path, run: Path) -> None:
    """Compare every bit of the state, every loss and score, and the kept checkpoints."""
    for one, other in zip(final(undisturbed), final(run), strict=True):
        np.testing.assert_array_equal(one, other)
    logs = []
    checkpoints = []
    for path in (undisturbed, run):
        logs.append(
            [
                {k: v for k, v in r.items() if k.startswith(("step", "loss", "validation"))}
                for r in records(path)
            ]
        )
        checkpoints.append({int(p.name) for p in (path / CHECKPOINTS).iterdir()})
    assert logs[0] == logs[1]
    assert checkpoints[0] == checkpoints[1] == {SAVE_EVERY, STEPS - SAVE_EVERY, STEPS}


def killed_and_resumed(
    undisturbed: Path, run: Path, cache: Path, rng: random.Random, kills: int
) -> bool:
    """Kill a run at random moments, let it finish, compare every bit; return whether it resumed.

    Every kill, except for some after the first, falls between two steps or within one.
    """
    reached = 0
    for number, step in enumerate(sorted(rng.sample(range(1, STEPS - 1), kills))):
        process = start(run, cache)
        if number and rng.random() < 0.3:
            time.sleep(rng.uniform(0, 2))  # sometimes while it starts or restores
        else:
            wait_for_step(process, run, step)
            time.sleep(rng.uniform(0, SECONDS))
            reached = step
        process.kill()
        process.communicate()
        if reached > 2 * SAVE_EVERY:  # the first was complete before the second began
            assert [path for path in (run / CHECKPOINTS).iterdir() if path.name.isdigit()]
    resumed = "resuming from step" in finish(start(run, cache))
    assert resumed or reached <= 2 * SAVE_EVERY
    assert_same_run(undisturbed, run)
    return resumed


@pytest.mark.slow
def test_killed_run_ends_bit_for_bit_like_an_undisturbed_one(undisturbed, tmp_path, cache):
    """Killed after five and after ten steps."""
    assert killed_and_resumed(undisturbed, tmp_path, cache, random.Random(13), kills=2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_twenty_rounds_of_kill(undisturbed, tmp_path, cache, seed):
    killed_and_resumed(undisturbed, tmp_path, cache, random.Random(seed), kills=1 + seed % 3)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_zero(undisturbed, tmp_path, cache):
    process = start(tmp_path, cache)
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "run the same command to resume" in output
    assert not (tmp_path / "final.npz").exists()
    saved = max(int(p.name) for p in (tmp_path / CHECKPOINTS).iterdir())
    assert 2 <= saved < STEPS
    output = finish(start(tmp_path, cache))
    assert f"resuming from step {saved}" in output
    for one, other in zip(final(undisturbed), final(tmp_path), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_run_learns_and_checkpoint_moves_to_another_mesh(tmp_path):
    config = small_train(steps=30, log_every=5, save_every=15)
    train(tmp_path, config)
    losses = [r["loss/total"] for r in records(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]
    blueprint = make_blueprint(small_model(), config)
    checkpoints = RunCheckpoints(tmp_path, config, save_frozen=True)
    meshes = mesh_of(), mesh_of(2, 2, 1), mesh_of(1, 2, 2)
    one, *others = (checkpoints.restore(30, blueprint, mesh).state for mesh in meshes)
    checkpoints.close()
    for other in others:  # weights, moments, counters and the random state
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    config = dataclasses.replace(config, steps=32, log_every=1)
    outcome = train(tmp_path, config, mesh_of(2, 2, 1))
    assert outcome.finished and int(outcome.state.step) == 32
    head = outcome.state.trainable["language_model.head"]
    assert len(head.sharding.device_set) == 4
    # The loss continues where it was, not where it began.
    assert records(tmp_path)[-1]["loss/total"] < 0.9 * losses[0]


def test_best_checkpoint_is_kept_with_the_latest(tmp_path):
    scores = iter([0.2, 0.9, 0.5, 0.4, 0.3, 0.1])

    def evaluate(model):
        return Validation({"giou": next(scores)})

    config = small_train(steps=6, evaluate_every=1, save_every=1, keep_last=1, keep_best=1)
    train(tmp_path, config, evaluate=evaluate)
    kept = sorted(int(path.name) for path in (tmp_path / CHECKPOINTS).iterdir())
    assert kept == [2, 6]


def test_exported_model_has_lora_merged(tmp_path):
    config = lora_train(steps=2)
    outcome = train(tmp_path / "run", config)
    blueprint = make_blueprint(small_model(), config)
    write_model(tmp_path / "run", 2, tmp_path / "model", blueprint, small_vocabulary())
    loaded = checkpoint.load_model(tmp_path / "model")
    name = "language_model.layers.query"
    values = outcome.state.trainable | outcome.state.frozen
    down, up = (np.asarray(values[f"{name}.lora.{half}"]) for half in ("down", "up"))
    assert np.abs(up).max() > 0
    expected = np.asarray(values[f"{name}.weight"]) + 8.0 * np.einsum("ldr,lrnh->ldnh", down, up)
    # The same float32 products, summed in another order.
    np.testing.assert_allclose(
        loaded.language_model.layers.query.weight[...], expected, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(
        loaded.language_model.head[...], np.asarray(values["language_model.head"])
    )


@pytest.mark.slow
def test_training_from_a_checkpoint_does_not_save_frozen_weights(tmp_path):
    first = lora_train(steps=1)
    train(tmp_path / "first", first)
    blueprint = make_blueprint(small_model(), first)
    write_model(tmp_path / "first", 1, tmp_path / "model", blueprint, small_vocabulary())
    config = lora_train(steps=2, save_every=1)
    train(tmp_path / "run", config, init=tmp_path / "model")
    saved = checkpoint.open_arrays(tmp_path / "run" / CHECKPOINTS / "2", "state")
    assert not [name for name in saved if name.startswith("frozen")]
    with pytest.raises(InputError, match="use the same, or another --out"):
        train(tmp_path / "run", dataclasses.replace(config, steps=3), init=None)


def test_diverging_run_stops_with_a_reason(tmp_path):
    """Diverges after the first step, at a learning rate that leaves nothing finite."""
    wild = OptimizerConfig(warmup=0, learning_rate=1e38, schedule="constant")
    config = small_train(steps=50, max_skipped=3, optimizer=wild, save_every=50)
    with pytest.raises(InputError, match=r"^3 steps in a row .*train.max_skipped=3\); .*lower"):
        train(tmp_path, config)
    assert 3 <= records(tmp_path)[-1]["step"] < 10
    assert records(tmp_path)[-1]["skipped"] == 3


def test_run_of_another_model_is_not_resumed(tmp_path):
    train(tmp_path, small_train(steps=1))
    other = dataclasses.replace(
        small_train(steps=2),
        frozen=("vision_encoder",),
        trainable=tuple(name for name in small_train().trainable if name != "vision_encoder"),
    )
    with pytest.raises(InputError, match="cannot resume from here"):
        train(tmp_path, other)


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="cannot write here|writing a checkpoint failed"):
        train(tmp_path / "taken", small_train(steps=1))


@pytest.mark.slow
def test_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, monkeypatch, capfd):
    """Full from step 4 on; the same command resumes once there is space again."""
    usage, free = shutil.disk_usage, [10**9, 1000]
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(path)._replace(free=free.pop(0) if free else 10**9)
    )
    with pytest.raises(
        InputError, match=r"up to .* MiB, 0\.0 are free\); the last good one is intact"
    ):
        train(tmp_path, small_train(steps=6, save_every=2))
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["2"]
    assert train(tmp_path, small_train(steps=6, save_every=2)).finished
    assert records(tmp_path)[-1]["step"] == 6
