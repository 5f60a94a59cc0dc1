"""A tiny model in every form it has on disk, made once per session, and tools to rewrite copies.

A plugin of pytest, so it imports the package late: what is imported before the jaxtyping hook is
in place would go unchecked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest

from tests.support.scripts import load_script

if TYPE_CHECKING:
    from pixellm_jax.inference.predictor import Predictor
    from pixellm_jax.model.pixellm import PixelLM
    from pixellm_jax.text.vocabulary import Vocabulary

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


class Tiny(NamedTuple):
    """Folders of the tiny model. They are shared by all tests: change copies only."""

    hf: Path
    clip: Path
    jax: Path


def load_maker() -> ModuleType:
    """`scripts/make_random_checkpoint.py` as a module."""
    return load_script("make_random_checkpoint")


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    return load_maker()


@pytest.fixture(scope="session")
def tiny(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    from pixellm_jax.weights.convert import convert

    folder = tmp_path_factory.mktemp("tiny")
    maker.write(folder, maker.tiny())
    made = Tiny(folder / "hf", folder / "clip", folder / "jax")
    convert(made.hf, made.clip, made.jax)
    return made


@pytest.fixture(scope="session")
def predictor(tiny: Tiny) -> Predictor:
    """The tiny model; every question is answered by "It is [SEG]."."""
    from pixellm_jax.inference.predictor import Predictor

    return Predictor.load(tiny.jax, max_new_tokens=12)


class Varied(NamedTuple):
    """A model whose answers depend on the question: some words, no to three targets, or no end."""

    model: PixelLM
    vocabulary: Vocabulary


@pytest.fixture(scope="session")
def varied(tiny: Tiny) -> Varied:
    """The tiny model with its layers turned up and another head.

    The rows of the first codebook token and of `</s>` are longer than others, so that they are
    chosen often; each further codebook token answers to the embedding of the one before it.
    """
    from pixellm_jax.weights import checkpoint

    model = checkpoint.load_model(tiny.jax)
    vocabulary = checkpoint.read_vocabulary(tiny.jax, model.config)
    language, group = model.language_model, list(vocabulary.group)
    for projection in (language.layers.out, language.layers.down):
        projection.weight.set_value(1000 * projection.weight[...])
    embedding = np.array(language.embedding[...])
    head = np.random.default_rng(1).standard_normal(embedding.shape, np.float32)
    head[group[0]] *= 2.5
    head[vocabulary.eos] *= 2
    embedding[group] *= 6
    for before, after in zip(group, group[1:], strict=False):
        head[after] = 5 * embedding[before] / np.linalg.norm(embedding[before])
    language.embedding.set_value(embedding)
    language.head.set_value(head)
    return Varied(model, vocabulary)


@pytest.fixture
def copied(tmp_path: Path, tiny: Tiny) -> Callable[[str], Path]:
    """Gives a copy, free to be damaged, of one of the folders of `tiny`."""
    return lambda form: shutil.copytree(getattr(tiny, form), tmp_path / f"{form} copy")


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    from pixellm_jax.weights.torch_folder import open_folder

    return {name: tensor.read() for name, tensor in open_folder(folder).items()}


def read_arrays(folder: Path, part: str = "params") -> dict[str, np.ndarray]:
    """The arrays of a checkpoint."""
    from pixellm_jax.weights import checkpoint

    opened = checkpoint.open_arrays(folder, part)
    return {name: checkpoint.read(array) for name, array in opened.items()}


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Replaces all weights of a folder by these, in one file."""
    from pixellm_jax.weights.torch_folder import write_safetensors

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
