"""Console output that several commands share: help texts, plain-text tables, a progress bar."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm


class HelpFormatter(argparse.HelpFormatter):
    """Wraps texts without line breaks (descriptions) and leaves others as they are (examples)."""

    # The method that argparse itself overrides for `RawDescriptionHelpFormatter`.
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return text
        return super()._fill_text(text, width, indent)


def format_table(rows: Sequence[Sequence[object]], *, names: int) -> str:
    """Return rows aligned in columns; the first `names` columns are left-aligned.

    Args:
        rows: cells row by row, the header first.
        names: number of left-aligned columns; the others are right-aligned.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


@contextmanager
def byte_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar over bytes on standard error, if that is a terminal.

    Yields a function that takes the number of new bytes and the total.
    """
    # The delay keeps the bar from appearing when the input is rejected immediately.
    with tqdm(
        desc=description, disable=None, delay=0.5, unit="B", unit_scale=True, unit_divisor=1024
    ) as bar:

        def advance(new: int, total: int) -> None:
            bar.total = total
            bar.update(new)

        yield advance
