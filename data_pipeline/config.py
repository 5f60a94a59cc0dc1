"""Configuration of the data: mixture, budgets and the sampling of conversations."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.transforms import ComposeSettings
from pixellm_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """Datasets that share a weight; inside, each is as likely as the others, whatever its size.

    `datasets`: "dataset/split", as `pixellm prepare` stores them.
    """

    weight: float
    datasets: tuple[str, ...]


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
"""The mixture of the paper (docs/reference_notes.md 2.1): 2 : 9 : 2 : 4."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A stream of batches.

    `batch`: images per step, over all hosts. `length`, `targets`: budgets per image, in positions
    and masks; conversations that do not fit are left out whole, and counted. `masks`: side of the
    target masks in pixels; 0 is the canvas. At a half or a quarter of it targets are sampled half a
    pixel off (`mask_to_canvas`), at a third or all of it they are not. `workers`: processes that
    prepare samples (0: threads). `compose`: how conversations are drawn from an example.

    Raises:
        InputError: a budget or weight that makes no sense.
    """

    families: tuple[FamilyConfig, ...] = PAPER_MIXTURE
    batch: int = 16
    length: int = 1024
    targets: int = 32
    masks: int = 0
    seed: int = 0
    workers: int = 0
    compose: ComposeSettings = field(default_factory=ComposeSettings)

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
