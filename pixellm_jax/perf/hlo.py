"""Parser of HLO text: arrays, instructions and collectives of a compiled XLA program.

Shapes are per device. Instructions in a loop body count once per iteration, whereas XLA's own cost
analysis counts them once. Where XLA does not state the trip count ("known_trip_count"), it is the
constant that the loop condition compares with, as JAX writes a scan; otherwise 1.
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
"""Sizes of types whose name lacks one; others end in it (f32, bf16, u8, s4, f8e4m3fn, ...)."""

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
    """One instruction of a program.

    Attributes:
        kind: opcode; an asynchronous pair is counted at its end, without the "-done".
        arrays: results.
        runs: executions per run of the program.
        origin: position in the Python program, as JAX names it.
    """

    kind: str
    arrays: tuple[Array, ...]
    runs: int
    origin: str

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)


class Traffic(NamedTuple):
    """Sums over the collectives of one kind, on one device.

    Attributes:
        instructions: number of instructions in the program.
        runs: executions per run of the program.
        bytes: size of all results.
    """

    instructions: int
    runs: int
    bytes: int


def instructions(text: str) -> Iterator[Instruction]:
    """Yield all instructions of `compiled.as_text()`."""
    computations = _computations(text)
    runs = _runs(computations)
    for name, lines in computations.items():
        for line in lines:
            parsed = _parse(line)
            if parsed is None:
                continue
            kind, result, _ = parsed
            origin = _ORIGIN.search(line)
            yield Instruction(
                kind=kind.removesuffix("-done"),
                arrays=tuple(_arrays(result)),
                runs=runs[name],
                origin=origin.group(1) if origin else "",
            )


def collectives(text: str) -> list[Instruction]:
    """Return the instructions that communicate between devices."""
    return [instruction for instruction in instructions(text) if instruction.kind in COLLECTIVES]


def traffic(found: list[Instruction]) -> dict[str, Traffic]:
    """Sum collectives by kind."""
    sums = {}
    for kind in sorted({instruction.kind for instruction in found}):
        same = [instruction for instruction in found if instruction.kind == kind]
        sums[kind] = Traffic(
            instructions=len(same),
            runs=sum(instruction.runs for instruction in same),
            bytes=sum(instruction.runs * instruction.bytes for instruction in same),
        )
    return sums


def _computations(text: str) -> dict[str, list[str]]:
    """Return the lines of every computation by name; the entry computation is named ""."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line.split("{")[0].split("->")[0]:
            head = line.split()
            entry = head[0] == "ENTRY"
            name = "" if entry else head[0].lstrip("%")
            lines = computations.setdefault(name, [])
        elif line.startswith("}"):
            lines = []
        else:
            lines.append(line)
    return computations


def _runs(computations: dict[str, list[str]]) -> Counter[str]:
    """Return the number of executions of every computation."""
    calls: dict[str, Counter[str]] = {name: Counter() for name in computations}
    for name, lines in computations.items():
        for line in lines:
            parsed = _parse(line)
            if parsed is None:
                continue
            trips = _trip_count(line, computations) if parsed[0] == "while" else 1
            for group in _CALLED.findall(parsed[2]):
                for called in group.replace("%", "").split(","):
                    if called.strip() in computations:
                        calls[name][called.strip()] += trips
    runs: Counter[str] = Counter({"": 1})
    waiting = Counter(called for counts in calls.values() for called in counts)
    ready = [name for name in computations if not waiting[name]]
    while ready:  # topological order: callers before callees
        name = ready.pop()
        for called, count in calls[name].items():
            runs[called] += runs[name] * count
            waiting[called] -= 1
            if not waiting[called]:
                ready.append(called)
    return runs


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
    known = _TRIPS.search(line)
    if known is not None:
        return int(known.group(1))
    named = _CONDITION.search(line)
    condition = "\n".join(computations.get(named.group(1), [])) if named else ""
    limits = _LIMIT.findall(condition)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in condition else 1


def _parse(line: str) -> tuple[str, str, str] | None:
    """Return (opcode, result type as text, text after the opcode), None if no instruction."""
    name = _NAME.match(line)
    if name is None:
        return None
    rest = line[name.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    opcode, _, after = rest[end:].strip().partition("(")
    return opcode, rest[:end], after


def _closing(text: str) -> int:
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return index
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
