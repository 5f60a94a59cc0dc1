"""The rules of tests/conftest.py, each tried on a small test run of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPING = """
import pytest

@pytest.mark.skip(reason="tired")
def test_by_mark():
    pass

def test_by_call():
    pytest.skip("tired")

def test_runs():
    pass
"""
MODULE_SKIP = "import pytest\npytest.skip('tired', allow_module_level=True)\n"
FOLDERS = """
def test_goldens(goldens):
    assert goldens.is_dir()

def test_data_root(data_root):
    assert data_root.is_dir()
"""
DEVICES = "import jax\ndef test_devices():\n    assert jax.device_count() == 8\n"


@pytest.fixture
def run(tmp_path):
    """Run `source` as a test module beside a copy of conftest.py: exit code and output."""

    def run(source: str, *options: str, **environment: str) -> tuple[int, str]:
        root = tmp_path / "repository"
        root.mkdir(exist_ok=True)
        shutil.copy(Path(__file__).with_name("conftest.py"), root)
        (root / "test_sample.py").write_text(source)
        inherited = {k: v for k, v in os.environ.items() if k not in ("CI", "XLA_FLAGS")}
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                f"--rootdir={root}",
                *options,
            ],
            cwd=root,
            env={**inherited, **environment},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_skip_passes_on_a_laptop(run):
    code, output = run(SKIPPING)
    assert code == 0, output
    assert "1 passed, 2 skipped" in output


def test_skip_fails_in_ci(run):
    code, output = run(SKIPPING, CI="true")
    assert code == 1, output
    assert "1 passed" in output and "skipped" not in output.splitlines()[-1]
    assert output.count("a skip is a failure under CI=true. Skipped: tired") >= 2


def test_skipped_module_fails_in_ci(run):
    assert run(MODULE_SKIP)[0] == pytest.ExitCode.NO_TESTS_COLLECTED
    code, output = run(MODULE_SKIP, CI="true")
    assert code == pytest.ExitCode.INTERRUPTED, output
    assert "a skip is a failure under CI=true" in output


def test_absent_folders_skip_with_their_option(run):
    code, output = run(FOLDERS, "-rs")
    assert code == 0, output
    assert "2 skipped" in output
    assert "pass --goldens DIR" in output and "pass --data-root DIR" in output


def test_absent_folders_fail_in_ci(run):
    code, output = run(FOLDERS, CI="true")
    assert code == 1, output
    assert "2 errors" in output and "pass --goldens DIR" in output


def test_given_folder_must_exist(run):
    code, output = run(FOLDERS, "--goldens=nowhere", "--data-root=nowhere")
    assert code == 1, output
    assert "nowhere is not a folder" in output


def test_given_folders_are_used(run, tmp_path):
    code, output = run(FOLDERS, f"--goldens={tmp_path}", f"--data-root={tmp_path}", CI="true")
    assert code == 0, output


def test_eight_devices(run):
    code, output = run(DEVICES)
    assert code == 0, output


def test_other_device_count_stops_ci(run):
    flag = "--xla_force_host_platform_device_count=2"
    code, output = run(DEVICES, CI="true", XLA_FLAGS=flag)
    assert code == 3, output
    assert "CI=true needs 8 virtual devices, found 2" in output


def test_unknown_marker_is_an_error(pytestconfig):
    assert "--strict-markers" in pytestconfig.getini("addopts")


def test_annotations_are_checked_in_both_packages(pytestconfig):
    packages = pytestconfig.getoption("--jaxtyping-packages").split(",")
    assert packages == ["pixellm_jax", "data_pipeline", "beartype.beartype"]
