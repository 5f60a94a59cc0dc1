"""What one can hold a drawing to: it stays put, names everything and shows every mask."""

from __future__ import annotations

import inspect
import time

import numpy as np
import pytest
from PIL import Image

from pixellm_jax.errors import InputError
from pixellm_jax.images import overlay
from pixellm_jax.images.overlay import FILL, colours, draw_overlay

HEIGHT, WIDTH = 211, 307


def photo(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(0).integers(60, 200, (height, width, 3), np.uint8)


def disc(y: float, x: float, radius: float, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


@pytest.fixture
def chips(monkeypatch) -> list[tuple[str, overlay._Box]]:
    """Labels and places of the chips that are drawn."""
    drawn = []
    draw = overlay._draw_chip

    def record(picture, box, text, *others, **options):
        drawn.append((text, box))
        draw(picture, box, text, *others, **options)

    monkeypatch.setattr(overlay, "_draw_chip", record)
    return drawn


def assert_apart_and_inside(chips, height: int = HEIGHT, width: int = WIDTH) -> None:
    boxes = [box for _, box in chips]
    for i, box in enumerate(boxes):
        assert 0 <= box.top < box.bottom <= height
        assert 0 <= box.left < box.right <= width
        assert not any(box.intersect(other).area for other in boxes[:i])


def oklab(rgb: np.ndarray) -> np.ndarray:
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    cone = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cone) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


@pytest.mark.parametrize(("n", "apart"), [(7, 0.15), (20, 0.1), (32, 0.08)])
def test_colours_are_far_apart(n, apart):
    lab = oklab(colours(n))
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    # 0.02 is a difference that one just notices.
    assert distance[~np.eye(n, dtype=bool)].min() > apart


def test_colours_do_not_depend_on_their_number():
    np.testing.assert_array_equal(colours(7)[:3], colours(3))
    assert colours(0).shape == (0, 3)
    assert colours(101).shape == (101, 3)


def test_result_is_a_new_image_of_the_same_size():
    image = photo()
    before = image.copy()
    drawn = draw_overlay(image, disc(101, 151, 43)[None], ["disc"])
    assert isinstance(drawn, Image.Image)
    assert drawn.mode == "RGB"
    assert drawn.size == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(image, before)


def test_inside_is_tinted_and_outside_untouched(chips):
    image, mask = photo(), disc(101, 151, 61)
    drawn = np.asarray(draw_overlay(image, mask[None], ["disc"]))
    ((_, chip),) = chips
    away = np.ones((HEIGHT, WIDTH), bool)
    away[max(0, chip.top - 2) : chip.bottom + 2, max(0, chip.left - 2) : chip.right + 2] = False
    inside, outside = away & disc(101, 151, 57), away & ~disc(101, 151, 65)
    expected = image[inside] * (1 - FILL) + colours(1)[0] * FILL
    np.testing.assert_allclose(drawn[inside], expected, atol=2)
    np.testing.assert_array_equal(drawn[outside], image[outside])


@pytest.mark.parametrize("background", [0, 127, 255, "own colour"])
def test_outline_shows_on_every_background(background):
    colour = colours(1)[0] if background == "own colour" else np.full(3, background)
    image = np.broadcast_to(colour.astype(np.uint8), (HEIGHT, WIDTH, 3)).copy()
    drawn = np.asarray(draw_overlay(image, disc(151, 101, 43)[None], ["x"])).astype(int)
    row = drawn[151 + 20]  # beside the chip
    edge = 101 - int(np.sqrt(43**2 - 20**2))
    band = row[edge - 3 : edge + 4]
    # The line and its dark casing differ from each other, so one of them from any background.
    assert np.abs(band - row[edge - 20]).sum(1).max() > 60


def test_small_masks_are_drawn_over_large_ones():
    large, small = disc(101, 151, 89), disc(61, 151, 19)
    for masks in ([large, small], [small, large]):
        drawn = np.asarray(draw_overlay(np.zeros_like(photo()), np.stack(masks), ["", ""]))
        index = 0 if masks[0] is small else 1
        edge = drawn[61, 151 - 19].astype(int)
        assert np.abs(edge - colours(2)[index]).sum() < 60


def test_every_mask_has_its_colour_whatever_the_others(chips):
    mask = disc(101, 151, 43)
    nothing = np.zeros_like(mask)
    alone = np.asarray(draw_overlay(photo(), np.stack([nothing, mask]), ["", "x"]))
    others = np.asarray(
        draw_overlay(photo(), np.stack([disc(7, 7, 5), mask, disc(7, 290, 5)]), ["", "x", ""])
    )
    away = slice(120, 150)
    np.testing.assert_array_equal(alone[away, 120:180], others[away, 120:180])


def test_chips_lie_on_or_beside_their_masks(chips):
    centres = [(53, 61), (53, 223), (151, 61), (151, 223)]
    masks = np.stack([disc(*centre, 31) for centre in centres])
    draw_overlay(photo(), masks, [f"m {i}" for i in range(4)])
    assert_apart_and_inside(chips)
    for i, (y, x) in enumerate(centres):
        (box,) = (box for text, box in chips if text == f"m {i}")
        assert abs((box.top + box.bottom) / 2 - y) < 50
        assert abs((box.left + box.right) / 2 - x) < 50


def test_chip_of_a_ring_is_not_on_what_it_surrounds(chips):
    inner = disc(101, 151, 61)
    masks = np.stack([disc(101, 151, 99) & ~disc(101, 151, 61), inner])
    draw_overlay(photo(), masks, ["ring", "hole"])
    (box,) = (box for text, box in chips if text == "ring")
    assert inner[box.top : box.bottom, box.left : box.right].mean() < 0.2


def test_chips_on_one_spot_spread(chips):
    masks = np.stack([disc(101, 151, 3 + i) for i in range(11)])
    draw_overlay(photo(), masks, [f"target {i}" for i in range(11)])
    assert sorted(text for text, _ in chips) == sorted(f"target {i}" for i in range(11))
    assert_apart_and_inside(chips)


def test_masks_at_the_border_keep_their_chips_inside(chips):
    corners = [(0, 0), (0, WIDTH - 1), (HEIGHT - 1, 0), (HEIGHT - 1, WIDTH - 1)]
    draw_overlay(photo(), np.stack([disc(*c, 5) for c in corners]), ["a longer name"] * 4)
    assert_apart_and_inside(chips)


def test_empty_masks_are_named_and_not_drawn(chips):
    image = photo()
    drawn = np.asarray(draw_overlay(image, np.zeros((3, HEIGHT, WIDTH), bool), ["a", "b", "c"]))
    assert sorted(text for text, _ in chips) == ["a: none", "b: none", "c: none"]
    assert_apart_and_inside(chips)
    np.testing.assert_array_equal(drawn[: HEIGHT // 2], image[: HEIGHT // 2])
    np.testing.assert_array_equal(drawn[:, WIDTH // 2 :], image[:, WIDTH // 2 :])


def test_blank_labels_have_no_chips(chips):
    draw_overlay(
        photo(), np.stack([disc(101, 151, 43), np.zeros((HEIGHT, WIDTH), bool)]), ["", " "]
    )
    assert not chips


def test_no_masks_no_change():
    image = photo()
    drawn = draw_overlay(image, np.zeros((0, HEIGHT, WIDTH), bool), [])
    np.testing.assert_array_equal(np.asarray(drawn), image)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("left\n hand\tside ", "left hand side"),
        ("a\x00b", "a?b"),
        ("word " * 50, "…"),
    ],
)
def test_labels_become_one_line(chips, label, expected):
    draw_overlay(photo(), disc(101, 151, 43)[None], [label])
    ((text, box),) = chips
    assert text.endswith(expected) if expected == "…" else text == expected
    assert_apart_and_inside(chips)


@pytest.mark.parametrize("label", ["café", "Кошка", "日本語", "🐶", "اسم", "e\u0301", "\ud800"])
def test_letters_of_the_world_are_written_or_replaced(chips, label):
    draw_overlay(photo(), disc(101, 151, 43)[None], [label])
    ((text, _),) = chips
    assert 0 < len(text) <= len(label)


def test_accents_without_any_system_font(chips, monkeypatch):
    monkeypatch.setattr(overlay, "_SYSTEM_FONTS", ("no-such-font.ttf",))
    draw_overlay(photo(), disc(101, 151, 43)[None], ["café Ж"])
    assert chips[0][0] == "cafe ?"


@pytest.mark.parametrize("shape", [(1, 1), (1, 53), (53, 1), (3, 5), (20, 20), (47, 89), (101, 83)])
def test_small_pictures(chips, shape):
    masks = np.stack([np.ones(shape, bool), disc(0, 0, 1, shape), np.zeros(shape, bool)])
    assert draw_overlay(photo(*shape), masks, ["everything", "corner", "none"]).size == shape[::-1]
    assert_apart_and_inside(chips, *shape)


@pytest.mark.parametrize(
    "mask", [np.eye(HEIGHT, WIDTH, dtype=bool), disc(101, 151, 0), disc(0, 0, 0)]
)
def test_thin_and_tiny_masks_are_seen(mask):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    drawn = np.asarray(draw_overlay(image, mask[None], ["x"])).astype(int)
    near = np.abs(drawn - colours(1)[0]).sum(2) < 90
    assert near.sum() > 20


def test_large_picture_is_fast():
    image = photo(3001, 3989)
    shape = image.shape[:2]
    masks = np.stack([disc(700 + 401 * i, 900 + 503 * i, 600, shape) for i in range(5)])
    # About one second; anything that loops over pixels in Python would take a minute.
    start = time.process_time()
    draw_overlay(image, masks, ["one", "two", "three", "four", "five"])
    assert time.process_time() - start < 5


def test_masks_that_do_not_fit_the_image_are_refused():
    for masks in (
        np.zeros((2, HEIGHT, WIDTH - 1), bool),
        np.zeros((2, WIDTH, HEIGHT), bool),
    ):
        with pytest.raises(InputError, match=r"bool\[2, .*expected bool\[m 211 307\]"):
            inspect.unwrap(draw_overlay)(photo(), masks, ["a", "b"])


def test_labels_that_do_not_fit_the_masks_are_refused():
    with pytest.raises(InputError, match="1 labels for 2 masks"):
        draw_overlay(photo(), np.zeros((2, HEIGHT, WIDTH), bool), ["a"])
