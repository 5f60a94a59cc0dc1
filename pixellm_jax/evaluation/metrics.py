"""IoU of masks in exact integers: gIoU, cIoU, and accuracy on whether there is a target at all.

Areas are counted per mask, on the device or the host; sums are integers, so that neither the order
of the masks nor their split over batches and hosts changes a bit of a score.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Int, UInt8

from pixellm_jax.images.geometry import VOID

Array = Any
"""On the host a numpy array, on the device a jax array."""

IOU_UNIT = 2**40
"""An IoU of 1, as it is summed: each IoU is rounded once, by at most 5e-13."""


class Areas(NamedTuple):
    """Pixels of a predicted mask, of its true mask and of what they share; void does not count."""

    intersection: Int[Array, "..."]
    prediction: Int[Array, "..."]
    truth: Int[Array, "..."]


class Sums(NamedTuple):
    """Sums over masks, Python integers.

    iou: in units of 1 / IOU_UNIT. targets, no_targets: true masks with and without any pixel.
    targets_found, no_targets_found: of these, where the prediction has pixels, and has none.
    """

    masks: int = 0
    iou: int = 0
    intersection: int = 0
    union: int = 0
    targets: int = 0
    targets_found: int = 0
    no_targets: int = 0
    no_targets_found: int = 0


class Scores(NamedTuple):
    """Scores from 0 to 1, and NaN where there is nothing to divide by.

    giou: mean IoU of the masks. ciou: summed intersections over summed unions. t_acc, n_acc: how
    many true masks with pixels got a prediction with pixels, and how many without got one without
    (gRefCOCO).
    """

    giou: float
    ciou: float
    t_acc: float
    n_acc: float


def measure(inside: Bool[Array, "... y x"], truth: UInt8[Array, "... y x"]) -> Areas:
    """Areas of predicted masks against true ones: 0 outside, `VOID` unknown, all else inside."""
    known = truth != VOID
    inside, truth = inside & known, (truth != 0) & known
    return Areas(*(mask.sum((-2, -1)) for mask in (inside & truth, inside, truth)))


def tally(
    areas: Areas,
    *,
    valid: Bool[Array, "..."] | None = None,
    extra: Bool[Array, "..."] | None = None,
) -> Sums:
    """Sums over masks, of those that are `valid` (default: all).

    IoU = intersection / union. Where both masks are empty, the prediction is right that there is
    nothing: 1. An `extra` prediction (default: none), which has no true mask, is 0 even if empty.
    """
    valid = np.ones(np.shape(areas.truth), bool) if valid is None else np.asarray(valid)
    asked = ~np.asarray(extra)[valid] if extra is not None else np.ones(valid.sum(), bool)
    intersection, prediction, truth = (np.asarray(area)[valid].astype(np.int64) for area in areas)
    union = prediction + truth - intersection
    iou = np.where(union > 0, intersection / np.maximum(union, 1), asked)
    present, absent = asked & (truth > 0), asked & (truth == 0)
    counts = (
        len(union),
        np.rint(iou * IOU_UNIT).astype(np.int64).sum(),
        intersection.sum(),
        union.sum(),
        present.sum(),
        (present & (prediction > 0)).sum(),
        absent.sum(),
        (absent & (prediction == 0)).sum(),
    )
    return Sums(*map(int, counts))


def merge(*parts: Sums) -> Sums:
    """Sums of everything: of batches, images or hosts."""
    return Sums(*map(sum, zip(*parts, strict=True))) if parts else Sums()


def merge_hosts(own: Sums) -> Sums:
    """Sums over all hosts, on each of them; every host must call it.

    JAX carries 32 bits, so that the 64 of a sum travel as two words.
    """
    words = np.asarray(own, np.int64).view(np.uint32)
    everywhere = np.ascontiguousarray(multihost_utils.process_allgather(words))
    return merge(*(Sums(*map(int, row)) for row in everywhere.view(np.int64)))


def scores(sums: Sums) -> Scores:
    """The scores of all that was summed."""
    return Scores(
        giou=_ratio(sums.iou, sums.masks * IOU_UNIT),
        ciou=_ratio(sums.intersection, sums.union),
        t_acc=_ratio(sums.targets_found, sums.targets),
        n_acc=_ratio(sums.no_targets_found, sums.no_targets),
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
