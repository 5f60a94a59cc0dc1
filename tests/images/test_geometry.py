"""Geometry of the canvas, on made-up pictures whose sizes are distinct primes."""

from __future__ import annotations

import numpy as np
import pytest

from pixellm_jax.errors import InputError
from pixellm_jax.images.geometry import (
    VOID,
    fit,
    fitted_size,
    mask_to_canvas,
    unfit,
)

# Float32 sums of at most four products of weights in [0, 1].
TOLERANCE = 1e-5

SIZES = [(23, 17), (17, 23), (61, 101), (101, 61), (5, 97), (97, 5), (1, 1), (31, 31), (1, 29)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("hw", "canvas", "expected"),
    [
        ((300, 500), 448, (269, 448)),
        ((427, 640), 448, (299, 448)),
        ((640, 427), 448, (448, 299)),
        ((3, 2), 7, (7, 5)),  # 4.67 goes up
        ((4, 1), 2, (2, 1)),  # exactly one half goes up
        ((10, 1000), 448, (4, 448)),
    ],
)
def test_fitted_size_by_hand(hw, canvas, expected):
    assert fitted_size(hw, canvas) == expected


@pytest.mark.parametrize("canvas", [37, 448])
def test_longest_side_fills_the_canvas_and_fitting_twice_changes_nothing(canvas):
    for height in range(1, 120, 7):
        for width in range(1, 1200, 13):
            try:
                fitted = fitted_size((height, width), canvas)
            except InputError:
                assert max(height, width) > 2 * canvas * min(height, width)
                continue
            assert max(fitted) == canvas
            assert fitted_size(fitted, canvas) == fitted


@pytest.mark.parametrize("hw", [(1, 1000), (1000, 1)])
def test_elongated_image_is_refused_with_its_size(hw):
    with pytest.raises(InputError, match=rf"{hw[0]} x {hw[1]} .*too elongated.*crop"):
        fitted_size(hw, 448)


@pytest.mark.parametrize("hw", [(0, 5), (5, 0), (-3, 5)])
def test_empty_image_is_refused(hw):
    with pytest.raises(InputError, match="at least 1"):
        fitted_size(hw, 448)


@pytest.mark.parametrize("hw", SIZES)
def test_fit_fills_the_top_left_corner_only(hw):
    image = picture(*hw) // 2 + 100
    out, (height, width) = fit(image, 43)
    assert (height, width) == fitted_size(hw, 43)
    assert out[:height, :width].min() >= 100
    assert not out[height:].any()
    assert not out[:, width:].any()


def test_fit_does_not_change_an_image_of_the_right_size():
    image = picture(43, 29)
    out, hw = fit(image, 43)
    assert hw == (43, 29)
    np.testing.assert_array_equal(out[:, :29], image)


def test_fit_commutes_with_transposition():
    image = picture(61, 101)
    out, (height, width) = fit(image, 43)
    turned, turned_hw = fit(np.ascontiguousarray(image.transpose(1, 0, 2)), 43)
    assert turned_hw == (width, height)
    # Pillow rounds to bytes between its two passes.
    assert np.abs(turned.transpose(1, 0, 2).astype(int) - out).max() <= 1


def test_unfit_by_hand():
    logits = np.array([[[0.0, 4.0], [8.0, 12.0]]], np.float32)
    # 2 -> canvas 4: 0 1 3 4 along a row; the picture is 2 x 4, so rows 0 2 remain; then 4 x 8.
    columns = np.array([0, 0.25, 0.75, 1.5, 2.5, 3.25, 3.75, 4])
    rows = np.array([0, 0.5, 1.5, 2])
    np.testing.assert_allclose(unfit(logits, (4, 8), 4)[0], rows[:, None] + columns, atol=TOLERANCE)


@pytest.mark.parametrize("hw", SIZES)
@pytest.mark.parametrize("resolution", [1, 11, 43])
def test_unfit_keeps_constants(hw, resolution):
    logits = np.full((2, resolution, resolution), -2.5, np.float32)
    out = unfit(logits, hw, 43)
    assert out.shape == (2, *hw)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, -2.5, rtol=TOLERANCE)


def test_unfit_at_the_canvas_of_an_unscaled_picture_is_a_crop():
    logits = np.random.default_rng(1).normal(size=(3, 43, 43)).astype(np.float32)
    np.testing.assert_allclose(unfit(logits, (29, 43), 43), logits[:, :29], atol=TOLERANCE)


def test_padding_beyond_the_crop_is_invisible():
    logits = np.random.default_rng(2).normal(size=(2, 43, 43)).astype(np.float32)
    height, _ = fitted_size((61, 101), 43)
    garbage = logits.copy()
    garbage[:, height:] = 1e6
    np.testing.assert_array_equal(unfit(garbage, (61, 101), 43), unfit(logits, (61, 101), 43))


def test_unfit_is_linear_and_masks_do_not_mix():
    logits = np.random.default_rng(3).normal(size=(3, 13, 13)).astype(np.float32)
    out = unfit(logits, (61, 101), 43)
    np.testing.assert_allclose(unfit(2 * logits[::-1], (61, 101), 43), 2 * out[::-1], atol=1e-5)


def test_unfit_of_no_masks():
    assert unfit(np.zeros((0, 13, 13), np.float32), (61, 101), 43).shape == (0, 61, 101)


def test_unfit_inverts_fit():
    """A smooth picture survives canvas and back, without a shift, to within a grey level or two."""
    rows, columns = np.mgrid[:211, :307]
    grey = 127 + 60 * np.sin(rows / 40) + 60 * np.cos(columns / 50)
    image = np.repeat(grey[..., None], 3, 2).round().astype(np.uint8)
    canvas, _ = fit(image, 149)
    back = unfit(canvas.transpose(2, 0, 1).astype(np.float32), (211, 307), 149)
    error = back[0] - grey
    assert np.abs(error).max() < 3
    assert abs(error.mean()) < 0.1


def test_mask_to_canvas_by_hand():
    mask = np.array([[[0, 1, 255, 1]]], np.uint8)
    expected = np.full((8, 8), VOID)
    expected[:2] = [0, 0, 1, 1, 255, 255, 1, 1]
    np.testing.assert_array_equal(mask_to_canvas(mask, 8)[0], expected)
    # At resolution 2 the centres are canvas pixels 2 and 6: of the original row, columns 1 and 3.
    # The upper centre lies at canvas row 2, which is already padding.
    np.testing.assert_array_equal(mask_to_canvas(mask, 8, 2), np.full((1, 2, 2), VOID))
    np.testing.assert_array_equal(mask_to_canvas(np.repeat(mask, 4, 1), 8, 2)[0], [[1, 1], [1, 1]])


@pytest.mark.parametrize("hw", SIZES)
@pytest.mark.parametrize("resolution", [None, 11, 59])
def test_mask_to_canvas_is_void_exactly_outside_the_fitted_area(hw, resolution):
    masks = np.random.default_rng(4).integers(0, 2, (3, *hw)).astype(np.uint8)
    out = mask_to_canvas(masks, 43, resolution)
    side = resolution or 43
    assert out.shape == (3, side, side)
    assert out.dtype == np.uint8
    height, width = fitted_size(hw, 43)
    centre = (np.arange(side) + 0.5) * 43 / side
    inside = (centre < height)[:, None] & (centre < width)
    np.testing.assert_array_equal(out[0] != VOID, inside)


def test_mask_to_canvas_is_aligned_with_fit():
    mask = np.zeros((1, 211, 307), np.uint8)
    mask[0, 37:131, 53:241] = 1
    canvas, (height, width) = fit(np.repeat(mask[0][..., None] * 255, 3, 2), 149)
    on_canvas = mask_to_canvas(mask, 149)[0]
    np.testing.assert_array_equal(
        on_canvas[:height, :width], canvas[:height, :width, 0] > 127, strict=False
    )


def test_mask_survives_canvas_and_back():
    rows, columns = np.mgrid[:211, :307]
    mask = ((rows - 90) ** 2 + (columns - 170) ** 2 < 70**2)[None]
    on_canvas = mask_to_canvas(mask.astype(np.uint8), 149, 97)
    logits = np.where(on_canvas == 1, 1.0, -1.0).astype(np.float32)
    back = unfit(logits, (211, 307), 149) > 0
    assert (back & mask).sum() / (back | mask).sum() > 0.97


def test_mask_to_canvas_of_no_masks():
    assert mask_to_canvas(np.zeros((0, 61, 101), np.uint8), 43, 11).shape == (0, 11, 11)
