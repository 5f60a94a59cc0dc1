"""Mask IoU in exact integers: gIoU, cIoU, and the accuracy of target presence.

Areas are counted per mask, on the device or the host. Sums are integers, so the scores are
independent to the bit of the order of the masks and of their split over batches and hosts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Int, UInt8

from pixellm_jax.images.geometry import VOID

Array = Any
"""A NumPy array on the host, a JAX array on the device."""

IOU_UNIT = 2**40
"""Fixed-point value of an IoU of 1: each IoU is rounded once, by at most 5e-13."""


class Areas(NamedTuple):
    """Areas in pixels of a predicted mask, its true mask and their intersection, without void."""

    intersection: Int[Array, "..."]
    prediction: Int[Array, "..."]
    truth: Int[Array, "..."]


class Sums(NamedTuple):
    """Sums over masks as Python integers.

    masks: number of masks. iou: in units of 1 / IOU_UNIT. intersection, union: in pixels.
    targets: true masks with at least one pixel. targets_found: how many have a prediction with
        pixels.
    no_targets: empty true masks. no_targets_found: how many have an empty prediction.
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
    """Scores from 0 to 1; NaN where the denominator is zero.

    giou: mean IoU of the masks. ciou: sum of intersections over sum of unions.
    t_acc: share of the non-empty true masks with a non-empty prediction (gRefCOCO).
    n_acc: share of the empty true masks with an empty prediction (gRefCOCO).
    """

    giou: float
    ciou: float
    t_acc: float
    n_acc: float


def measure(inside: Bool[Array, "... y x"], truth: UInt8[Array, "... y x"]) -> Areas:
    """Measure predicted masks against true masks: 0 outside, `VOID` unknown, all else inside."""
    known = truth != VOID
    inside = inside & known
    truth = (truth != 0) & known
    return Areas(*(mask.sum((-2, -1)) for mask in (inside & truth, inside, truth)))


def tally(
    areas: Areas,
    *,
    valid: Bool[Array, "..."] | None = None,
    extra: Bool[Array, "..."] | None = None,
) -> Sums:
    """Sum over masks.

    IoU = intersection / union. Where both masks are empty, the prediction is correct: IoU 1.

    Args:
        areas: areas of the masks.
        valid: masks that count; by default all.
        extra: predictions without a true mask, whose IoU is 0 even if they are empty; by default
            none.
    """
    valid = np.ones(np.shape(areas.truth), bool) if valid is None else np.asarray(valid)
    has_truth = ~np.asarray(extra)[valid] if extra is not None else np.ones(valid.sum(), bool)
    intersection, prediction, truth = (np.asarray(area)[valid].astype(np.int64) for area in areas)
    union = prediction + truth - intersection
    iou = np.where(union > 0, intersection / np.maximum(union, 1), has_truth)
    present = has_truth & (truth > 0)
    absent = has_truth & (truth == 0)
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
    """Add sums of batches, images or hosts."""
    return Sums(*map(sum, zip(*parts, strict=True))) if parts else Sums()


def merge_hosts(local: Sums) -> Sums:
    """Add the sums of all hosts and return the total on each; every host must call it.

    JAX arrays are limited to 32 bits, so each 64-bit sum is gathered as two words.
    """
    words = np.asarray(local, np.int64).view(np.uint32)
    gathered = np.ascontiguousarray(multihost_utils.process_allgather(words))
    return merge(*(Sums(*map(int, row)) for row in gathered.view(np.int64)))


def scores(sums: Sums) -> Scores:
    """Compute the scores of sums."""
    return Scores(
        giou=_ratio(sums.iou, sums.masks * IOU_UNIT),
        ciou=_ratio(sums.intersection, sums.union),
        t_acc=_ratio(sums.targets_found, sums.targets),
        n_acc=_ratio(sums.no_targets_found, sums.no_targets),
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
