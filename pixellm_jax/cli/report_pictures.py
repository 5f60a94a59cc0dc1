"""Pictures of a question for a report: its true masks, the predicted ones, the difference."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from data_pipeline.sources.shapes.dataset import Shapes
from pixellm_jax.benchmark_question import Rle
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.images.overlay import draw_overlay
from pixellm_jax.images.read import read_image
from pixellm_jax.images.rle import decode

SIDE = 360
"""Longest side of a picture on the page, in pixels."""

HIT, MISSED, EXTRA = (68, 170, 221), (240, 168, 20), (204, 51, 153)
"""Colours of pixels that truth and prediction share, of those of the truth alone, and of the
prediction alone; the eye of the colour-blind tells them apart, too."""

_PALE = 0.5
"""How far the picture under masks is bleached towards white."""

_MISSING = 225
"""Grey of a picture that is not there."""


class Figure(NamedTuple):
    """A picture as a link that holds it, and what it shows."""

    link: str
    about: str


def draw_figures(record: QuestionRecord, data: Path | None) -> tuple[list[Figure], str]:
    """Truth, prediction and difference; and why the picture is not under them ("" if it is).

    A predicted mask has the colour and number of the true mask that it is matched with; extra ones
    have the numbers after.
    """
    height, width = record.hw
    scale = min(1.0, SIDE / max(record.hw))
    hw = max(1, round(height * scale)), max(1, round(width * scale))
    picture, problem = _read_picture(record, data)
    grey = _bleach(picture, hw)
    truth, predicted = (_shrink(masks, record.hw, hw) for masks in (record.truth, record.predicted))
    ordered, numbers = _in_true_order(record, predicted)
    true_names = [str(number + 1) for number in range(len(truth))]
    figures = [
        Figure(_link(np.asarray(draw_overlay(grey, truth, true_names))), "truth"),
        Figure(_link(np.asarray(draw_overlay(grey, ordered, numbers))), "prediction"),
        Figure(_link(_difference(record, grey, truth, predicted)), "difference"),
    ]
    return figures, problem


def _read_picture(
    record: QuestionRecord, data: Path | None
) -> tuple[UInt8[np.ndarray, "y x 3"], str]:
    blank = np.full((*record.hw, 3), _MISSING, np.uint8)
    parts = record.id.split("/")
    try:
        if not record.picture:
            if parts[0] != "shapes" or len(parts) != 4 or not parts[2].isdecimal():
                return blank, "the picture was drawn and is not kept"
            stored = Shapes(split=parts[1])[int(parts[2])].image
            return read_image(Image.open(io.BytesIO(stored)), upright=False), ""
        if data is None:
            return blank, "no data folder was given"
        path = (data / record.picture).resolve()
        if not path.is_relative_to(data.resolve()):
            return blank, "the picture is outside the data folder"
        return read_image(path, upright=False), ""
    except (InputError, OSError, IndexError):
        return blank, f"{record.picture or record.id}: the picture cannot be read"


def _bleach(picture: UInt8[np.ndarray, "y x 3"], hw: tuple[int, int]) -> UInt8[np.ndarray, "Y X 3"]:
    """The picture in pale grey, on which every colour shows, at the size of the page."""
    small = Image.fromarray(picture).convert("L").resize((hw[1], hw[0]), Image.Resampling.BICUBIC)
    grey = np.asarray(small, np.float32)
    pale = (grey + _PALE * (255 - grey)).astype(np.uint8)
    return np.repeat(pale[..., None], 3, axis=2)


def _shrink(
    masks: tuple[Rle, ...], hw: tuple[int, int], to: tuple[int, int]
) -> Bool[np.ndarray, "m Y X"]:
    """Masks at the size of the page, each pixel of which is one of theirs."""
    rows, columns = (
        (np.arange(n) * 2 + 1) * side // (2 * n) for n, side in zip(to, hw, strict=True)
    )
    pixels = [decode([mask], hw)[0][rows][:, columns] for mask in masks]
    return np.array(pixels, bool).reshape(-1, *to)


def _in_true_order(
    record: QuestionRecord, predicted: Bool[np.ndarray, "m Y X"]
) -> tuple[Bool[np.ndarray, "... Y X"], list[str]]:
    """Predicted masks in the places of their true ones, empty where missed; and their names."""
    places = {t: p for p, t, _, _ in record.pairs if p is not None and t is not None}
    extra = [p for p, t, _, _ in record.pairs if p is not None and t is None]
    count = len(record.truth)
    shown = np.zeros((count + len(extra), *predicted.shape[1:]), bool)
    for place, source in [*places.items(), *((count + i, p) for i, p in enumerate(extra))]:
        shown[place] = predicted[source]
    names = [str(place + 1) if place in places else "" for place in range(count)]
    return shown, names + [f"extra {count + i + 1}" for i in range(len(extra))]


def _difference(
    record: QuestionRecord,
    picture: UInt8[np.ndarray, "Y X 3"],
    truth: Bool[np.ndarray, "m Y X"],
    predicted: Bool[np.ndarray, "j Y X"],
) -> UInt8[np.ndarray, "Y X 3"]:
    """Where both masks of a pair are, where one is missed, where one is too much; void is hatched.

    A pixel that is wrong in any pair is shown as wrong.
    """
    nothing = np.zeros(picture.shape[:2], bool)
    hit, missed, extra = nothing.copy(), nothing.copy(), nothing.copy()
    for p, t, _, _ in record.pairs:
        found = nothing if p is None else predicted[p]
        wanted = nothing if t is None else truth[t]
        hit |= found & wanted
        missed |= wanted & ~found
        extra |= found & ~wanted
    void = () if record.void is None else (record.void,)
    known = ~_shrink(void, record.hw, nothing.shape).any(axis=0)  # type: ignore[arg-type]
    drawn = picture.astype(np.float32)
    for where, colour in ((hit, HIT), (missed, MISSED), (extra, EXTRA)):
        inside = where & known
        drawn[inside] = 0.25 * picture[inside] + 0.75 * np.array(colour, np.float32)
    rows, columns = np.indices(nothing.shape)
    drawn[~known & ((rows + columns) // 4 % 2 == 0)] *= 0.6
    return drawn.astype(np.uint8)


def _link(pixels: UInt8[np.ndarray, "y x 3"]) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", quality=78, method=2)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
