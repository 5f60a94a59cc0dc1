"""Decoding, scaling, padding and normalisation against `data/preprocess.json` and `.npz`.

The centre-cropping route of the reference is not part of this implementation: the released models
were trained on padded pictures, and cropping them gives wrong masks without a word
(docs/reference_notes.md I10).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pixellm_jax.errors import InputError
from pixellm_jax.images.geometry import fit, fitted_size
from pixellm_jax.images.read import read_image

# Float32 normalisation of identical bytes; the file stores float32 grids and float64 statistics.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden(goldens: Path, data_root: Path) -> SimpleNamespace:
    table = json.loads((goldens / "data/preprocess.json").read_text())
    with np.load(goldens / "data/preprocess.npz") as file:
        grids = dict(file)
    images = {row["key"]: read_image(data_root / row["image"]) for row in table["images"]}
    assert images, "the golden file names no picture"
    return SimpleNamespace(table=table, grids=grids, images=images, rows=table["images"])


def sha1(array: np.ndarray) -> str:
    return hashlib.sha1(np.ascontiguousarray(array).tobytes()).hexdigest()


def slices(golden: SimpleNamespace, rows: str, columns: str) -> tuple[slice, slice]:
    grid = golden.table["grid"]
    first, second = (
        slice(*(int(part) if part else None for part in grid[key].split(":")))
        for key in (rows, columns)
    )
    return first, second


def normalised(golden: SimpleNamespace, canvas: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """What the device does with a canvas: statistics on 0..255, then zeros in the padding."""
    mean, std = (np.array(golden.table[key], np.float32) for key in ("mean_255", "std_255"))
    out = np.zeros(canvas.shape, np.float32)
    inside = np.s_[: hw[0], : hw[1]]
    out[inside] = (canvas[inside].astype(np.float32) - mean) / std
    return out.transpose(2, 0, 1)


def test_decoded_pictures_are_those_of_the_reference(golden):
    for row in golden.rows:
        image = golden.images[row["key"]]
        assert list(image.shape[:2]) == row["size_hw"], row["image"]
        assert sha1(image) == row["decoded_sha1"], row["image"]


def test_scaled_pictures_are_those_of_the_reference(golden):
    for row in golden.rows:
        for longest, expected in row["longest"].items():
            canvas, (height, width) = fit(golden.images[row["key"]], int(longest))
            scaled = canvas[:height, :width]
            assert [height, width] == expected["resized_hw"], (row["image"], longest)
            assert sha1(scaled) == expected["resized_sha1"], (row["image"], longest)
            np.testing.assert_allclose(
                scaled.mean((0, 1)), expected["resized_mean_rgb"], atol=TOLERANCE
            )


def test_scaled_bytes_at_448(golden):
    rows, columns = slices(golden, "u8_rows", "u8_cols")
    for key, image in golden.images.items():
        canvas, (height, width) = fit(image, 448)
        np.testing.assert_array_equal(
            canvas[:height, :width][rows, columns], golden.grids[f"{key}_resized448_u8"]
        )


def test_padded_tensors(golden):
    rows, columns = slices(golden, "rows", "cols")
    for row in golden.rows:
        for side, expected in row["longest"].items():
            if "padded_shape" not in expected:
                continue
            canvas, hw = fit(golden.images[row["key"]], int(side))
            tensor = normalised(golden, canvas, hw)
            assert list(tensor.shape) == expected["padded_shape"]
            precise = tensor.astype(np.float64)
            for name, value in (
                ("mean", precise.mean((1, 2))),
                ("std", precise.std((1, 2))),
                ("min", precise.min()),
                ("max", precise.max()),
            ):
                np.testing.assert_allclose(
                    value, expected[f"padded_{name}"], atol=TOLERANCE, rtol=0, err_msg=name
                )
            np.testing.assert_allclose(
                tensor[:, rows, columns],
                golden.grids[f"{row['key']}_padded{side}"],
                atol=TOLERANCE,
                rtol=0,
            )


def test_table_of_scaled_sizes(golden):
    for row in golden.table["resized_shape_table"]:
        for canvas, expected in row.items():
            if canvas == "hw":
                continue
            if min(expected) == 0:  # the reference would go on with an empty picture
                with pytest.raises(InputError, match="too elongated"):
                    fitted_size(tuple(row["hw"]), int(canvas))
            else:
                assert list(fitted_size(tuple(row["hw"]), int(canvas))) == expected
