"""Label maps: PNG files whose pixel values are class or object numbers, not colours."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipeline.errors import DamagedError
from data_pipeline.formats.masks import check_size

MODES = ("L", "P", "1")
"""Pillow's modes for 8-bit grey, palette (index, not colour) and black and white."""


def read_label_map(path: Path, hw: tuple[int, int]) -> UInt8[np.ndarray, "y x"]:
    """Read the stored values, 0..255 (0 and 1 for black and white). `hw` is the size of the image.

    Raises:
        DamagedError: the file is missing, not a complete PNG, has a mode that is not in `MODES`, or
            another size than the image.
    """
    name = repr(path.name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"no label map {str(path)!r}") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"label map {name} cannot be read ({type(error).__name__})") from None
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            check_size(image.height, image.width)
            if image.mode not in MODES:
                raise DamagedError(f"label map {name} has mode {image.mode}, expected 8-bit grey")
            if (image.height, image.width) != tuple(hw):
                actual = f"{image.height} x {image.width}"
                raise DamagedError(f"label map {name} is {actual}, its picture {hw[0]} x {hw[1]}")
            return np.array(image, np.uint8)
    except DamagedError:
        raise
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DamagedError(f"label map {name} cannot be decoded ({reason})") from None
