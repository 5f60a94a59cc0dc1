"""The page of samples: text is escaped, tokens and masks share colours, void is hatched."""

from __future__ import annotations

import html
import re

import numpy as np

from pixellm_jax.images.geometry import VOID
from pixellm_jax.report.samples_page import (
    ConversationView,
    MaskView,
    SampleView,
    TokenView,
    render_samples,
)
from tests.support.pages import Page, decode_image


def make_sample(**fields: object) -> SampleView:
    mask = np.full((8, 8), VOID, np.uint8)
    mask[:4] = 0
    mask[1:3, 2:6] = 1
    sample = SampleView(
        title="a/<b>&",
        caption="kind",
        image=np.full((16, 16, 3), 77, np.uint8),
        hw=(8, 16),
        masks=(MaskView(("<i>cup</i>", "mug"), mask),),
        conversations=(
            ConversationView(("<image>\nWhere <script>?", "There: [SEG] & [SEG]."), (0, 0)),
        ),
        marker="[SEG]",
    )
    return sample._replace(**fields)


def test_text_is_escaped():
    page = Page(render_samples("<t>", "<l>", [make_sample()]))
    assert "script" not in page.tags and "i" not in page.tags
    assert "a/<b>&" in page.text and "<i>cup</i>; mug" in page.text
    assert "image Where <script>?" in page.text
    assert "There: 1 & 1." in page.text
    assert "25 %" in page.text


def test_codebook_tokens_have_the_colour_of_their_mask():
    tokens = (
        TokenView("It", "about <it>"),
        TokenView("[SEG0]", "id 9", True, 0),
        TokenView(".", "", True),
    )
    text = render_samples("t", "l", [make_sample(tokens=tokens, length="3 of 5 positions")])
    assert "the sequence: 3 of 5 positions; 2 supervised, in green" in Page(text).text
    (style,) = re.findall(r'title="id 9" style="([^"]*)"', text)
    assert style == "background:rgb(44,155,255);color:#000"
    assert html.escape("about <it>") in text


def test_void_is_hatched():
    sample = make_sample(image=np.full((448, 448, 3), 9, np.uint8), hw=(224, 448))
    shown, plain = map(decode_image, Page(render_samples("t", "l", [sample])).links)
    assert plain.max() < 20
    assert shown[240:].mean() > 100
    assert np.abs(shown[:50].astype(int) - 9).max() < 12
    assert (shown[80:140, 140:300] != plain[80:140, 140:300]).any(-1).mean() > 0.9
