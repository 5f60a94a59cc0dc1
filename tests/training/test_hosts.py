"""A training by several processes that meet over the network is that of one process."""

from __future__ import annotations

import dataclasses
import json
import os
import pprint
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import FamilyConfig
from pixellm_jax.cli.options import PROCESS_VARIABLES
from pixellm_jax.config import MeshConfig
from pixellm_jax.training.config import OptimizerConfig
from pixellm_jax.weights.checkpoint import load_model
from tests.support.small_training import small_data, small_model, small_train

ROOT = Path(__file__).parents[2]
STEPS = 4
MEASURED = ("loss/total", "gradient_norm", "validation/loss")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """That of the small trainings, with a validation in the middle and at the end."""
    data = small_data()
    held_out = dataclasses.replace(
        data, families=(FamilyConfig(weight=1.0, datasets=("shapes_simple/val",)),)
    )
    # Small smooth updates: the first ones of Adam are signs, whatever the size of a gradient, and
    # steps that are too large make much of a rounding.
    smooth = OptimizerConfig(warmup=0, learning_rate=0.01, eps=1.0, schedule="constant")
    train = small_train(
        steps=STEPS,
        optimizer=smooth,
        mesh=MeshConfig(fsdp=1),
        evaluate_every=2,
        evaluate_batches=2,
        save_every=2,
    )
    values = {
        "model": dataclasses.asdict(small_model()),
        "data": dataclasses.asdict(data),
        "train": dataclasses.asdict(train),
        "validation": dataclasses.asdict(held_out),
        "tokenizer": "shapes",
    }
    path = tmp_path_factory.mktemp("recipe") / "small.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({pprint.pformat(values)})\n"
    )
    return path


def start(
    recipe: Path,
    run: Path,
    mesh: dict[str, int],
    *,
    devices: int,
    joining: tuple[str, ...] = (),
    more: tuple[str, ...] = (),
) -> subprocess.Popen:
    command = [sys.executable, "-m", "pixellm_jax.cli.main", "train", "--config", str(recipe)]
    command += [
        "--out",
        str(run),
        *(f"--config.train.mesh.{k}={v}" for k, v in mesh.items()),
        *more,
    ]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        **dict(zip(PROCESS_VARIABLES, joining, strict=bool(joining))),
    }
    if joining:
        command.append("--distributed")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(process: subprocess.Popen) -> str:
    said, told = process.communicate(timeout=400)
    assert process.returncode == 0, told[-3000:]
    return said


def records(run: Path, name: str) -> list[float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in found if name in record]


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    """The run of one process with one device."""
    run = tmp_path_factory.mktemp("alone")
    finish(start(recipe, run, {"fsdp": 1}, devices=1))
    return run


def start_two(recipe: Path, run: Path, mesh: dict[str, int], **options) -> list[subprocess.Popen]:
    """Two processes that meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(recipe, run, mesh, joining=(address, "2", str(host)), **options) for host in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 4}], ids=str)
def test_two_processes_train_validate_and_export_as_one_does(recipe, alone, tmp_path, mesh):
    """Of the first mesh each has half of the rows; of the second both have the same ones."""
    said = [finish(process) for process in start_two(recipe, tmp_path, mesh, devices=2)]
    assert "the model; ask it" in said[0] and "the model; ask it" not in said[1]
    found = {name: (records(tmp_path, name), records(alone, name)) for name in MEASURED}
    assert [len(both) for both, _ in found.values()] == [STEPS, STEPS, 2]
    # The same rows and weights: sums in another order. This model, as it is drawn, makes 1e-4 of a
    # rounding in every update (test_train_step.py), so later steps tell less.
    losses, norms, held_out = found.values()
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=1e-5)
    np.testing.assert_allclose(norms[0][0], norms[1][0], rtol=1e-4)
    np.testing.assert_allclose(held_out[0][0], held_out[1][0], rtol=1e-3)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)
    heads = [
        np.asarray(load_model(r / "model").language_model.head[...]) for r in (alone, tmp_path)
    ]
    assert np.abs(heads[0] - heads[1]).max() < 1e-2 * np.abs(heads[0]).max()


@pytest.mark.slow
def test_one_of_two_processes_that_is_told_to_end_takes_the_other_along(recipe, tmp_path):
    """Both save the same step and exit with 0, and go on from there together."""
    path = tmp_path / "metrics.jsonl"
    processes = start_two(
        recipe, tmp_path, {"fsdp": 2}, devices=1, more=("--config.train.steps=2000",)
    )
    while not (path.exists() and path.stat().st_size):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        finish(process)
    saved = max(int(step.name) for step in (tmp_path / "checkpoints").iterdir())
    assert len(records(tmp_path, "loss/total")) == saved < 2000
    more = (f"--config.train.steps={saved + 2}",)
    for process in start_two(recipe, tmp_path, {"fsdp": 2}, devices=1, more=more):
        finish(process)
    assert len(records(tmp_path, "loss/total")) == saved + 2
    assert json.loads((tmp_path / "model.json").read_text())["step"] == saved + 2


@pytest.mark.slow
def test_a_finished_run_with_more_steps_goes_on_and_writes_its_model_again(recipe, alone, tmp_path):
    """On another mesh, too."""
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    before = (run / "model" / "params").stat().st_mtime_ns
    finish(start(recipe, run, {"data": 1, "fsdp": 1}, devices=1))  # nothing is left to do
    assert (run / "model" / "params").stat().st_mtime_ns == before
    more = (f"--config.train.steps={STEPS + 1}",)
    finish(start(recipe, run, {"data": 2, "fsdp": 1}, devices=2, more=more))
    assert len(records(run, "loss/total")) == STEPS + 1
    assert json.loads((run / "model.json").read_text())["step"] == STEPS + 1
    heads = [np.asarray(load_model(r / "model").language_model.head[...]) for r in (alone, run)]
    assert np.abs(heads[0] - heads[1]).max() > 0
    # Another seed, or another model, would be another run.
    process = start(recipe, run, {"fsdp": 1}, devices=1, more=("--config.train.seed=3",))
    _, told = process.communicate(timeout=200)
    assert process.returncode == 2 and "the run began with train.seed=0, now it is 3" in told
