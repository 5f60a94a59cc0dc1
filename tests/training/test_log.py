"""The log of a run: Weights & Biases, and a full disk."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pixellm_jax.errors import InputError
from pixellm_jax.stopwatch import Stopwatch
from pixellm_jax.training.log import LogImage, RunLog


class Service:
    """Stand-in for the module `wandb` that records its calls."""

    def __init__(self) -> None:
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0

    def init(self, **options):
        self.started.append(options)
        return SimpleNamespace(id=options["id"] or "new", log=self._log, finish=self._finish)

    def Image(self, pixels):
        return pixels

    def _log(self, values, step):
        self.logged.append((step, values))

    def _finish(self):
        self.finished += 1


def test_resumed_run_is_one_run_in_wandb(tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    image = LogImage("truth", np.zeros((2, 3, 3), np.uint8))
    for start in (0, 4):
        log = RunLog(tmp_path, steps=8, start=start, recipe={"seed": 3}, project="shapes")
        log.log(start + 2, {"loss/total": 1.5})
        log.show(start + 2, (image,))
        log.close()
    assert [options["id"] for options in service.started] == [None, "new"]
    assert all(
        options["project"] == "shapes" and options["config"] == {"seed": 3}
        for options in service.started
    )
    assert service.logged[0] == (2, {"loss/total": 1.5})
    assert service.logged[1][0] == 2 and service.logged[1][1]["truth"] is image.pixels
    assert [step for step, _ in service.logged] == [2, 2, 6, 6]
    assert service.finished == 2


def test_missing_wandb_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install"):
        RunLog(tmp_path, steps=8, project="shapes")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the full disk of Linux")
def test_full_disk_is_one_line(tmp_path):
    log = RunLog(tmp_path, steps=8)
    log._file.close()
    log._file = open("/dev/full", "a")  # noqa: SIM115 (closed by the log)
    with pytest.raises(InputError, match=r"metrics.jsonl: writing failed \(No space left"):
        log.log(1, {"loss/total": 1.5})
    log.close()


def test_time_in_a_pause_does_not_count():
    watch = Stopwatch("data", rest="step")
    with watch.paused():
        time.sleep(0.2)
    assert sum(watch.read().values()) < 0.1
