"""Reads pickles that hold plain data, and nothing else of them.

The reference unpickles the refer indices, which lets a file run any program
(docs/reference_notes.md D27). This reader
follows the instructions of a pickle itself (they are listed in Python's `pickletools`, protocols 0
to 5). It knows those that make lists, tuples, dictionaries, sets, numbers and text; it has none
that could import, call or build anything. The few names of builtin containers that protocols 0 to 3
need for sets and bytes are compared as text, never looked up.

Limits: `SIZE_LIMIT` bytes and `STEP_LIMIT` instructions; integers of 64 bytes; containers that
stand in several places, counted in each, `STEP_LIMIT` values. What an instruction makes is as long
as its operand, or an empty container, so memory stays below the file and 250 bytes per instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.formats.pickle_machine import CONTAINERS, STEP_LIMIT, Machine
from pixellm_jax.errors import InputError

SIZE_LIMIT = 512 * 2**20
"""Largest file, in bytes. The published indices have less than 150 MB."""


def load(path: Path) -> Any:
    """The data in a pickle: lists, tuples, dictionaries, sets, numbers, text, bytes, bools, None.

    Byte strings of Python 2 become text: UTF-8 if they are, else Latin-1.

    Raises:
        InputError: no such file, beyond the limits, not a pickle, cut off, data that contains
            itself, or a global (a class or function by name), whose name the message gives.
    """
    name = repr(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): check the path") from None
    if len(data) > SIZE_LIMIT:
        raise InputError(f"{name} has more than {SIZE_LIMIT} bytes: convert it to JSON")
    try:
        return loads(data)
    except InputError as error:
        raise InputError(f"{name} {error}") from None


def loads(data: bytes) -> Any:
    """As `load`, of bytes; messages begin with what is wrong, for a name to be put before."""
    machine = Machine(data)
    try:
        value = machine.run()
    except _FAILURES as error:
        where = f"at byte {machine.at} ({type(error).__name__})"
        raise InputError(f"is not a whole pickle {where}: download it again") from None
    if machine.shared and _spread(value) > STEP_LIMIT:
        raise InputError(f"repeats its parts more than {STEP_LIMIT} times: do not use it")
    return value


_FAILURES = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
)
"""What damaged instructions lead to: no operand on the stack, an operand of a wrong type, ..."""


def _spread(value: Any) -> int:
    """Number of values with what stands in several places counted in each.

    Raises:
        InputError: the data contains itself.
    """
    sizes: dict[int, int] = {}
    open_ids: set[int] = set()
    pending = [value]
    while pending:
        container = pending[-1]
        parts = [part for part in _parts(container) if isinstance(part, CONTAINERS)]
        if id(container) not in open_ids:
            open_ids.add(id(container))
            missing = [part for part in parts if id(part) not in sizes]
            if any(id(part) in open_ids for part in missing):
                raise InputError("contains itself: do not use it")
            pending += missing
            continue
        pending.pop()
        if id(container) not in sizes:
            own = 1 + sum(1 for _ in _parts(container))
            total = own + sum(sizes[id(part)] for part in parts)
            sizes[id(container)] = min(total, STEP_LIMIT + 1)
    return sizes[id(value)]


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, CONTAINERS) else ()
