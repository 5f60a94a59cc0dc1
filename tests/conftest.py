"""Eight CPU devices, the folders of real data, and no silent skips in CI."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# test_harness.py copies this file alone.
_TINY = Path(__file__).parent / "support" / "tiny_checkpoint.py"
pytest_plugins = ["tests.support.tiny_checkpoint"] if _TINY.is_file() else []

DEVICE_COUNT = 8
IN_CI = os.environ.get("CI") == "true"

_COUNT_FLAG = "--xla_force_host_platform_device_count"
if _COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT_FLAG}={DEVICE_COUNT}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "jax" in sys.modules:  # a pytest plugin was faster; jax read the variable when it was imported
    sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pixellm_jax")
    for option, default, content in (
        ("--goldens", "../shared/goldens", "golden values of the PyTorch reference"),
        ("--data-root", "../shared/data/mini", "small real dataset root"),
    ):
        group.addoption(
            option,
            metavar="DIR",
            default=None,
            help=f"folder with the {content} (default: {default} beside the repository)",
        )


def pytest_sessionstart() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of a job that a shell put behind
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not IN_CI:
        return
    import jax

    if jax.device_count() != DEVICE_COUNT:
        pytest.exit(
            f"CI=true needs {DEVICE_COUNT} virtual devices, found {jax.device_count()}: "
            f"XLA_FLAGS is {os.environ['XLA_FLAGS']!r}; leave {_COUNT_FLAG} out of it.",
            returncode=3,
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Beam and libtpu have environments of their own (.ci/run): elsewhere they are not tested."""
    extras = {"beam": "apache_beam", "tpu": "libtpu"}
    left_out = {mark for mark, name in extras.items() if importlib.util.find_spec(name) is None}
    absent = [item for item in items if any(map(item.get_closest_marker, left_out))]
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if item not in absent]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed: pip install -e '.[parity]'")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    return _skip_is_failure(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    return _skip_is_failure(report)


def _skip_is_failure(report):
    if IN_CI and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: a skip is a failure under CI=true. {reason}"
    return report


@pytest.fixture(scope="session")
def goldens(pytestconfig: pytest.Config) -> Path:
    """Golden values of the PyTorch reference (`--goldens`)."""
    return _folder(pytestconfig, "--goldens", "../shared/goldens")


@pytest.fixture(scope="session")
def data_root(pytestconfig: pytest.Config) -> Path:
    """Small real dataset root (`--data-root`)."""
    return _folder(pytestconfig, "--data-root", "../shared/data/mini")


def _folder(config: pytest.Config, option: str, default: str) -> Path:
    given = config.getoption(option)
    folder = Path(given) if given else config.rootpath / default
    if not folder.is_dir():
        message = f"{folder} is not a folder: pass {option} DIR"
        if given or IN_CI:
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return folder.resolve()


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compiling costs far more here than running: half as much without XLA's optimisations."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
