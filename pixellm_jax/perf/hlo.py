"""Reads the text of a compiled XLA program: its arrays, and what its devices send each other.

Shapes are those of one device. What stands in the body of a loop is counted as often as the loop
runs: XLA's own cost analysis counts it once. Where XLA does not say how often ("known_trip_count"),
it is the number that the loop's condition compares with, as JAX writes a scan; else once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

BITS = {"pred": 8, "token": 0, "opaque": 0}
"""Of types whose name does not end in their size (f32, bf16, u8, s4, f8e4m3fn, ...)."""

_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=\{?([^,}\s]+(?:, ?%[^,}\s]+)*)"
)
_TRIPS = re.compile(r'"?known_trip_count"?\s*:\s*\{\s*"?n"?\s*:\s*"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r" = [su]\d+\[\](?:\{[^}]*\})? constant\((\d+)\)")
_ORIGIN = re.compile(r'op_name="([^"]*)"')


class Array(NamedTuple):
    """An array on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * _bits(self.dtype) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Instruction(NamedTuple):
    """One instruction: what it makes, and how often a run of the program makes it.

    `kind`: its opcode; an asynchronous pair is counted at its end and has no "-done" in its kind.
    `origin`: where it comes from in the Python program, as JAX names it.
    """

    kind: str
    arrays: tuple[Array, ...]
    times: int
    origin: str

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)


class Traffic(NamedTuple):
    """Collectives of one kind: instructions in the program, runs and bytes made by one device."""

    instructions: int
    runs: int
    bytes: int


def instructions(text: str) -> Iterator[Instruction]:
    """All instructions of `compiled.as_text()`."""
    computations = _computations(text)
    times = _times(computations)
    for name, lines in computations.items():
        for line in lines:
            found = _parse(line)
            if found is None:
                continue
            kind, result, _ = found
            origin = _ORIGIN.search(line)
            yield Instruction(
                kind=kind.removesuffix("-done"),
                arrays=tuple(_arrays(result)),
                times=times[name],
                origin=origin.group(1) if origin else "",
            )


def collectives(text: str) -> list[Instruction]:
    """Those instructions by which devices send each other arrays."""
    return [each for each in instructions(text) if each.kind in COLLECTIVES]


def traffic(found: list[Instruction]) -> dict[str, Traffic]:
    """Sums collectives by kind."""
    sums = {}
    for kind in sorted({each.kind for each in found}):
        own = [each for each in found if each.kind == kind]
        runs, made = sum(e.times for e in own), sum(e.times * e.bytes for e in own)
        sums[kind] = Traffic(len(own), runs, made)
    return sums


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of every computation; that of the program itself is named ""."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line.split("{")[0].split("->")[0]:
            head = line.split()
            entry = head[0] == "ENTRY"
            name = "" if entry else head[0].lstrip("%")
            lines = found.setdefault(name, [])
        elif line.startswith("}"):
            lines = []
        else:
            lines.append(line)
    return found


def _times(computations: dict[str, list[str]]) -> Counter[str]:
    """How often every computation runs."""
    calls: dict[str, Counter[str]] = {name: Counter() for name in computations}
    for name, lines in computations.items():
        for line in lines:
            found = _parse(line)
            if found is None:
                continue
            trips = _trips(line, computations) if found[0] == "while" else 1
            for group in _CALLED.findall(found[2]):
                for called in group.replace("%", "").split(","):
                    if called.strip() in computations:
                        calls[name][called.strip()] += trips
    times: Counter[str] = Counter({"": 1})
    waiting = Counter(called for counts in calls.values() for called in counts)
    ready = [name for name in computations if not waiting[name]]
    while ready:  # callers before what they call
        name = ready.pop()
        for called, count in calls[name].items():
            times[called] += times[name] * count
            waiting[called] -= 1
            if not waiting[called]:
                ready.append(called)
    return times


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often the body of a loop runs."""
    known = _TRIPS.search(line)
    if known is not None:
        return int(known.group(1))
    named = _CONDITION.search(line)
    condition = "\n".join(computations.get(named.group(1), [])) if named else ""
    limits = _LIMIT.findall(condition)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in condition else 1


def _parse(line: str) -> tuple[str, str, str] | None:
    """(opcode, text of the result's type, text after the opcode) of an instruction."""
    name = _NAME.match(line)
    if name is None:
        return None
    rest = line[name.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    opcode, _, after = rest[end:].strip().partition("(")
    return opcode, rest[:end], after


def _closing(text: str) -> int:
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    return len(text)


def _arrays(result: str) -> Iterator[Array]:
    for dtype, shape in _ARRAY.findall(result):
        sizes = tuple(int(re.sub(r"\D", "", size)) for size in shape.split(",") if size.strip())
        yield Array(dtype, sizes)


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    size = re.search(r"\d+", dtype)
    return int(size.group()) if size else 0
