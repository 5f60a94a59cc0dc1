"""The public names, what importing the package loads, and what no import may change."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import pixellm_jax
from tests.support.scripts import load_script

draw_rooms = load_script("draw_rooms")

ROOT = Path(__file__).parents[1]
HEAVY = {"jax", "flax", "numpy", "tensorflow_datasets", "grain", "orbax", "transformers", "PIL"}


def run_python(code: str, *arguments: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_the_one_of_its_module():
    assert set(pixellm_jax._MODULES) == set(pixellm_jax.__all__) - {"__version__"}
    for name, module in pixellm_jax._MODULES.items():
        assert getattr(pixellm_jax, name) is getattr(import_module(module), name)
    assert set(pixellm_jax.__all__) <= set(dir(pixellm_jax))


def test_type_checkers_see_the_same_modules():
    tree = ast.parse((ROOT / "pixellm_jax" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
    declared = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == pixellm_jax._MODULES


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'pixellm_jax' has no attribute 'Predictr'"):
        pixellm_jax.Predictr  # noqa: B018


@pytest.mark.parametrize("module", ["pixellm_jax", "pixellm_jax.cli.main"])
def test_import_loads_no_library(module):
    loaded = run_python(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))")
    assert not HEAVY & {name.partition(".")[0] for name in json.loads(loaded)}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_line_answers_at_once(option):
    """The limit is 0.3 s of processor time, which other work on the machine does not affect."""
    code = (
        "import sys, time\n"
        "from pixellm_jax.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(time.process_time())\n"
    )
    assert float(run_python(code, option).splitlines()[-1]) < 0.3


def test_packages_are_typed():
    for package in draw_rooms.PACKAGES:
        assert (ROOT / package / "py.typed").is_file()


# What no import may change

STATE = """
import json, logging, os, sys, warnings
from importlib import import_module

def state():
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    levels = {name: getattr(item, "level", 0) for name, item in loggers.items()}
    handlers = {name: len(getattr(item, "handlers", ())) for name, item in loggers.items()}
    return levels, handlers, list(map(str, warnings.filters)), dict(os.environ)

libraries, ours = json.loads(sys.stdin.read())
for name in libraries:
    try:
        import_module(name)
    except ImportError:
        pass  # an optional extra, or a name in a module
before = state()
for name in ours:
    import_module(name)
after = state()
changed = []
for kind, old, new in zip(("level", "handlers"), before, after):
    changed += [f"{kind} of logger {name!r}" for name in new if new[name] != old.get(name, 0)]
changed += [f"warnings filter {item}" for item in after[2] if item not in before[2]]
changed += [f"warnings filter {item}" for item in before[2] if item not in after[2]]
changed += [f"os.environ[{key!r}]" for key in {*before[3], *after[3]}
            if before[3].get(key) != after[3].get(key)]
print(json.dumps(changed))
"""


def test_no_import_changes_the_process():
    """Levels and handlers of loggers, warning filters and the environment stay as they are."""
    paths = draw_rooms.modules(*draw_rooms.PACKAGES)
    ours = [draw_rooms.module_name(path) for path in paths if path.stem != "__main__"]
    found = {
        target
        for path in paths
        for _, target in draw_rooms.imports(ast.parse(path.read_text(encoding="utf-8")))
    }
    own = (*draw_rooms.PACKAGES, "__future__", "libtpu")
    libraries = sorted(name for name in found if name.partition(".")[0] not in own)
    done = subprocess.run(
        [sys.executable, "-c", STATE],
        cwd=ROOT,
        input=json.dumps([libraries, ours]),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
