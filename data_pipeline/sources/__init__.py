"""One reader for each family of published datasets; all are `reading.Source`s."""

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


class Known(NamedTuple):
    """A dataset and its splits; unions of them, which some sources read too, are not listed."""

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

SOURCES: Mapping[str, Known] = {
    source.dataset: Known(source, tuple(split for split in source.splits if split != "train_val"))
    for source in _SOURCES
}
"""Every published dataset by its name. (`Coco` and `Jsonl` read people's own data, too.)"""
