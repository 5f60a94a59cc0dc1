"""Reading of pictures, all made here; sizes are distinct primes."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixellm_jax.errors import InputError
from pixellm_jax.images.read import PIXEL_LIMIT, read_image

HEIGHT, WIDTH = 23, 31


def pixels(*channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, *channels), np.uint8)


def smooth() -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows * 10, columns * 8, 255 - columns * 8], -1).astype(np.uint8)


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return message


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
@pytest.mark.parametrize("as_text", [True, False])
def test_lossless_rgb_file(tmp_path, suffix, as_text):
    path = tmp_path / f"a b.{suffix}"
    image = pixels(3)
    Image.fromarray(image).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_image(str(path) if as_text else path), image)


@pytest.mark.parametrize("shape", [(3,), ()])
def test_jpeg_is_what_pillow_decodes(tmp_path, shape):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels(*shape)).save(path, quality=83)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_orientation(tmp_path, orientation, suffix):
    upright = pixels(3)
    # The stored pixels are the upright ones seen through the inverse of what the tag asks for.
    stored = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }.get(orientation, upright)
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_image(path), upright)
    np.testing.assert_array_equal(read_image(path, upright=False), stored)


def test_orientation_of_an_open_image_leaves_it_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(3)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert read_image(image).shape == (WIDTH, HEIGHT, 3)
        assert image.size == (WIDTH, HEIGHT)
        assert read_image(image).shape == (WIDTH, HEIGHT, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_malformed_exif_counts_as_none(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert read_image(tmp_path / "a.jpg").shape == (HEIGHT, WIDTH, 3)


def test_alpha_is_composited_on_white():
    image = pixels(4)
    image[..., 3] = np.arange(WIDTH) * 8
    weight = image[..., 3:] / 255
    expected = image[..., :3] * weight + 255 * (1 - weight)
    for source in (image, Image.fromarray(image)):
        np.testing.assert_allclose(read_image(source), expected, atol=1)
    image[..., 3] = 255
    np.testing.assert_array_equal(read_image(image), image[..., :3])


@pytest.mark.parametrize("modes", [["LA"], ["P", "PA"], ["RGBa"], ["LA", "La"]])
def test_other_modes_with_alpha(modes):
    image = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    image[:7, :, 3] = 255  # black where opaque
    source = Image.fromarray(image)
    for mode in modes:
        source = source.convert(mode)
    if source.mode == "PA":
        source.putalpha(Image.fromarray(image[..., 3]))
    read = read_image(source)
    assert (read[:7] == 0).all()
    assert (read[7:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_transparent_colour_of_a_png(tmp_path, mode):
    image = Image.fromarray(np.where(np.arange(WIDTH) < 7, 0, 255)[None].repeat(HEIGHT, 0) > 0)
    image = image.convert(mode)
    image.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (read_image(tmp_path / "a.png") == 255).all()


def test_palette(tmp_path):
    image = Image.fromarray(smooth()).quantize(13)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(image.convert("RGB")))
    index = np.asarray(image)
    image.save(tmp_path / "b.png", transparency=5)
    read = read_image(tmp_path / "b.png")
    assert (read[index == 5] == 255).all()
    np.testing.assert_array_equal(read[index != 5], np.asarray(image.convert("RGB"))[index != 5])


def test_one_bit():
    bits = pixels() > 99
    np.testing.assert_array_equal(
        read_image(Image.fromarray(bits)), np.repeat(bits[..., None] * np.uint8(255), 3, 2)
    )


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_maps_its_whole_range(tmp_path, suffix):
    grey = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    grey[0, :4] = [0, 65535, 257, 128]
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    read = read_image(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read[0, :4, 0], [0, 255, 1, 0])
    np.testing.assert_array_equal(read[..., 1], np.rint(grey / 257))
    np.testing.assert_array_equal(read_image(Image.fromarray(grey.astype(np.int32))), read)


def test_big_endian_sixteen_bit(tmp_path):
    grey = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 90
    image = Image.frombytes("I;16B", (WIDTH, HEIGHT), grey.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_image(image)[..., 0], np.rint(grey / 257))


def test_float_grey_is_on_0_to_255():
    grey = np.linspace(0, 255, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    np.testing.assert_array_equal(read_image(Image.fromarray(grey))[..., 2], np.rint(grey))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([0, 0.7], np.float32), ([-1, 9], np.float32), ([0, np.nan], np.float32), ([0, 70000], "i4")],
)
def test_deep_grey_outside_its_range_is_refused(values, dtype):
    with pytest.raises(InputError, match=r"mode [FI] with values .*expected 0\.\..*scale") as error:
        read_image(Image.fromarray(np.array([values], dtype)))
    one_line(error)


def test_cmyk_jpeg(tmp_path):
    image = Image.fromarray(smooth()).convert("CMYK")
    image.save(tmp_path / "a.jpg", quality=97)  # Pillow writes it inverted, as Adobe does
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - smooth()).mean() < 6
    np.testing.assert_array_equal(read_image(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["YCbCr", "HSV"])
def test_other_colour_spaces(mode):
    image = Image.fromarray(smooth()).convert(mode)
    assert np.abs(read_image(image).astype(int) - smooth()).max() < 12


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    first, *others = (Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in colours)
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    assert np.abs(read_image(tmp_path / f"a.{suffix}").astype(int) - colours[0]).max() < 8


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,)])
def test_arrays(shape):
    array = pixels(*shape)
    read = read_image(array)
    assert read.shape == (HEIGHT, WIDTH, 3)
    assert read.dtype == np.uint8
    if shape == (3,):
        np.testing.assert_array_equal(read, array)
    if shape in ((), (1,)):
        np.testing.assert_array_equal(read, np.repeat(array.reshape(HEIGHT, WIDTH, 1), 3, 2))


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((HEIGHT, WIDTH, 3), np.float32), r"float32\[23, 31, 3\].*array \* 255"),
        (np.zeros((HEIGHT, WIDTH), bool), r"bool\[23, 31\]"),
        (np.zeros((HEIGHT, WIDTH), np.uint16), r"uint16\[23, 31\]"),
        (np.zeros((3, HEIGHT, WIDTH), np.uint8), r"uint8\[3, 23, 31\].*channels last"),
        (np.zeros((2, HEIGHT, WIDTH, 3), np.uint8), r"uint8\[2, 23, 31, 3\].*one image"),
        (np.zeros((0, WIDTH, 3), np.uint8), r"uint8\[0, 31, 3\]"),
        (np.zeros((HEIGHT, WIDTH, 2), np.uint8), r"\[23, 31, 2\]"),
        (np.zeros((), np.uint8), r"uint8\[\]"),
        (np.zeros(5, np.uint8), r"uint8\[5\]"),
    ],
)
def test_wrong_arrays(array, found):
    with pytest.raises(InputError, match=found) as error:
        read_image(array)
    one_line(error)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file .*nowhere.jpg.*check the path") as error:
        read_image(tmp_path / "nowhere.jpg")
    one_line(error)


def test_folder(tmp_path):
    with pytest.raises(InputError, match="is a folder, expected an image file") as error:
        read_image(tmp_path)
    one_line(error)


def test_empty_file(tmp_path):
    (tmp_path / "a\nb.jpg").touch()
    with pytest.raises(InputError, match=r"a\\nb.jpg' is an empty file") as error:
        read_image(tmp_path / "a\nb.jpg")
    one_line(error)


def test_text_file_named_jpg(tmp_path):
    (tmp_path / "a.jpg").write_text("<!DOCTYPE html>\n<p>404")
    with pytest.raises(InputError, match="a.jpg' is not an image .*DOCTYPE html") as error:
        read_image(tmp_path / "a.jpg")
    one_line(error)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9])
def test_truncated_file(tmp_path, suffix, kept):
    whole = io.BytesIO()
    Image.fromarray(pixels(3)).save(whole, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * kept)])
    with pytest.raises(InputError, match=f"a.{suffix}") as error:
        read_image(path)
    one_line(error)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp"])
def test_damaged_files_read_or_say_so(tmp_path, suffix):
    """Whatever bytes are flipped, the outcome is a picture or an InputError."""
    whole = io.BytesIO()
    Image.fromarray(pixels(3)).save(whole, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    for _ in range(60):
        data = np.frombuffer(whole.getvalue(), np.uint8).copy()
        where = rng.integers(0, min(len(data), 300), 5)
        data[where] = rng.integers(0, 256, 5)
        path.write_bytes(data.tobytes())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert read_image(path).shape[2] == 3
        except InputError as error:
            assert "\n" not in str(error)


def png_of_size(path: Path, height: int, width: int) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [9467, 20011])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding(tmp_path, side):
    assert side**2 > PIXEL_LIMIT
    png_of_size(tmp_path / "a.png", side, side)
    with pytest.raises(InputError, match=f"a.png' has more than {PIXEL_LIMIT} .*shrink") as error:
        read_image(tmp_path / "a.png")
    one_line(error)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_where_warnings_are_errors(tmp_path):
    png_of_size(tmp_path / "a.png", 9467, 9473)
    with pytest.raises(InputError, match="shrink it") as error:
        read_image(tmp_path / "a.png")
    one_line(error)


def test_closed_image(tmp_path):
    Image.fromarray(pixels(3)).save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    image.close()
    with pytest.raises(InputError, match="a.png' .*cannot be decoded") as error:
        read_image(image)
    one_line(error)


@pytest.mark.parametrize("path", ["a\0b.jpg", "a" * 300, "a" * 300 + "/b.jpg"])
def test_path_that_no_file_system_takes(path):
    with pytest.raises(InputError, match="cannot be read") as error:
        read_image(path)
    one_line(error)
