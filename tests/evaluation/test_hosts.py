"""An evaluation by several processes that meet over the network is that of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pixellm_jax.cli.options import PROCESS_VARIABLES
from pixellm_jax.weights.checkpoint import SHAPES_MODEL

ROOT = Path(__file__).parents[2]
PICTURES = 5


def start(out: Path, hosts: int = 1, host: int = 0, address: str = "") -> subprocess.Popen:
    command = [sys.executable, "-m", "pixellm_jax.cli.main", "evaluate", "--out", str(out)]
    command += ["--checkpoint", str(SHAPES_MODEL), "--benchmark", "shapes"]
    command += ["--limit", str(PICTURES), "--distributed"][: None if hosts > 1 else -1]
    joining = dict(zip(PROCESS_VARIABLES, (address, str(hosts), str(host)), strict=True))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(joining if hosts > 1 else {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(process: subprocess.Popen) -> str:
    said, told = process.communicate(timeout=300)
    assert process.returncode == 0, told[-2000:]
    return "".join(line for line in said.splitlines(True) if not line.startswith("[Gloo]"))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    """To the byte: each host answers its pictures as the one does, and merges are exact."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = [start(tmp_path / "two", 2, host, address) for host in (0, 1)]
    said = [finish(process) for process in together]
    alone = finish(start(tmp_path / "one"))
    assert said[0].replace(str(tmp_path / "two"), str(tmp_path / "one")) == alone
    assert said[1] == ""
    lines = [(tmp_path / name / "questions.jsonl").read_bytes() for name in ("one", "two")]
    assert lines[0] == lines[1]
    assert not list((tmp_path / "two").glob("*-*.json*"))  # what each host had is in one file
