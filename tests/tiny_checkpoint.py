"""A tiny model in every form it has on disk, made once per session, and tools to rewrite copies.

A plugin of pytest, so it imports the package late: what is imported before the jaxtyping hook is
in place would go unchecked.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest

if TYPE_CHECKING:
    from pixellm_jax.predictor import Predictor

MAKER = Path(__file__).parents[1] / "scripts" / "make_random_checkpoint.py"
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


class Tiny(NamedTuple):
    """Folders of the tiny model. They are shared by all tests: change copies only."""

    hf: Path
    clip: Path
    jax: Path


def load_maker() -> ModuleType:
    """`scripts/make_random_checkpoint.py` as a module."""
    spec = importlib.util.spec_from_file_location("make_random_checkpoint", MAKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    return load_maker()


@pytest.fixture(scope="session")
def tiny(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    from pixellm_jax.convert import convert

    folder = tmp_path_factory.mktemp("tiny")
    maker.write(folder, maker.tiny())
    made = Tiny(folder / "hf", folder / "clip", folder / "jax")
    convert(made.hf, made.clip, made.jax)
    return made


@pytest.fixture(scope="session")
def predictor(tiny: Tiny) -> Predictor:
    """The tiny model; every question is answered by "It is [SEG]."."""
    from pixellm_jax.predictor import Predictor

    return Predictor.load(tiny.jax, max_new_tokens=12)


@pytest.fixture
def copied(tmp_path: Path, tiny: Tiny) -> Callable[[str], Path]:
    """Gives a copy, free to be damaged, of one of the folders of `tiny`."""
    return lambda form: shutil.copytree(getattr(tiny, form), tmp_path / f"{form} copy")


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    from pixellm_jax.tensor_files import open_folder

    return {name: tensor.read() for name, tensor in open_folder(folder).items()}


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Replaces all weights of a folder by these, in one file."""
    from pixellm_jax.tensor_files import write_safetensors

    for pattern in WEIGHTS:
        for file in folder.glob(pattern):
            file.unlink()
    write_safetensors(folder / "model.safetensors", tensors)


def change_json(path: Path, **changes: object) -> None:
    """Sets keys; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def assert_same_tensors(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> None:
    """Names, shapes, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name
