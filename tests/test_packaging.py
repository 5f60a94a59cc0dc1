"""Packaging: an installation contains every data file that the packages read."""

from __future__ import annotations

import ast
import glob
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_pipeline", "pixellm_jax")


def setup_argument(name: str) -> ast.expr:
    """Return the expression of a keyword argument of `setup(...)` in setup.py."""
    (value,) = (
        keyword.value
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
        for keyword in node.keywords
        if keyword.arg == name
    )
    return value


def packaged_data() -> set[Path]:
    """Return the files that match `package_data`, whose patterns are relative to a package."""
    patterns = ast.literal_eval(setup_argument("package_data"))
    files = set()
    for package in PACKAGES:
        for init in (ROOT / package).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            for pattern in [*patterns[""], *patterns.get(name, [])]:
                files.update(glob.glob(str(init.parent / pattern), recursive=True))
    return {Path(file).relative_to(ROOT) for file in files if Path(file).is_file()}


def data_files() -> set[Path]:
    """Return all files of the packages that are not Python source or its cache."""
    return {
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }


def test_every_data_file_is_packaged():
    assert data_files() - packaged_data() == set()


@pytest.mark.parametrize(
    "name",
    [
        "sources/ade20k_classes.json",
        "sources/cocostuff_classes.json",
        "sources/shapes/tokenizer_files/tokenizer.json",
        "sources/shapes/tokenizer_files/tokenizer_config.json",
    ],
)
def test_data_file_of_data_pipeline_is_packaged(name):
    assert Path("data_pipeline", name) in packaged_data()


def test_every_source_folder_is_a_package():
    """`find_packages` ignores folders without an `__init__.py`."""
    assert ast.unparse(setup_argument("packages")) == (
        "find_packages(include=['pixellm_jax*', 'data_pipeline*'])"
    )
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()
