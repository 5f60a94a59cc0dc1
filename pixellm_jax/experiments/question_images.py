"""Images of benchmark questions: files of a dataset, and shapes that are rendered again."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipeline.sources.shapes.dataset import Shapes
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.images.read import read_image
from pixellm_jax.report.figures import ImageReader


def image_reader(data: Path | None) -> ImageReader:
    """Return the reader of images that `write_report` takes.

    Args:
        data: the folder that the paths in the records are relative to; nothing outside of it is
            read. None if only rendered images are to be shown.

    Raises:
        InputError: there is no such folder.
    """
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data}: no such folder; leave it out for masks without pictures")

    def read(record: QuestionRecord) -> UInt8[np.ndarray, "y x 3"]:
        source = _find_image(record, data)
        try:
            if isinstance(source, Path):
                return read_image(source, upright=False)
            split, number = source
            stored = io.BytesIO(Shapes(split=split)[number].image)
            return read_image(Image.open(stored), upright=False)
        except (InputError, OSError, IndexError):
            name = record.picture or record.id
            raise InputError(f"{name}: the picture cannot be read") from None

    return read


def _find_image(record: QuestionRecord, data: Path | None) -> Path | tuple[str, int]:
    """Return the file of an image, or split and number of a scene of shapes.

    Raises:
        InputError: the image is neither, or its file may not be read.
    """
    if not record.picture:
        parts = record.id.split("/")
        if parts[0] != "shapes" or len(parts) != 4 or not parts[2].isdecimal():
            raise InputError("the picture was drawn and is not kept")
        return parts[1], int(parts[2])
    if data is None:
        raise InputError("no data folder was given")
    path = (data / record.picture).resolve()
    if not path.is_relative_to(data.resolve()):
        raise InputError("the picture is outside the data folder")
    return path
