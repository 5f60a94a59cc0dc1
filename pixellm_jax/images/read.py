"""Reading of images: any file, Pillow image or array becomes an upright RGB array."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from pixellm_jax.errors import InputError

PIXEL_LIMIT = 89_478_485
"""Maximum number of pixels of a file: Pillow's bound against decompression bombs (268 MB)."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    source: str | os.PathLike[str] | Image.Image | np.ndarray, *, upright: bool = True
) -> UInt8[np.ndarray, "y x 3"]:
    """Read an image as RGB, 0..255, origin at the top left.

    Pixels are converted as follows:

    * Ordinary JPEG, PNG, ...: Pillow's RGB, bit for bit. Colour profiles are not applied.
    * Transparency (also of palettes, and array channel 3) is composited on white, the background
      such images are made for. Dropping it would uncover colours that were never visible.
    * 16-bit grey: 0..65535 is scaled to 0..255 linearly, so a dark image stays dark. Pillow's modes
      I and F carry no range: I counts as 16-bit, F as 0..255.
    * Animations: the first frame of a file, the current frame of an open image.

        4000 x 3000 JPEG, EXIF orientation 6 (camera held upright)  ->  u8[4000 3000 3]

    Args:
        source: the path of a file, an open Pillow image, or a uint8 array: grey [y x] or [y x 1],
            RGB [y x 3], RGBA [y x 4]. An RGB array is returned without a copy.
        upright: apply the orientation in the EXIF data. Pass False where annotations refer to the
            stored pixels, as in COCO-style datasets. (Pillow itself rotates TIFF files.)

    Raises:
        InputError: no such file, not an image, damaged, more than `PIXEL_LIMIT` pixels, or an array
            of another dtype or shape.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        path = str(getattr(source, "filename", ""))
        return _decode(source, repr(path) if path else "the image", upright)
    if isinstance(source, str | os.PathLike):
        return _from_file(Path(source), upright)
    raise InputError(
        f"found a {type(source).__name__} for an image: give a path, a Pillow image or a uint8 "
        "array [y x 3]"
    )


def _from_array(array: np.ndarray) -> UInt8[np.ndarray, "y x 3"]:
    found = f"found an image array {array.dtype}{list(array.shape)}"
    if array.dtype != np.uint8:
        raise InputError(
            f"{found}, expected uint8 of 0..255: convert it, for a range of 0..1 with "
            "(array * 255).round().astype('uint8')"
        )
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise InputError(
            f"{found}, expected [y x], [y x 1], [y x 3] or [y x 4], none of them 0: "
            "pass one image, its channels last"
        )
    if channels == 4:
        return _composite(Image.fromarray(array))
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return array


def _from_file(path: Path, upright: bool) -> UInt8[np.ndarray, "y x 3"]:
    name = repr(str(path))
    try:
        with path.open("rb") as file:
            start = file.read(24)
            if not start:
                raise InputError(f"{name} is an empty file: copy or download it again")
            file.seek(0)
            with Image.open(file) as image:
                return _decode(image, name, upright)
    except IsADirectoryError:
        raise InputError(
            f"{name} is a folder, expected an image file: name one file in it"
        ) from None
    except FileNotFoundError:
        raise InputError(f"no such file {name}: check the path and the working folder") from None
    except PermissionError:
        raise InputError(f"no permission to read {name}: check who owns the file") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name} is not an image that Pillow knows, it begins with {start!r}: check that it is "
            "what its name says, or convert it to PNG or JPEG"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error)) from None
    except (OSError, ValueError) as error:  # raised by the file system before decoding
        raise InputError(f"{name} cannot be read ({_line(error)}): check the path") from None


def _decode(image: Image.Image, name: str, upright: bool) -> UInt8[np.ndarray, "y x 3"]:
    if image.width * image.height > PIXEL_LIMIT:
        raise _too_large(name, f"found {image.height} x {image.width}")
    if not image.width * image.height:
        raise InputError(
            f"{name} has {image.height} x {image.width} pixels: give an image with pixels"
        )
    try:
        image.load()
        if upright:
            image = _make_upright(image)
        if image.mode.startswith("I") or image.mode == "F":
            return _from_deep(image, name)
        if image.has_transparency_data:
            return _composite(image)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of every type for damaged data
        raise InputError(
            f"{name} is a {image.format or image.mode} image that cannot be decoded "
            f"({_line(error)}): it is damaged or of an unusual kind; fetch it again or convert it "
            "to an RGB PNG"
        ) from None


def _make_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; unreadable EXIF data is ignored."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # malformed EXIF data is common; the pixels may be fine
        return image
    if orientation not in _UPRIGHT:
        return image
    rotated = image.transpose(_UPRIGHT[orientation])
    rotated.info = image.info
    return rotated


def _from_deep(image: Image.Image, name: str) -> UInt8[np.ndarray, "y x 3"]:
    """Convert grey of more than 8 bits. Values outside the assumed range are refused."""
    values = np.asarray(image)
    top = 255 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    unit_range = image.mode == "F" and 0 < high <= 1
    if unit_range or not (low >= 0 and high <= top):
        raise InputError(
            f"{name} has mode {image.mode} with values {low:g}..{high:g}, expected 0..{top}: "
            "scale them to 0..255 and store 8-bit grey"
        )
    grey = np.rint(values * np.float32(255 / top)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _composite(image: Image.Image) -> UInt8[np.ndarray, "y x 3"]:
    if image.mode == "La":  # Pillow converts premultiplied grey to LA only
        image = image.convert("LA")
    background = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(background, image.convert("RGBA")).convert("RGB"))


def _too_large(name: str, found: str) -> InputError:
    return InputError(f"{name} has more than {PIXEL_LIMIT} pixels ({found}): shrink it first")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
