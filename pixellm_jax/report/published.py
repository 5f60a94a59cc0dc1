"""Published scores (published.json), to print next to the scores of a comparable run."""

from __future__ import annotations

import json
from importlib import resources
from typing import NamedTuple


class Published(NamedTuple):
    """Published scores of a system.

    Attributes:
        system: name of the model.
        benchmark: as `pixellm evaluate` names it.
        split: of the benchmark.
        group: the part of the split, None for all of it.
        mode: "given" or "generated"; None if it is neither or no source says which.
        judge: the judge of the answers, None if there was none.
        scores: name in `metrics.Scores` -> score, from 0 to 1.
        source: paper and table; possibly a later paper that quotes the number.
        note: a remark, "" if there is none.
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
    """Read all published scores."""
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
    """Return the scores published for a split: in this mode, and in another or an unknown mode."""
    rows = [row for row in read_published() if (row.benchmark, row.split) == (benchmark, split)]
    return [row for row in rows if row.mode == mode], [row for row in rows if row.mode != mode]
