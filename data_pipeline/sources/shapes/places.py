"""Where the shapes of a scene are, and which of them is beyond doubt farther or larger."""

from __future__ import annotations

import math

from data_pipeline.sources.shapes.scene import Scene, Thing

MARGIN = 16.0
"""By how much centres must differ along an axis to be compared, in pixels of `UNIT`."""

NEAR = 4.0
"""By how much centres must lie inside a ninth of the picture that is asked about."""

RATIO = 1.25
"""By how much radii and areas must differ to be compared."""


def depth(centre: float, third: int, side: int) -> float:
    """How far a centre is inside a third of the picture, along an axis; below 0 outside."""
    low = centre - third * side / 3 if third > 0 else math.inf
    high = (third + 1) * side / 3 - centre if third < 2 else math.inf
    return min(low, high)


def cell(scene: Scene, thing: Thing) -> tuple[int, int]:
    """Row and column of the ninth of the picture that the centre of a thing lies in."""
    side = len(scene.owner)
    return int(3 * thing.y / side), int(3 * thing.x / side)


def along(direction: str, thing: Thing) -> float:
    """How far a thing is in a direction of `SUPERLATIVES`: what is larger is farther."""
    match direction:
        case "left":
            return -thing.x
        case "right":
            return thing.x
        case "up":
            return -thing.y
        case "down":
            return thing.y
        case "large":
            return thing.radius
    return -thing.radius


def exceeds(direction: str, first: Thing, other: Thing, scale: float) -> bool:
    """Whether nobody would doubt that `first` is farther: by its centre and by what shows."""
    if direction in ("large", "small"):
        big, little = (first, other) if direction == "large" else (other, first)
        return all(
            getattr(big, size) >= RATIO * getattr(little, size)
            for size in ("radius", "area", "visible")
        )
    edge = {"left": 0, "up": 1, "right": 2, "down": 3}[direction]
    sign = 1 if direction in ("right", "down") else -1
    beyond = sign * (first.box[edge] - other.box[edge]) > 0
    return beyond and along(direction, first) - along(direction, other) >= MARGIN * scale
