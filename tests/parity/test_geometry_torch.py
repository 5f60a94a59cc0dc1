"""`unfit` against the chain of torch resizes that it replaces."""

from __future__ import annotations

import numpy as np
import pytest

from pixellm_jax.images.geometry import fitted_size, unfit

# Against float64, only the float32 products on our side are rounded.
TOLERANCE = 1e-5
# In float32, torch rounds sampling positions up to 448, in both resizes: to about 5e-5 of a pixel,
# times a slope of these logits of at most about 6 per pixel.
TOLERANCE_OF_FLOAT32_POSITIONS = 3e-4

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("hw", [(61, 101), (101, 61), (7, 97), (211, 199), (13, 11), (1, 5)])
@pytest.mark.parametrize(("resolution", "canvas"), [(11, 43), (43, 43), (64, 43), (128, 448)])
def test_unfit_is_two_bilinear_resizes_and_a_crop(hw, resolution, canvas):
    import torch
    from torch.nn.functional import interpolate

    logits = np.random.default_rng(0).normal(size=(3, resolution, resolution)).astype(np.float32)
    height, width = fitted_size(hw, canvas)
    found = unfit(logits, hw, canvas)
    for dtype, tolerance in (
        (torch.float64, TOLERANCE),
        (torch.float32, TOLERANCE_OF_FLOAT32_POSITIONS),
    ):
        square = interpolate(
            torch.from_numpy(logits)[None].to(dtype),
            (canvas, canvas),
            mode="bilinear",
            align_corners=False,
        )
        expected = interpolate(
            square[..., :height, :width], hw, mode="bilinear", align_corners=False
        )
        np.testing.assert_allclose(found, expected[0].numpy(), atol=tolerance, rtol=0)
