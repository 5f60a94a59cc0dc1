"""Scenes of coloured shapes: what is in them, where, and their pixels.

Drawn without smoothing: a pixel belongs to the topmost shape that covers its centre, so image and
masks agree exactly. Lengths are in pixels of an image of `UNIT` pixels and grow with its side.
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
"""Red, green and blue of each name; every shape differs from it by at most `JITTER`."""

SIZES = {"small": 9.0, "large": 16.0}
"""Radii. A large shape that is hidden by `HIDDEN` still shows more than any small one."""

GRID = 6.0
"""Centres lie on multiples of it. A small vision transformer that nobody trained before does not
know that a shape is the same wherever it lies: off the grid, or turned, or of any radius, it still
guesses shapes after what is here enough to tell them."""

UNIT = 96
"""Side of the image that lengths are given for."""

JITTER, NOISE = 12, 8
"""Maximum deviation of a colour from its name's, and of the grain's grey values, on 0..255."""

HIDDEN = 0.3
"""Largest part of a thing that others may hide."""

GAP = 1.5
"""Things of one colour stay about so far apart."""

TRIES = 24
"""Places that are tried for a thing before the scene does without it."""

MARGIN = 16.0
"""By how much centres must differ along an axis to be compared, in pixels of `UNIT`."""

NEAR = 4.0
"""By how much centres must lie inside a ninth of the image that is asked about."""

RATIO = 1.25
"""By how much radii and areas must differ to be compared."""

_Window = tuple[slice, slice]


REACH = {
    "circle": 1.0,
    "square": 0.86 * math.sqrt(2),
    "triangle": 1.38,
    "cross": math.hypot(1.12, 0.36),
}
"""The shapes, and their farthest point from the centre, in radii; areas are 2.4 to 3.2 radii^2."""

SHAPES = tuple(REACH)


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """Fewest and most things of a scene, and whether they may hide a part of each other."""

    fewest: int = 2
    most: int = 6
    overlap: bool = True


class Thing(NamedTuple):
    """A shape of a scene; no other of the scene has its colour and shape.

    x, y: centre in pixels from the top left corner of the image. area: pixels that it covers,
    hidden ones too. visible: pixels that show. box: x and y of the first visible pixels, then of
    the last ones + 1.
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
    """Things from bottom to top; `owner` is 0 for the background, i + 1 where thing i shows."""

    things: tuple[Thing, ...]
    owner: UInt8[np.ndarray, "y x"]

    def masks(self) -> Bool[np.ndarray, "m y x"]:
        """The visible pixels of every thing."""
        return self.owner == np.arange(1, len(self.things) + 1)[:, None, None]


class _Place(NamedTuple):
    """A form in a place: what is drawn before it is known what shows of it."""

    colour: str
    shape: str
    size: str
    radius: float
    x: float
    y: float

    def covers(self, side: int, *, grow: float = 0.0) -> tuple[_Window, Bool[np.ndarray, "..."]]:
        """Its pixels inside a window of the image; grown by `grow` pixels of radius."""
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

    The things share a few colours and shapes. Every thing shows at least 1 - `HIDDEN` of its
    pixels, and things of one colour never touch. Where there is no room, a scene has fewer things.
    """
    wanted = settings.fewest + sampler.index(settings.most - settings.fewest + 1)
    colours = sampler.subset(len(COLOURS), 3 + sampler.index(4))
    shapes = sampler.subset(len(SHAPES), 2 + sampler.index(3))
    owner = np.zeros((side, side), np.uint8)
    places: list[_Place] = []
    areas: list[int] = []
    for pair in sampler.permutation(len(colours) * len(shapes)):
        colour = list(COLOURS)[colours[pair // len(shapes)]]
        shape = SHAPES[shapes[pair % len(shapes)]]
        size = "large" if sampler.coin() else "small"
        for trial in range(TRIES):
            place = _sample_place(
                sampler, colour, shape, size if trial < TRIES // 2 else "small", side
            )
            window, pixels = place.covers(side)
            if _fits(place, window, pixels, places, areas, owner, settings.overlap):
                places.append(place)
                areas.append(int(pixels.sum()))
                owner[window][pixels] = len(places)
                break
        if len(places) == wanted:
            break
    return Scene(tuple(_thing(i, places[i], areas[i], owner) for i in range(len(places))), owner)


def render(scene: Scene, sampler: Sampler, grain: np.random.Philox) -> UInt8[np.ndarray, "y x 3"]:
    """Red, green and blue of the scene, on grey with a slight tint, all of it slightly grainy."""
    shade = 150 + sampler.index(66)
    colours = [(shade, shade, shade), *(COLOURS[thing.colour] for thing in scene.things)]
    palette = [[c - JITTER + sampler.index(2 * JITTER + 1) for c in colour] for colour in colours]
    pixels = np.asarray(palette, np.uint8)[scene.owner]
    words = grain.random_raw(-(-scene.owner.size // 8)).astype("<u8")
    noise = words.view(np.uint8)[: scene.owner.size].reshape(scene.owner.shape) % NOISE
    return pixels + noise[..., None] - np.uint8(NOISE // 2)


def _sample_place(sampler: Sampler, colour: str, shape: str, size: str, side: int) -> _Place:
    scale = side / UNIT
    radius, step = SIZES[size] * scale, GRID * scale
    edge = REACH[shape] * radius + 1
    first = math.ceil(edge / step)
    count = math.floor((side - edge) / step) - first + 1
    x, y = ((first + sampler.index(count)) * step for _ in range(2))
    return _Place(colour, shape, size, radius, x, y)


def _fits(
    place: _Place,
    window: _Window,
    pixels: Bool[np.ndarray, "..."],
    places: list[_Place],
    areas: list[int],
    owner: UInt8[np.ndarray, "y x"],
    overlap: bool,
) -> bool:
    """Whether the place on top of all others hides too much, or touches what it must not."""
    hidden = np.bincount(owner[window][pixels], minlength=len(places) + 1)[1:]
    if not overlap and hidden.any():
        return False
    shown = np.bincount(owner.ravel(), minlength=len(places) + 1)[1:]
    if any(shown[i] - hidden[i] < (1 - HIDDEN) * areas[i] for i in np.flatnonzero(hidden)):
        return False
    same = [i + 1 for i, other in enumerate(places) if other.colour == place.colour]
    if not same:
        return True
    window, pixels = place.covers(len(owner), grow=GAP * len(owner) / UNIT)
    return not np.isin(owner[window][pixels], same).any()


def _thing(number: int, place: _Place, area: int, owner: UInt8[np.ndarray, "y x"]) -> Thing:
    shown = owner == number + 1
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Thing(*place, area, int(shown.sum()), box)


def _inside(
    shape: str, x: Float[np.ndarray, "y x"], y: Float[np.ndarray, "y x"]
) -> Bool[np.ndarray, "y x"]:
    """Return which points are inside; x to the right and y down from the centre, in radii."""
    match shape:
        case "circle":
            return x * x + y * y <= 1
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.86
        case "triangle":
            return _inside_lines(x, y, (90, 210, 330), 0.69)
        case "cross":
            short, long = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
            return (short <= 0.36) & (long <= 1.12)
    raise ValueError(f"{shape!r} is not one of the shapes {', '.join(SHAPES)}")


def _inside_lines(
    x: Float[np.ndarray, "y x"],
    y: Float[np.ndarray, "y x"],
    directions: tuple[int, ...],
    distance: float,
) -> Bool[np.ndarray, "y x"]:
    """Return which points are on the inner side of all lines; normals in degrees from x to y."""
    inside = np.ones(x.shape, bool)
    for degrees in directions:
        angle = math.radians(degrees)
        inside &= math.cos(angle) * x + math.sin(angle) * y <= distance
    return inside


def depth(centre: float, third: int, side: int) -> float:
    """Return how far a centre is inside a third of the image, along an axis; negative outside."""
    low = centre - third * side / 3 if third > 0 else math.inf
    high = (third + 1) * side / 3 - centre if third < 2 else math.inf
    return min(low, high)


def cell(scene: Scene, thing: Thing) -> tuple[int, int]:
    """Row and column of the ninth of the image that the centre of a thing lies in."""
    side = len(scene.owner)
    return int(3 * thing.y / side), int(3 * thing.x / side)


def along(direction: str, thing: Thing) -> float:
    """Return how far a thing is in a direction of `SUPERLATIVES`: larger is farther."""
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
