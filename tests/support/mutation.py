"""Damage for fuzz tests: JSON-like data and bytes with a few random faults."""

from __future__ import annotations

import copy
import random
from typing import Any

JUNK = (
    None,
    True,
    -1,
    0,
    3,
    2**31,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    -1e300,
    "",
    " ",
    "../../x",
    "{seg}",
    "{",
    "\ud800",
    "a" * 300,
    [],
    {},
    [[]],
    [1, 2, 3],
    [[1, 2]],
    [None],
    {"size": [1, 1], "counts": "~"},
    {"counts": [1]},
)


def mutate(data: Any, rng: random.Random, faults: int = 3) -> Any:
    """A copy in which a few random parts are replaced, removed, doubled or exchanged."""
    data = copy.deepcopy(data)
    for _ in range(rng.randint(1, faults)):
        places = [(box, key) for box in _boxes(data) for key in _keys(box)]
        if not places:
            break
        box, key = rng.choice(places)
        match rng.randrange(4):
            case 0:
                box[key] = copy.deepcopy(rng.choice(JUNK))
            case 1:
                del box[key]
            case 2 if isinstance(box, list):
                box.insert(key, copy.deepcopy(box[key]))
            case _:
                other, at = rng.choice(places)
                box[key] = copy.deepcopy(other[at]) if at in _keys(other) else None
    return data


def mutate_bytes(data: bytes, rng: random.Random, faults: int = 4) -> bytes:
    """A copy with a few random bytes changed, removed or put in, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.randint(1, faults)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0:
                out[at : at + 1] = rng.randbytes(1)
            case 1:
                del out[at : at + rng.randint(1, 8)]
            case 2:
                out[at:at] = rng.randbytes(rng.randint(1, 4))
            case 3:
                out[at:at] = out[:at][-rng.randint(1, 16) :]
            case 4 if rng.random() < 0.3:
                del out[at:]
    return bytes(out)


def _boxes(data: Any) -> list[Any]:
    found = [data] if isinstance(data, list | dict) else []
    for box in found:
        values = box.values() if isinstance(box, dict) else box
        found += [value for value in values if isinstance(value, list | dict)]
    return found


def _keys(box: Any) -> list[Any]:
    return list(box) if isinstance(box, dict) else list(range(len(box)))
