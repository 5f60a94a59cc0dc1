"""Sampling and rendering of scenes of coloured shapes.

Shapes are rasterised without antialiasing: a pixel belongs to the topmost shape that covers its
centre, so image and masks agree exactly. Lengths are in pixels of an image with a side of `UNIT`
pixels and scale with the side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from data_pipeline.sampling import Sampler

COLOURS = {
    "red": (214, 40, 40),
    "yellow": (236, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 214),
    "purple": (140, 50, 180),
    "black": (28, 28, 28),
}
"""RGB value of each colour name; the colour of a shape deviates by at most `JITTER`."""

SIZES = {"small": 9.0, "large": 16.0}
"""Radii. A large shape of which `MAX_HIDDEN` is hidden still shows more than any small one."""

GRID = 6.0
"""Spacing of the grid of shape centres.

A small vision transformer trained from scratch has no translation invariance: with arbitrary
positions, rotations or radii, it still guesses shapes after a training run that suffices to learn
them on this grid.
"""

UNIT = 96
"""Side of the reference image of all lengths, in pixels."""

JITTER, NOISE = 12, 8
"""Maximum deviation of a shape's colour, and number of grey levels of the grain, on 0..255."""

MAX_HIDDEN = 0.3
"""Maximum fraction of a thing that other things may hide."""

MIN_GAP = 1.5
"""Approximate minimum distance between things of the same colour."""

MAX_ATTEMPTS = 24
"""Number of placements to try for a thing before leaving it out."""

MARGIN = 16.0
"""Minimum distance of centres along an axis for a comparison to be unambiguous."""

CELL_MARGIN = 4.0
"""Minimum distance of centres from the borders of a cell (ninth) that a question is about."""

SIZE_RATIO = 1.25
"""Minimum ratio of radii and areas for a comparison of sizes to be unambiguous."""

_Window = tuple[slice, slice]


REACH = {
    "circle": 1.0,
    "square": 0.86 * math.sqrt(2),
    "triangle": 1.38,
    "cross": math.hypot(1.12, 0.36),
}
"""Distance of a shape's farthest point from its centre, in radii; areas: 2.4 to 3.2 radii^2."""

SHAPES = tuple(REACH)


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """Settings of `sample_scene`."""

    min_things: int = 2
    """Minimum number of things to aim for."""

    max_things: int = 6
    """Maximum number of things."""

    overlap: bool = True
    """Allow things to hide parts of each other."""


class Thing(NamedTuple):
    """A shape of a scene; its pair of colour and shape is unique in the scene.

    Attributes:
        x, y: centre in pixels from the top left corner of the image.
        area: number of covered pixels, including hidden ones.
        visible: number of visible pixels.
        box: bounding box (x0, y0, x1, y1) of the visible pixels; x1 and y1 are exclusive.
    """

    colour: str
    shape: str
    size: str
    radius: float
    x: float
    y: float
    area: int
    visible: int
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


class Scene(NamedTuple):
    """Things from bottom to top; `owner` is 0 for background and i + 1 where thing i is visible."""

    things: tuple[Thing, ...]
    owner: UInt8[np.ndarray, "y x"]

    def masks(self) -> Bool[np.ndarray, "m y x"]:
        """Return the visible pixels of every thing."""
        return self.owner == np.arange(1, len(self.things) + 1)[:, None, None]


class _Placement(NamedTuple):
    """A shape at a position, before its visible pixels are known."""

    colour: str
    shape: str
    size: str
    radius: float
    x: float
    y: float

    def covers(self, side: int, *, grow: float = 0.0) -> tuple[_Window, Bool[np.ndarray, "..."]]:
        """Return a window of the image and the covered pixels in it; `grow` adds to the radius."""
        radius = self.radius + grow
        reach = REACH[self.shape] * radius
        rows, columns = (
            slice(max(0, math.floor(c - reach)), min(side, math.ceil(c + reach) + 1))
            for c in (self.y, self.x)
        )
        y = ((np.arange(rows.start, rows.stop) + 0.5 - self.y) / radius)[:, None]
        x = (np.arange(columns.start, columns.stop) + 0.5 - self.x) / radius
        return (rows, columns), _inside(self.shape, *np.broadcast_arrays(x, y))


def sample_scene(sampler: Sampler, settings: SceneSettings, side: int) -> Scene:
    """Sample a scene of side x side pixels.

    The things share a few colours and shapes. At least 1 - `MAX_HIDDEN` of every thing is visible,
    and things of the same colour never touch. A scene without space for all has fewer things.
    """
    count = settings.min_things + sampler.index(settings.max_things - settings.min_things + 1)
    colours = sampler.subset(len(COLOURS), 3 + sampler.index(4))
    shapes = sampler.subset(len(SHAPES), 2 + sampler.index(3))
    owner = np.zeros((side, side), np.uint8)
    placements: list[_Placement] = []
    areas: list[int] = []
    for pair in sampler.permutation(len(colours) * len(shapes)):
        colour = list(COLOURS)[colours[pair // len(shapes)]]
        shape = SHAPES[shapes[pair % len(shapes)]]
        size = "large" if sampler.coin() else "small"
        for attempt in range(MAX_ATTEMPTS):
            placement = _sample_placement(
                sampler, colour, shape, size if attempt < MAX_ATTEMPTS // 2 else "small", side
            )
            window, pixels = placement.covers(side)
            if _fits(placement, window, pixels, placements, areas, owner, settings.overlap):
                placements.append(placement)
                areas.append(int(pixels.sum()))
                owner[window][pixels] = len(placements)
                break
        if len(placements) == count:
            break
    return Scene(
        tuple(_thing(i, placements[i], areas[i], owner) for i in range(len(placements))), owner
    )


def render(scene: Scene, sampler: Sampler, grain: np.random.Philox) -> UInt8[np.ndarray, "y x 3"]:
    """Render the scene in RGB on a slightly tinted grey background, with grain everywhere."""
    shade = 150 + sampler.index(66)
    colours = [(shade, shade, shade), *(COLOURS[thing.colour] for thing in scene.things)]
    palette = [[c - JITTER + sampler.index(2 * JITTER + 1) for c in colour] for colour in colours]
    pixels = np.asarray(palette, np.uint8)[scene.owner]
    words = grain.random_raw(-(-scene.owner.size // 8)).astype("<u8")
    noise = words.view(np.uint8)[: scene.owner.size].reshape(scene.owner.shape) % NOISE
    return pixels + noise[..., None] - np.uint8(NOISE // 2)


def _sample_placement(
    sampler: Sampler, colour: str, shape: str, size: str, side: int
) -> _Placement:
    scale = side / UNIT
    radius, step = SIZES[size] * scale, GRID * scale
    edge = REACH[shape] * radius + 1
    first = math.ceil(edge / step)
    count = math.floor((side - edge) / step) - first + 1
    x, y = ((first + sampler.index(count)) * step for _ in range(2))
    return _Placement(colour, shape, size, radius, x, y)


def _fits(
    placement: _Placement,
    window: _Window,
    pixels: Bool[np.ndarray, "..."],
    placements: list[_Placement],
    areas: list[int],
    owner: UInt8[np.ndarray, "y x"],
    overlap: bool,
) -> bool:
    """Return whether the placement, on top, hides little enough and touches none of its colour."""
    hidden = np.bincount(owner[window][pixels], minlength=len(placements) + 1)[1:]
    if not overlap and hidden.any():
        return False
    visible = np.bincount(owner.ravel(), minlength=len(placements) + 1)[1:]
    if any(visible[i] - hidden[i] < (1 - MAX_HIDDEN) * areas[i] for i in np.flatnonzero(hidden)):
        return False
    same_colour = [i + 1 for i, other in enumerate(placements) if other.colour == placement.colour]
    if not same_colour:
        return True
    window, pixels = placement.covers(len(owner), grow=MIN_GAP * len(owner) / UNIT)
    return not np.isin(owner[window][pixels], same_colour).any()


def _thing(number: int, placement: _Placement, area: int, owner: UInt8[np.ndarray, "y x"]) -> Thing:
    visible = owner == number + 1
    rows = np.flatnonzero(visible.any(axis=1))
    columns = np.flatnonzero(visible.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Thing(*placement, area, int(visible.sum()), box)


def _inside(
    shape: str, x: Float[np.ndarray, "y x"], y: Float[np.ndarray, "y x"]
) -> Bool[np.ndarray, "y x"]:
    """Return which points are inside a shape; x (right) and y (down) from its centre, in radii."""
    match shape:
        case "circle":
            return x * x + y * y <= 1
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.86
        case "triangle":
            return _inside_half_planes(x, y, (90, 210, 330), 0.69)
        case "cross":
            short, long = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
            return (short <= 0.36) & (long <= 1.12)
    raise ValueError(f"{shape!r} is not one of the shapes {', '.join(SHAPES)}")


def _inside_half_planes(
    x: Float[np.ndarray, "y x"],
    y: Float[np.ndarray, "y x"],
    directions: tuple[int, ...],
    distance: float,
) -> Bool[np.ndarray, "y x"]:
    """Return which points are inside all half-planes; normals in degrees from x to y."""
    inside = np.ones(x.shape, bool)
    for degrees in directions:
        angle = math.radians(degrees)
        inside &= math.cos(angle) * x + math.sin(angle) * y <= distance
    return inside


def depth(centre: float, third: int, side: int) -> float:
    """Return the signed distance of a centre to the borders of a third; negative outside."""
    low = centre - third * side / 3 if third > 0 else math.inf
    high = (third + 1) * side / 3 - centre if third < 2 else math.inf
    return min(low, high)


def cell(scene: Scene, thing: Thing) -> tuple[int, int]:
    """Return row and column of the cell (ninth of the image) that contains a thing's centre."""
    side = len(scene.owner)
    return int(3 * thing.y / side), int(3 * thing.x / side)


def along(direction: str, thing: Thing) -> float:
    """Return the extent of a thing in a direction of `SUPERLATIVES`: larger is farther."""
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
    """Return whether `first` is unambiguously farther, by centre and by visible pixels."""
    if direction in ("large", "small"):
        larger, smaller = (first, other) if direction == "large" else (other, first)
        return all(
            getattr(larger, size) >= SIZE_RATIO * getattr(smaller, size)
            for size in ("radius", "area", "visible")
        )
    edge = {"left": 0, "up": 1, "right": 2, "down": 3}[direction]
    sign = 1 if direction in ("right", "down") else -1
    beyond = sign * (first.box[edge] - other.box[edge]) > 0
    return beyond and along(direction, first) - along(direction, other) >= MARGIN * scale
