"""Geometry of the canvas, the padded square that the model sees: longest-side resize and inverse.

The image is scaled until its longest side fills the canvas and is placed in the top left corner;
the rest, at the bottom or at the right, is padding. With a canvas of 448 pixels:

    original 427 x 640    fit     canvas 448 x 448: image in [:299, :448], zeros below
    logits   128 x 128    unfit   427 x 640: resize to the canvas, crop to 299 x 448, resize back

Coordinates refer to pixel *areas*: pixel i covers [i, i + 1) and its centre is i + 1/2. Heights
come before widths. Each axis has its own scale, `original / fitted`, so rounding the fitted size
stretches the image by less than a pixel and never shifts it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image

from pixellm_jax.errors import InputError

VOID = 255
"""Mask value of pixels that losses and metrics ignore; the padding is void."""


def fitted_size(hw: tuple[int, int], canvas: int) -> tuple[int, int]:
    """Return the (height, width) of an image on the canvas.

    `floor(side * canvas / longest side + 1/2)` for both sides: the longest-side resize of SAM,
    with which PixelLM was trained. The longest side becomes `canvas` exactly, hence
    `fitted_size(fitted_size(hw, c), c) == fitted_size(hw, c)`.

        (427, 640) on 448  ->  (299, 448)
        (500, 300) on 448  ->  (448, 269)

    Raises:
        InputError: a side is not positive, or would have no pixel on the canvas.
    """
    height, width = hw
    if min(height, width, canvas) < 1:
        raise InputError(
            f"an image of {height} x {width} pixels on a canvas of {canvas}: every size must be "
            "at least 1; check the image and the configured canvas"
        )
    scale = canvas / max(height, width)
    fitted = int(height * scale + 0.5), int(width * scale + 0.5)
    if min(fitted) < 1:
        raise InputError(
            f"an image of {height} x {width} pixels is too elongated: its short side would vanish "
            f"on a canvas of {canvas}; at most {2 * canvas} : 1 fits, so crop the image first"
        )
    return fitted


def fit(
    image: UInt8[np.ndarray, "y x 3"], canvas: int
) -> tuple[UInt8[np.ndarray, "{canvas} {canvas} 3"], tuple[int, int]]:
    """Resize an RGB image onto the canvas; return the canvas and the fitted (height, width).

    The resize is bilinear and antialiased when shrinking, bit-identical to Pillow's. The padding is
    zero here *and* must be zero after normalisation, which happens on the device.

        u8[427 640 3] on 448  ->  u8[448 448 3], (299, 448); rows 299.. are zero

    Raises:
        InputError: the image is empty or too elongated (`fitted_size`).
    """
    height, width = fitted_size(image.shape[:2], canvas)
    fitted = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    out = np.zeros((canvas, canvas, 3), np.uint8)
    out[:height, :width] = np.asarray(fitted)
    return out, (height, width)


def unfit(
    mask_logits: Float[np.ndarray, "m Y X"], hw: tuple[int, int], canvas: int
) -> Float32[np.ndarray, "m y x"]:
    """Resize mask logits of the canvas to the original image size `hw`; the inverse of `fit`.

    Bilinear to the canvas, crop to the fitted size, bilinear to the original: with half-pixel
    centres, clamped at the edges of the canvas and of the crop, and without antialiasing, as in
    PixelLM. All steps are linear and separable, so they are one small matrix per axis, out =
    R L C^T, and no array of the canvas's size is allocated. Logits must be finite.

        f32[5 128 128], (427, 640), canvas 448  ->  f32[5 427 640]; inside where positive

    Raises:
        InputError: `hw` is empty or too elongated (`fitted_size`).
    """
    height, width = fitted_size(hw, canvas)
    rows, columns = mask_logits.shape[1:]
    down = _resize_back(rows, canvas, height, hw[0])
    right = np.ascontiguousarray(_resize_back(columns, canvas, width, hw[1]).T)
    out = np.empty((len(mask_logits), *hw), np.float32)
    for target, logits in zip(out, mask_logits, strict=True):
        np.matmul(down @ logits.astype(np.float32), right, out=target)
    return out


def mask_to_canvas(
    masks: UInt8[np.ndarray, "m y x"], canvas: int, resolution: int | None = None
) -> UInt8[np.ndarray, "m Y X"]:
    """Resize target masks onto the canvas like `fit`, at `resolution` (default: the canvas).

    Nearest neighbour: each output pixel takes the value of the original pixel under its *centre*.
    Centres outside the fitted size are padding and become `VOID`; 0, 1 and `VOID` are unchanged.
    Integer arithmetic, so ties never depend on rounding. Parts thinner than an output pixel may
    vanish.

        u8[5 427 640], canvas 448, resolution 128  ->  u8[5 128 128]; rows 85.. are void

    Raises:
        InputError: the masks are empty or too elongated (`fitted_size`).
    """
    resolution = canvas if resolution is None else resolution
    height, width = masks.shape[1:]
    fitted_height, fitted_width = fitted_size((height, width), canvas)
    rows = _under_centres(height, fitted_height, canvas, resolution)
    columns = _under_centres(width, fitted_width, canvas, resolution)
    out = np.full((len(masks), resolution, resolution), VOID, np.uint8)
    # Decoded masks are column-major: selecting columns first is twice as fast as rows first.
    for resized, mask in zip(out, masks, strict=True):
        resized[: len(rows), : len(columns)] = mask.T[columns].T[rows]
    return out


def _under_centres(
    original: int, fitted: int, canvas: int, resolution: int
) -> Int[np.ndarray, " Y"]:
    """Return the original index under the centre of each output pixel inside the fitted side."""
    centre = (2 * np.arange(resolution) + 1) * canvas  # on the canvas, in units of 1/(2*resolution)
    return centre[centre < 2 * resolution * fitted] * original // (2 * resolution * fitted)


def _resize_back(
    side: int, canvas: int, fitted: int, original: int
) -> Float32[np.ndarray, "{original} {side}"]:
    """Return the matrix from a side of the logits via the cropped canvas to the original side."""
    to_canvas = _bilinear(side, canvas)[:fitted]
    return (_bilinear(fitted, original) @ to_canvas).astype(np.float32)


def _bilinear(source: int, target: int) -> Float[np.ndarray, "{target} {source}"]:
    """Return the matrix of 1-D linear interpolation: half-pixel centres, clamped at the ends."""
    position = (np.arange(target) + 0.5) * (source / target) - 0.5
    position = position.clip(0, source - 1)
    low = position.astype(int)
    high = np.minimum(low + 1, source - 1)
    matrix = np.zeros((target, source))
    row = np.arange(target)
    matrix[row, low] = 1 - (position - low)
    matrix[row, high] += position - low
    return matrix
