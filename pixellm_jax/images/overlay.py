"""Rendering of predictions: masks drawn over an image, coloured, outlined and labelled."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from pixellm_jax.errors import InputError

FILL = 0.42
"""Opacity of the colour inside a mask."""

_PALETTE = (
    "2c9bff a6e916 e93700 ffb1de 009b43 bc43c8 43e9f4 ff9b00 "
    "a67a0b 90bc7a ff64a6 bc90ff 7a64f4 009ba6 b16485 ded37a "
    "85bcff 0bc843 00f4a6 d3856f de2c7a ff85f4 9b7ac8 00c8bc "
    "ffb190 85a600 de90bc ff6f16 c8b100 de64de 5985c8 90deb1"
)
"""Greedy choice: each colour is the farthest, in the perceptual space OKLab, from those before."""

_DARK = (16, 18, 24)
_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")
"""Tried for labels that Pillow's built-in font, which is ASCII, cannot render."""

_Colour = tuple[int, int, int]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_Text = tuple[str, _Font]


class _Box(NamedTuple):
    """Rectangle of the pixels [top, bottom) x [left, right)."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def hw(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    @property
    def area(self) -> int:
        return max(0, self.bottom - self.top) * max(0, self.right - self.left)

    def intersect(self, other: _Box) -> _Box:
        return _Box(*map(max, self[:2], other[:2]), *map(min, self[2:], other[2:]))

    def grow(self, by: int) -> _Box:
        return _Box(self.top - by, self.left - by, self.bottom + by, self.right + by)


class _Target(NamedTuple):
    """A mask that is not empty, with its position and thickness in pixels."""

    mask: Bool[np.ndarray, "y x"]
    box: _Box
    area: int
    anchor: tuple[float, float]
    radius: float


def draw_overlay(
    image: UInt8[np.ndarray, "y x 3"], masks: Bool[np.ndarray, "m y x"], labels: Sequence[str]
) -> Image.Image:
    """Draw masks over an RGB image: translucent fill, outline, and a chip with the label.

    Mask i has colour `colours(m)[i]`, independent of the other masks. Small masks are drawn over
    large ones. An outline has a dark casing, so it is visible on every background. A chip is placed
    on its mask or close to it, inside the image and, if possible, without covering other chips; a
    chip that had to move away is connected to its mask by a line. Empty masks are listed in the
    lower left corner. Lines and letters scale with the image; an image too small for letters (about
    50 x 90) has no chips. The result is a new image of the same size.

    Raises:
        InputError: masks are not boolean, or masks, labels and image do not match.
    """
    if masks.dtype != bool or masks.ndim != 3 or masks.shape[1:] != image.shape[:2]:
        raise InputError(
            f"found masks {masks.dtype}{list(masks.shape)} for an image {list(image.shape)}, "
            f"expected bool[m {image.shape[0]} {image.shape[1]}]: threshold logits with > 0 and "
            "resize them to the image with geometry.unfit"
        )
    if len(labels) != len(masks):
        raise InputError(
            f"found {len(labels)} labels for {len(masks)} masks: give one label per mask"
        )
    overlay = Image.fromarray(image).copy()
    line = max(1.0, min(overlay.size) / 230)
    palette = [(int(r), int(g), int(b)) for r, g, b in colours(len(masks))]
    targets = _measure(masks)
    coloured = [(t, colour) for t, colour in zip(targets, palette, strict=True) if t]
    for target, colour in sorted(coloured, key=lambda pair: -pair[0].area):
        _paint(overlay, target, colour, line)
    _draw_labels(overlay, targets, palette, labels, line)
    return overlay


def colours(n: int) -> UInt8[np.ndarray, "{n} 3"]:
    """Return RGB colours for n targets: perceptually distinct, visible on dark and on light.

    The colour of an index does not depend on n: `colours(7)[:3] == colours(3)`. Colours repeat
    after 32. Table: greedy choice in OKLab (https://bottosson.github.io/posts/oklab/).
    """
    palette = np.frombuffer(bytes.fromhex("".join(_PALETTE)), np.uint8).reshape(-1, 3)
    return palette[np.arange(n) % len(palette)]


def _measure(masks: Bool[np.ndarray, "m y x"]) -> list[_Target | None]:
    """Measure the masks, from small to large: an anchor avoids what will be drawn over it."""
    targets: list[_Target | None] = [None] * len(masks)
    covered = np.zeros(masks.shape[1:], bool)
    areas = [int(np.count_nonzero(mask)) for mask in masks]
    for i in sorted(np.flatnonzero(areas).tolist(), key=areas.__getitem__):
        rows, columns = np.flatnonzero(masks[i].any(1)), np.flatnonzero(masks[i].any(0))
        box = _Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
        crop, hidden = _cut(masks[i], box), _cut(covered, box)
        (y, x), radius = _thickest(crop)
        visible = crop & ~hidden
        if visible.any():
            (y, x), _ = _thickest(visible)
        hidden |= crop  # a view: writes to `covered`
        targets[i] = _Target(masks[i], box, areas[i], (box.top + y, box.left + x), radius)
    return targets


def _cut(mask: Bool[np.ndarray, "y x"], box: _Box) -> Bool[np.ndarray, "..."]:
    return mask[max(box.top, 0) : max(box.bottom, 0), max(box.left, 0) : max(box.right, 0)]


def _thickest(mask: Bool[np.ndarray, "y x"]) -> tuple[tuple[float, float], float]:
    """Return centre (y, x) and rough radius of the thickest part, by eroding a thumbnail."""
    height, width = mask.shape
    shrink = max(1.0, max(height, width) / 96)
    size = max(1, round(width / shrink)), max(1, round(height / shrink))
    thumbnail = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
    coverage = np.asarray(thumbnail.resize(size, Image.Resampling.BOX)) / 255
    alive = np.pad(coverage >= coverage.max() / 2, 1)
    depth = np.zeros(alive.shape, int)
    while alive.any():
        depth += alive
        eroded = alive.copy()
        for axis in (0, 1):
            # Two steps on each second ring make the rings octagons, not diamonds.
            source = eroded.copy() if depth.max() % 2 else alive
            eroded &= np.roll(source, 1, axis) & np.roll(source, -1, axis)
        alive = eroded
    deepest = np.argwhere(depth[1:-1, 1:-1] == depth.max())
    centre = deepest[np.square(deepest - deepest.mean(0)).sum(1).argmin()]
    scale = np.array(mask.shape) / coverage.shape
    y, x = (centre + 0.5) * scale
    return (float(y), float(x)), float(depth.max() * scale.min() * coverage[tuple(centre)])


def _paint(overlay: Image.Image, target: _Target, colour: _Colour, line: float) -> None:
    """Fill and outline one mask.

    The inverse normal distribution of the blurred mask is the distance to the edge: an outline
    computed from it is smooth, and ramps of one pixel make it crisp.
    """
    line = min(line, max(1.0, target.radius))
    softness = 0.8 * line
    around = target.box.grow(int(4 * line) + 1).intersect(_Box(0, 0, *target.mask.shape))
    crop = Image.fromarray(_cut(target.mask, around).view(np.uint8) * np.uint8(255))
    step = max(1, int(softness / 3))  # a wide blur can be computed on a coarse grid
    soft = crop.reduce(step).filter(ImageFilter.GaussianBlur(softness / step))
    whole = (0, 0, crop.width / step, crop.height / step)
    soft = soft.resize(crop.size, Image.Resampling.BILINEAR, box=whole)
    level = (np.arange(256) / 255).clip(1e-6, 1 - 1e-6)
    distance = np.array([NormalDist(0, softness).inv_cdf(value) for value in level])
    corner = (around.left, around.top)
    overlay.paste(colour, corner, crop.point(list(np.arange(256) * FILL)))
    for shade, half, opacity in ((_DARK, line, 0.6), (colour, line / 2, 1)):
        band = (half + 0.5 - np.abs(distance)).clip(0, 1)
        overlay.paste(shade, corner, soft.point(list(band * 255 * opacity)))


def _draw_labels(
    overlay: Image.Image,
    targets: Sequence[_Target | None],
    palette: Sequence[_Colour],
    labels: Sequence[str],
    line: float,
) -> None:
    """Place and draw one chip per mask, small masks first because they have the least choice."""
    frame = _Box(0, 0, overlay.height, overlay.width)
    size = max(11, round(min(overlay.size) / 28))
    if overlay.height < 4.5 * size or overlay.width < 8 * size:
        return
    pad = round(0.45 * size)
    gap = max(1, round(0.2 * size))
    max_width = min(overlay.width - 2 * (pad + gap), max(overlay.width // 2, 12 * size))
    placed: dict[int, _Box] = {}
    texts: dict[int, _Text] = {}
    labelled = (i for i, label in enumerate(labels) if label.strip())
    order = sorted(labelled, key=lambda i: t.area if (t := targets[i]) else np.inf)
    for i in order:
        target, label = targets[i], labels[i] if targets[i] else f"{labels[i]}: none"
        texts[i] = _typeset(label, size, max_width)
        chip = round(1.5 * size), round(texts[i][1].getlength(texts[i][0])) + 2 * pad
        placed[i] = box = _place(chip, target, targets, list(placed.values()), frame, gap)
        if target and (target.radius < line or not _cut(target.mask, box.grow(size // 2)).any()):
            _draw_leader(overlay, box, target.anchor, palette[i], line)
    for i, box in placed.items():
        _draw_chip(overlay, box, *texts[i], palette[i], hollow=targets[i] is None)


def _typeset(label: str, size: int, max_width: int) -> _Text:
    """Return the label cut to `max_width` pixels, and the font that covers most of its letters."""
    text = unicodedata.normalize("NFC", " ".join(label.split()))
    fonts = [ImageFont.load_default(size)]
    for name in () if text.isascii() else _SYSTEM_FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    missing = [_missing(font, text) for font in fonts]
    best = min(range(len(fonts)), key=lambda i: len(missing[i]))
    font = fonts[best]
    for letter in missing[best]:
        plain = unicodedata.normalize("NFKD", letter)[0]
        text = text.replace(letter, plain if plain.isascii() and plain.isprintable() else "?")
    kept = text
    while text and font.getlength(text) > max_width:
        kept = kept[:-1]
        text = f"{kept.rstrip()}…" if kept else ""
    return text, font


def _missing(font: _Font, text: str) -> set[str]:
    """Return the letters that the font would render as its box for unknown ones."""
    unknown = bytes(font.getmask("\uffff"))
    return {letter for letter in set(text) - {" "} if bytes(font.getmask(letter)) == unknown}


def _place(
    hw: tuple[int, int],
    target: _Target | None,
    targets: Sequence[_Target | None],
    placed: Sequence[_Box],
    frame: _Box,
    gap: int,
) -> _Box:
    """Return the best box for a chip: no overlap with chips, near its mask, hiding little."""
    height, width = min(hw[0], frame.bottom), min(hw[1], frame.right)
    y, x = target.anchor if target else (float(frame.bottom), 0.0)
    up, side = height / 2 + gap, width / 2 + gap
    near = [(y + step * height, x) for step in (0, -1.25, 1.25, -2.5, 2.5)]
    if target:
        top, left, bottom, right = target.box
        near += [(top - up, x), (bottom + up, x), (y, left - side), (y, right + side)]
    for box in placed:
        middle = (box.top + box.bottom) / 2
        near += [(box.top - up, box.left + width / 2), (box.bottom + up, box.left + width / 2)]
        near += [(middle, box.right + side), (middle, box.left - side)]
    rows, columns = np.linspace(0, frame.bottom, 13), np.linspace(0, frame.right, 9)
    anywhere = [(float(row), float(column)) for row in rows for column in columns]

    def inside(middle: float, length: int, end: int) -> int:
        margin = min(gap, (end - length) // 2)
        return min(max(margin, round(middle - length / 2)), end - margin - length)

    def box_at(centre: tuple[float, float]) -> _Box:
        top = inside(centre[0], height, frame.bottom)
        left = inside(centre[1], width, frame.right)
        return _Box(top, left, top + height, left + width)

    def overlap(box: _Box) -> int:
        return sum(box.grow(gap - 1).intersect(other).area for other in placed)

    def cost(box: _Box) -> float:
        distance = np.hypot((box.top + box.bottom) / 2 - y, (box.left + box.right) / 2 - x)
        hidden = sum(
            np.count_nonzero(_cut(t.mask, box)) * (3 / t.area + (t is not target) / box.area)
            for t in targets
            if t and box.intersect(t.box).area
        )
        return 4 * float(distance) / max(frame) + float(hidden)

    for centres in (near, anywhere):
        free = [box for box in map(box_at, centres) if not overlap(box)]
        if free:
            return min(free, key=cost)
    return min(map(box_at, near + anywhere), key=overlap)


def _draw_chip(
    overlay: Image.Image,
    box: _Box,
    text: str,
    font: _Font,
    colour: _Colour,
    *,
    hollow: bool,
) -> None:
    """Draw a rounded plate with black or white text; a hollow one has colour in its edge only."""
    edge = max(1, box.hw[0] // 18)
    fill, around = (_DARK, colour) if hollow else (colour, _DARK)
    for plate, shade, opacity in ((box, around, 0.7), (box.grow(-edge), fill, 0.95)):
        height, width = (max(1, side) for side in plate.hw)

        def shape(
            pen: ImageDraw.ImageDraw, scale: int, height: int = height, width: int = width
        ) -> None:
            corner = width * scale - 1, height * scale - 1
            pen.rounded_rectangle((0, 0, *corner), radius=0.28 * height * scale, fill=255)

        _stamp(overlay, plate, shade, opacity, shape)
    luminance = (np.array(fill) / 255) ** 2.2 @ (0.2126, 0.7152, 0.0722)
    middle = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    ink = "black" if luminance > 0.179 else "white"  # both have the contrast 4.6 at 0.179
    ImageDraw.Draw(overlay).text(middle, text, fill=ink, font=font, anchor="mm")


def _draw_leader(
    overlay: Image.Image, chip: _Box, anchor: tuple[float, float], colour: _Colour, line: float
) -> None:
    """Draw a line with a dark casing from a chip to a dot on its mask."""
    ends = np.array([[(chip.left + chip.right) / 2, (chip.top + chip.bottom) / 2], anchor[::-1]])
    (left, top), (right, bottom) = np.stack([ends.min(0), ends.max(0)]).astype(int).tolist()
    around = _Box(top, left, bottom, right).grow(int(4 * line) + 2)
    for width, shade in ((2.6 * line, _DARK), (1.3 * line, colour)):

        def shape(pen: ImageDraw.ImageDraw, scale: int, width: float = width) -> None:
            start, end = (tuple(e) for e in (ends - [around.left, around.top]) * scale)
            pen.line((*start, *end), fill=255, width=max(1, round(width * scale)))
            pen.circle(end, (width + line) * scale, fill=255)

        _stamp(overlay, around, shade, 0.9, shape)


def _stamp(
    overlay: Image.Image,
    box: _Box,
    colour: _Colour,
    opacity: float,
    shape: Callable[[ImageDraw.ImageDraw, int], None],
) -> None:
    """Paste a colour through a shape, rendered at a higher resolution for smooth edges."""
    scale = 4 if box.area < 1_000_000 else 1
    height, width = (max(1, side) * scale for side in box.hw)
    stencil = Image.new("L", (width, height))
    shape(ImageDraw.Draw(stencil), scale)
    stencil = stencil.reduce(scale).point(list(np.arange(256) * opacity))
    overlay.paste(colour, (box.left, box.top), stencil)
