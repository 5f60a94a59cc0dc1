"""Figures of a question: colours of hits, misses and extra pixels, and where images come from."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pixellm_jax.experiments.question_images import image_reader
from pixellm_jax.images import rle
from pixellm_jax.report.figures import EXTRA, HIT, MISSED, render_figures
from tests.support.made_up_run import HW, box, question
from tests.support.pages import decode_image


def decode_figure(link: str) -> np.ndarray:
    assert link.startswith("data:image/webp;base64,")
    return decode_image(link).astype(int)


def near(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Largest distance in a channel: the image is a quarter grey, and WebP is lossy."""
    return float(np.abs(pixels - (0.75 * np.array(colour) + 0.25 * 240)).mean(axis=(0, 1)).max())


def test_figures_show_hits_misses_and_extras():
    true = box(4, 4, 24, 24)
    predicted = box(4, 16, 24, 24)
    record = question(0, [(predicted, true)], extra=[box(32, 4, 12, 12)], picture="")
    (truth, prediction, difference), problem = render_figures(record, image_reader(None))
    assert [f.caption for f in (truth, prediction, difference)] == [
        "truth",
        "prediction",
        "difference",
    ]
    assert problem == "the picture was drawn and is not kept"
    pixels = decode_figure(difference.link)
    assert pixels.shape == (*HW, 3)
    assert near(pixels[8:24, 18:26], HIT) < 20
    assert near(pixels[8:24, 6:14], MISSED) < 20
    assert near(pixels[8:24, 30:38], EXTRA) < 20
    assert near(pixels[34:42, 6:14], EXTRA) < 20
    # Colour of the match, not of the place in the answer: blue in both pictures.
    blue = decode_figure(truth.link)[8:24, 18:26].mean(axis=(0, 1))
    again = decode_figure(prediction.link)[8:24, 18:26].mean(axis=(0, 1))
    np.testing.assert_allclose(blue, again, atol=25)
    assert blue[2] - blue[0] > 40 < again[2] - again[0]


def test_void_pixels_are_no_difference():
    mask = box(4, 4, 24, 24)
    record = question(0, missed=[mask], void=rle.encode(box(0, 0, 47, 16)))
    (_, _, difference), _ = render_figures(record, image_reader(None))
    pixels = decode_figure(difference.link)
    assert near(pixels[8:24, 18:26], MISSED) < 20
    grey = pixels[8:24, 4:14]
    assert (grey.max(axis=-1) - grey.min(axis=-1)).mean() < 15


def test_images_come_from_the_data_folder_alone(tmp_path):
    data = tmp_path / "data"
    (data / "photos").mkdir(parents=True)
    photo = np.zeros((*HW, 3), np.uint8)
    photo[:, 30:] = 255
    Image.fromarray(photo).save(data / "photos" / "0.png")
    Image.fromarray(photo).save(tmp_path / "secret.png")
    (truth, _, _), problem = render_figures(question(0), image_reader(data))
    pixels = decode_figure(truth.link)
    assert problem == "" and pixels[:, 40:].mean() - pixels[:, :20].mean() > 100
    outside = question(0, picture="../secret.png")
    assert (
        render_figures(outside, image_reader(data))[1] == "the picture is outside the data folder"
    )
    assert "cannot be read" in render_figures(question(1), image_reader(data))[1]
    assert render_figures(question(0), image_reader(None))[1] == "no data folder was given"


def test_shapes_are_rendered_again():
    record = question(0, id="shapes/test/3/1", picture="", hw=(96, 96))
    (truth, _, _), problem = render_figures(record, image_reader(None))
    assert problem == "" and decode_figure(truth.link).std() > 5
