"""Kept memory: a process that frees a large buffer and allocates it again faults in no pages."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from pixellm_jax.training import memory

PROGRAM = """
import resource, sys
import numpy as np
from pixellm_jax.training.memory import keep_freed_memory

if "keep" in sys.argv:
    assert keep_freed_memory()
for turn in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 23)  # 64 MiB
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_reused():
    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert faults("keep") < 10
    assert faults() > 20  # 64 MiB in pages of 4 KiB or of 2 MiB


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [
        ("cpu", ["cuda"], True),
        ("cuda,cpu", [], False),
        (None, [], True),
        (None, ["cuda"], False),
    ],
)
def test_memory_is_kept_where_jax_will_run_on_the_cpu(monkeypatch, platforms, plugins, expected):
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(memory, "entry_points", lambda group: plugins)
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    config = SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(memory, "jax", SimpleNamespace(config=config))
    assert memory.keep_freed_memory_on_cpu() == expected
