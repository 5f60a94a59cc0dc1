"""Which patches, and which image tokens, show the picture."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pixellm_jax.config import VisionConfig
from pixellm_jax.images.geometry import fit
from pixellm_jax.model.vision_encoder import image_token_valid, patch_valid


def valid_patches(hw, canvas=448, patch=14):
    config = VisionConfig(canvas=canvas, patch=patch)
    return np.asarray(patch_valid(jnp.asarray([hw]), config))


def test_a_patch_is_valid_by_its_top_left_pixel():
    valid = valid_patches((269, 448))
    assert valid.shape == (1, 32, 32)
    assert valid[0, :20].all()  # row 19 begins at pixel 266
    assert not valid[0, 20:].any()
    assert valid_patches((266, 448))[0].any(axis=1).sum() == 19  # pixel 266 is padding


@pytest.mark.parametrize("hw", [(61, 101), (101, 61), (7, 97), (31, 31)])
def test_valid_patches_are_those_that_fit_draws_on(hw):
    image, fitted = fit(np.full((*hw, 3), 255, np.uint8), 35)
    np.testing.assert_array_equal(valid_patches(fitted, 35, 7)[0], image[::7, ::7, 0] > 0)


def test_every_second_patch_speaks_for_an_image_token():
    patches = patch_valid(jnp.asarray([(269, 448), (448, 100)]), VisionConfig())
    tokens = np.asarray(image_token_valid(patches, 16)).reshape(2, 16, 16)
    np.testing.assert_array_equal(tokens, patches[:, ::2, ::2])
    assert tokens[0, :10].all()
    assert not tokens[0, 10:].any()


def test_uneven_grids_by_hand():
    # Five patches a side; three tokens take patches 0, 1, 3. Width 23 of 35: patches 0..3 valid.
    wide, narrow = (
        np.asarray(image_token_valid(jnp.asarray(valid_patches((35, width), 35, 7)), 3))
        for width in (23, 21)
    )
    assert wide.all()
    # Width 21: patches 0..2 valid, so the token at patch 3 is not.
    np.testing.assert_array_equal(narrow.reshape(3, 3), [[True, True, False]] * 3)


@pytest.mark.torch
@pytest.mark.parametrize(("patches", "side"), [(32, 16), (24, 12), (5, 3), (7, 7), (5, 11)])
def test_image_tokens_sample_patches_as_torch_nearest_does(patches, side):
    import torch
    from torch.nn.functional import interpolate

    for hw in [(61, 101), (101, 61), (7, 97), (31, 31)]:
        canvas = 7 * patches
        _, fitted = fit(np.zeros((*hw, 3), np.uint8), canvas)
        valid = valid_patches(fitted, canvas, 7)
        grid = torch.from_numpy(valid.copy())[None].float()
        expected = interpolate(grid, (side, side), mode="nearest").bool().numpy()
        found = image_token_valid(jnp.asarray(valid), side)
        np.testing.assert_array_equal(found, expected.reshape(1, -1))
