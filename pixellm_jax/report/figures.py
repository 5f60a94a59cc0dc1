"""Figures of a question for a report: true masks, predicted masks, and their difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from pixellm_jax.benchmark_question import Rle
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.images.overlay import draw_overlay
from pixellm_jax.images.rle import decode
from pixellm_jax.report.html import embed_image

ImageReader = Callable[[QuestionRecord], UInt8[np.ndarray, "y x 3"]]
"""Reads the image of a question; raises an `InputError` that says why it cannot be shown."""

MAX_SIDE = 360
"""Length of the longer side of a figure, in pixels; smaller images are not enlarged."""

HIT, MISSED, EXTRA = (68, 170, 221), (240, 168, 20), (204, 51, 153)
"""RGB colours of pixels in both masks, in the true mask only, and in the predicted mask only. They
can be told apart with any kind of colour blindness."""

_FADE = 0.5
"""Share of white that is mixed into the image under masks."""

_QUALITY = 78
"""WebP quality of the figures."""

_BLANK = 225
"""Grey level that stands in for an image that cannot be shown."""


class Figure(NamedTuple):
    """An image as a data URI, and its caption."""

    link: str
    caption: str


def render_figures(
    record: QuestionRecord, read_image: ImageReader | None
) -> tuple[list[Figure], str]:
    """Render truth, prediction and difference, and say why the image is missing ("" if it is not).

    A predicted mask has the colour and the number of the true mask it is matched with; unmatched
    predictions have the numbers after those.
    """
    scale = min(1.0, MAX_SIDE / max(record.hw))
    height, width = (max(1, round(side * scale)) for side in record.hw)
    image, problem = _read_or_blank(record, read_image)
    small = Image.fromarray(image).convert("L").resize((width, height), Image.Resampling.BICUBIC)
    grey = fade(small, _FADE)
    truth, predicted = (
        _resize(masks, record.hw, (height, width)) for masks in (record.truth, record.predicted)
    )
    matched, labels = _in_true_order(record, predicted)
    true_labels = [str(number + 1) for number in range(len(truth))]
    images = {
        "truth": np.asarray(draw_overlay(grey, truth, true_labels)),
        "prediction": np.asarray(draw_overlay(grey, matched, labels)),
        "difference": _render_difference(record, grey, truth, predicted),
    }
    figures = [
        Figure(embed_image(pixels, quality=_QUALITY), caption) for caption, pixels in images.items()
    ]
    return figures, problem


def fade(image: Image.Image, share: float) -> UInt8[np.ndarray, "y x 3"]:
    """Mix a share of white (0 to 1) into a grey-scale image, so that every colour shows on it."""
    grey = np.asarray(image, np.float32)
    pale = (grey + share * (255 - grey)).astype(np.uint8)
    return np.repeat(pale[..., None], 3, axis=2)


def _read_or_blank(
    record: QuestionRecord, read_image: ImageReader | None
) -> tuple[UInt8[np.ndarray, "y x 3"], str]:
    problem = "no data folder was given"
    if read_image is not None:
        try:
            return read_image(record), ""
        except InputError as error:
            problem = str(error)
    return np.full((*record.hw, 3), _BLANK, np.uint8), problem


def _resize(
    masks: Sequence[Rle], hw: tuple[int, int], to: tuple[int, int]
) -> Bool[np.ndarray, "m Y X"]:
    """Decode masks and resize them by nearest neighbour."""
    rows, columns = (
        (np.arange(n) * 2 + 1) * side // (2 * n) for n, side in zip(to, hw, strict=True)
    )
    pixels = [decode([mask], hw)[0][rows][:, columns] for mask in masks]
    return np.array(pixels, bool).reshape(-1, *to)


def _in_true_order(
    record: QuestionRecord, predicted: Bool[np.ndarray, "m Y X"]
) -> tuple[Bool[np.ndarray, "... Y X"], list[str]]:
    """Return predicted masks in the order of the true ones, and their labels.

    A missed target has an empty mask and no label; unmatched predictions come last.
    """
    matches = {t: p for p, t, _, _ in record.pairs if p is not None and t is not None}
    extra = [p for p, t, _, _ in record.pairs if p is not None and t is None]
    count = len(record.truth)
    masks = np.zeros((count + len(extra), *predicted.shape[1:]), bool)
    for place, source in [*matches.items(), *((count + i, p) for i, p in enumerate(extra))]:
        masks[place] = predicted[source]
    labels = [str(place + 1) if place in matches else "" for place in range(count)]
    return masks, labels + [f"extra {count + i + 1}" for i in range(len(extra))]


def _render_difference(
    record: QuestionRecord,
    image: UInt8[np.ndarray, "Y X 3"],
    truth: Bool[np.ndarray, "m Y X"],
    predicted: Bool[np.ndarray, "j Y X"],
) -> UInt8[np.ndarray, "Y X 3"]:
    """Colour hits, misses and extra pixels of all matched pairs; hatch void pixels.

    A pixel that is wrong in any pair is shown as wrong.
    """
    empty = np.zeros(image.shape[:2], bool)
    hit = empty.copy()
    missed = empty.copy()
    extra = empty.copy()
    for p, t, _, _ in record.pairs:
        prediction = empty if p is None else predicted[p]
        target = empty if t is None else truth[t]
        hit |= prediction & target
        missed |= target & ~prediction
        extra |= prediction & ~target
    void = () if record.void is None else (record.void,)
    known = ~_resize(void, record.hw, empty.shape).any(axis=0)  # type: ignore[arg-type]
    pixels = image.astype(np.float32)
    for where, colour in ((hit, HIT), (missed, MISSED), (extra, EXTRA)):
        inside = where & known
        pixels[inside] = 0.25 * image[inside] + 0.75 * np.array(colour, np.float32)
    rows, columns = np.indices(empty.shape)
    pixels[~known & ((rows + columns) // 4 % 2 == 0)] *= 0.6
    return pixels.astype(np.uint8)
