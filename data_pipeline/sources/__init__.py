"""Readers of the published datasets, one per family; each implements `reading.Source`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from data_pipeline.reading import Source
from data_pipeline.sources.coco import Coco
from data_pipeline.sources.instruct import LlavaInstruct
from data_pipeline.sources.muse import Muse
from data_pipeline.sources.parts import PacoLvis, PascalPart
from data_pipeline.sources.reason import ReasonSeg
from data_pipeline.sources.refer import GREFCOCO, REFCLEF, REFCOCO, REFCOCO_PLUS, REFCOCOG
from data_pipeline.sources.semantic import Ade20k, CocoStuff, Mapillary


class SourceSplits(NamedTuple):
    """A reader and its disjoint splits (without unions such as "train_val")."""

    source: Source
    splits: tuple[str, ...]


_SOURCES: tuple[Source, ...] = (
    Muse(),
    REFCOCO,
    REFCOCO_PLUS,
    REFCOCOG,
    REFCLEF,
    GREFCOCO,
    ReasonSeg(),
    Ade20k(),
    CocoStuff(),
    Mapillary(),
    PacoLvis(),
    PascalPart(),
    LlavaInstruct(),
    Coco(splits=("train2017", "val2017")),
)

SOURCES: Mapping[str, SourceSplits] = {
    source.dataset: SourceSplits(
        source, tuple(split for split in source.splits if split != "train_val")
    )
    for source in _SOURCES
}
"""Published datasets by name. (`Coco` and `Jsonl` also read user-supplied data.)"""
