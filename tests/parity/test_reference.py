"""The whole model against the goldens of the PyTorch reference, through the loader; and that the
comparison sees what is wrong."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parent
VISION = ("vision_mask", "vision_selected", "vision_early")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Iterator[ModuleType]:
    """The script as a module, and a cache: runs that differ in numbers only compile once."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_default_matmul_precision": None,  # the script sets it
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location(
            "reference_check", FOLDER / "check_reference.py"
        )
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "reference_check", module)
        spec.loader.exec_module(module)
        for name, value in options.items():
            jax.config.update(name, value)
        try:
            yield module
        finally:
            for name, value in before.items():
                jax.config.update(name, value)


class Changed:
    """An open .npz in which some arrays are other ones."""

    def __init__(self, file: Any, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
        self.file, self.change, self.files = file, change, file.files

    def __getitem__(self, name: str) -> np.ndarray:
        return self.change(name, self.file[name])


@pytest.fixture(scope="module")
def file(goldens) -> Any:
    return np.load(goldens / "model_parity.npz")


QUANTITIES = 13


def test_every_quantity_is_that_of_the_reference(reference, file):
    lines = list(reference.check(file))
    assert [line for line in lines if not line.good] == []
    assert len(lines) == QUANTITIES


def test_a_change_of_any_golden_quantity_is_seen(reference, file):
    def change(name: str, array: np.ndarray) -> np.ndarray:
        array = np.array(array)
        if name.startswith("gen_") and array.ndim:
            array[-1] += 1
        elif name in ("mask_0", "mask_1"):
            array[: len(array) // 1000] ^= 255  # one pixel in a thousand
        elif name == "vision_mask":
            array[0, 5] ^= True
        elif name == "grad_norms":
            array[np.argmax(array)] *= 1.003
        elif name in ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss"):
            array = array * 1.0003
        elif name.startswith(("vision_", "llm_hidden", "low_res_")) or name.endswith("logit_grid"):
            array[np.unravel_index(np.abs(array).argmax(), array.shape)] *= 1.0003
        return array

    lines = list(reference.check(Changed(file, change)))
    assert [line.name for line in lines if line.good] == []
    assert len(lines) == QUANTITIES


@pytest.mark.parametrize(
    "weight", ["model.mm_projector.2.bias", "model.layers.1.mlp.down_proj.weight"]
)
def test_a_changed_weight_is_seen_where_it_acts_and_not_before(reference, file, weight):
    def change(name: str, array: np.ndarray) -> np.ndarray:
        return array * np.float32(1.01) if name == f"param:{weight}" else array

    lines = reference.check(Changed(file, change))
    good = list(itertools.takewhile(lambda line: line.good, lines))
    assert [line.name for line in good] == ["vision_mask", "vision_selected", "vision_early"]


def test_other_batch_shapes_are_compared_too(reference, file):
    """The rows of the second image alone: the first has none, and was asked nothing."""
    first = int(file["offset"][1])
    rows = {"input_ids", "labels", "attention_mask", "llm_hidden", *VISION}

    def change(name: str, array: np.ndarray) -> np.ndarray:
        if name in rows:
            return array[first:]
        if name == "offset":
            return np.maximum(array - first, 0)
        if name in ("gt_0", "low_res_0", "mask_0", "mask_0_logit_grid", "gen_0"):
            return array[:0]
        if name in ("gt_0_shape", "mask_0_shape"):
            return np.array([0, *array[1:]])
        return array

    lines = {line.name.split(" (")[0]: line for line in reference.check(Changed(file, change))}
    assert len(lines) == 13
    of_both_images = {"loss", "ce_loss", "mask_bce_loss", "mask_dice_loss", "gradient norms"}
    assert {name for name, line in lines.items() if not line.good} == of_both_images


def test_what_cannot_be_compared_is_a_bad_line(reference, file):
    def change(name: str, array: np.ndarray) -> np.ndarray:
        return array[:, :-1] if name == "llm_hidden" else array

    lines = list(reference.check(Changed(file, change)))
    assert [line.name for line in lines if not line.good][0].startswith("_forward: ")
    assert any(line.name == "loss" and line.good for line in lines)
