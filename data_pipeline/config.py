"""Configuration of the data: mixture, budgets and the sampling of conversations."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.transforms import ComposeSettings
from pixellm_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """A group of datasets that share a weight of the mixture.

    Each dataset of a family is sampled equally often, whatever its size.
    """

    weight: float
    """Relative frequency of the family in the mixture, above 0."""
    datasets: tuple[str, ...]
    """Names "dataset/split", as stored by `pixellm prepare`."""


PAPER_MIXTURE = (
    FamilyConfig(
        weight=2.0,
        datasets=(
            "ade20k/train",
            "cocostuff/train",
            "pascal_part/train",
            "paco_lvis/train",
            "mapillary/train",
        ),
    ),
    FamilyConfig(
        weight=9.0, datasets=("refclef/train", "refcoco/train", "refcoco+/train", "refcocog/train")
    ),
    FamilyConfig(weight=2.0, datasets=("llava_instruct/train",)),
    FamilyConfig(weight=4.0, datasets=("muse/train",)),
)
"""Mixture of the paper (docs/reference_notes.md 2.1): 2 : 9 : 2 : 4."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Mixture, budgets and workers of a stream of batches.

    A conversation that exceeds a budget of its image is dropped whole, and counted.

    Raises:
        InputError: a budget, size or weight is out of range.
    """

    families: tuple[FamilyConfig, ...] = PAPER_MIXTURE
    """Weighted families of datasets."""
    batch: int = 16
    """Images per step, over all hosts."""
    length: int = 1024
    """Budget of positions per image."""
    targets: int = 32
    """Budget of targets (masks) per image."""
    masks: int = 0
    """Side of the target masks in pixels; 0 is the canvas. At 1/2 or 1/4 of the canvas, targets are
    sampled half a pixel off (`mask_to_canvas`); at 1/3 of it or all of it they are not."""
    seed: int = 0
    """Seed of the order of examples and of the sampling of conversations."""
    workers: int = 0
    """Processes that prepare samples; 0 uses threads of this process."""
    compose: ComposeSettings = field(default_factory=ComposeSettings)
    """Sampling of conversations from an example."""

    def __post_init__(self) -> None:
        for name in ("batch", "length", "targets"):
            if getattr(self, name) < 1:
                raise InputError(f"data config: {name}={getattr(self, name)} must be at least 1")
        if self.masks < 0 or self.workers < 0 or self.seed < 0:
            raise InputError("data config: masks, workers and seed must not be negative")
        if not self.families:
            raise InputError("data config: families is empty; name at least one dataset")
        for family in self.families:
            if family.weight <= 0 or not family.datasets:
                raise InputError(f"data config: {family} needs a positive weight and a dataset")
