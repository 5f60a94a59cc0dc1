"""Published scores (published.json), to be printed beside one's own where they mean the same."""

from __future__ import annotations

import json
from importlib import resources
from typing import NamedTuple


class Published(NamedTuple):
    """Scores of a system, from 0 to 1, by the names of `metrics.Scores`.

    group: the part of the split, None for all of it. mode: None where it is neither "given" nor
    "generated", or no source says which. judge: what judged the answers, if anything did. source:
    paper and table; it may be a later paper that quotes the number. note: what else to know.
    """

    system: str
    benchmark: str
    split: str
    group: str | None
    mode: str | None
    judge: str | None
    scores: dict[str, float]
    source: str
    note: str


def read_published() -> list[Published]:
    """All of them."""
    text = resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8")
    table = json.loads(text)
    sources = {
        name: f"{about['paper']}, {about['table']}"
        + (f" ({about['note']})" if about["note"] else "")
        for name, about in table["sources"].items()
    }
    return [
        Published(
            **row
            | {
                "scores": {name: round(value / 100, 6) for name, value in row["scores"].items()},
                "source": sources[row["source"]],
            }
        )
        for row in table["results"]
    ]


def find_published(
    benchmark: str, split: str, mode: str
) -> tuple[list[Published], list[Published]]:
    """Those for a split of a benchmark: in the same mode, and in another or an unknown one."""
    rows = [row for row in read_published() if (row.benchmark, row.split) == (benchmark, split)]
    return [row for row in rows if row.mode == mode], [row for row in rows if row.mode != mode]
