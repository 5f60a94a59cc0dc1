"""The page of `pixellm data-view`: samples with their masks, conversations and tokens."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from pixellm_jax.benchmark_question import IMAGE
from pixellm_jax.images.geometry import VOID
from pixellm_jax.images.overlay import draw_overlay
from pixellm_jax.report.html import embed_image, render_chip, render_page, target_style

_QUALITY = 90
"""JPEG quality of the images."""


class MaskView(NamedTuple):
    """A mask (0, 1, `VOID`) on the canvas, and the phrases that refer to it."""

    phrases: tuple[str, ...]
    pixels: UInt8[np.ndarray, "Y X"]


class ConversationView(NamedTuple):
    """A conversation of a sample.

    Attributes:
        messages: questions and answers in turn; `SampleView.marker` in an answer is a target.
        targets: indices into `SampleView.masks`, one for each marker in order.
        kept: whether it fits the budgets of the sequence.
    """

    messages: tuple[str, ...]
    targets: tuple[int, ...]
    kept: bool = True


class TokenView(NamedTuple):
    """A token of the sequence.

    Attributes:
        text: what it stands for.
        tooltip: its id and position.
        supervised: whether the loss counts it.
        target: index of its mask, for a codebook token.
    """

    text: str
    tooltip: str
    supervised: bool = False
    target: int | None = None


class SampleView(NamedTuple):
    """An example as the model receives it.

    Attributes:
        title: dataset, split and key.
        caption: size and kind.
        image: RGB canvas.
        hw: height and width of the image on the canvas, from its upper left corner.
        masks: distinct masks.
        conversations: in the order of the sequence.
        marker: stands for a target in answers.
        tokens: the sequence without its padding; empty if it is not known.
        length: length of the sequence, in words.
    """

    title: str
    caption: str
    image: UInt8[np.ndarray, "y x 3"]
    hw: tuple[int, int]
    masks: tuple[MaskView, ...]
    conversations: tuple[ConversationView, ...]
    marker: str
    tokens: tuple[TokenView, ...] = ()
    length: str = ""


def render_samples(title: str, lead: str, samples: Iterable[SampleView]) -> str:
    """Render the whole page, which has no scripts and loads nothing."""
    articles = "\n".join(map(_render_sample, samples))
    body = f'<p class="lead">{escape(lead)}</p>\n{articles}'
    return render_page(title, body, style="samples")


def _render_sample(sample: SampleView) -> str:
    side = sample.image.shape[0]
    height, width = sample.hw
    conversations = "\n".join(_render_conversation(c, sample.marker) for c in sample.conversations)
    with_masks = embed_image(_draw_masks(sample), "jpeg", quality=_QUALITY)
    canvas = embed_image(sample.image, "jpeg", quality=_QUALITY)
    return f"""<article>
<h2>{escape(sample.title)}<span>{escape(sample.caption)}</span></h2>
<div class="sides">
<div>
<figure><img alt="canvas with masks" src="{with_masks}">
<figcaption>{len(sample.masks) or "no"} masks; hatched: padding and void</figcaption></figure>
<ul>{"".join(map(_render_mask, range(len(sample.masks)), sample.masks))}</ul>
</div>
<div>
{conversations or '<p class="empty">No conversation.</p>'}
<details><summary>the canvas as it is: {side} × {side}, picture {height} × {width}</summary>
<figure style="max-width:{side}px"><img alt="canvas" src="{canvas}"></figure>
</details>
{_render_tokens(sample)}
</div>
</div>
</article>"""


def _render_mask(number: int, mask: MaskView) -> str:
    """Render the number, the phrases and the area of a mask, as a share of its known pixels."""
    share = 100 * float((mask.pixels == 1).sum()) / max(1, int((mask.pixels != VOID).sum()))
    area = f"{share:.2g} %" if share else "empty"
    phrases = escape("; ".join(mask.phrases))
    return f"<li>{render_chip(number)}<span>{phrases}</span><small>{area}</small></li>"


def _render_conversation(conversation: ConversationView, marker: str) -> str:
    targets = iter(conversation.targets)
    turns = []
    for place, message in enumerate(conversation.messages):
        is_answer = place % 2 == 1
        first, *others = map(escape, message.split(marker) if is_answer else [message])
        text = first + "".join(render_chip(next(targets, None)) + part for part in others)
        if not is_answer:
            text = text.replace(escape(f"{IMAGE}\n"), '<span class="tag">image</span> ')
        open_answer = '<span class="empty">the model answers</span>'
        turns.append(
            f'<div class="turn {"reply" if is_answer else "ask"}">{text or open_answer}</div>'
        )
    unmentioned = " ".join(map(render_chip, targets))
    expected = ""
    if unmentioned and conversation.kept:
        expected = f'<div class="note">to be found: {unmentioned}</div>'
    note = "" if conversation.kept else '<div class="note">over budget: left out</div>'
    kind = "talk" if conversation.kept else "talk dropped"
    return f'<div class="{kind}">{note}{"".join(turns)}{expected}</div>'


def _render_tokens(sample: SampleView) -> str:
    if not sample.tokens:
        return ""
    supervised = sum(token.supervised for token in sample.tokens)
    spans = "".join(map(_render_token, sample.tokens))
    return (
        f"<details><summary>the sequence: {sample.length}; {supervised} supervised, in green"
        f'</summary><p class="tokens">{spans}</p></details>'
    )


def _render_token(token: TokenView) -> str:
    style = "" if token.target is None else f' style="{target_style(token.target)}"'
    kind = "learnt" if token.supervised else ""
    return (
        f'<span class="{kind}" title="{escape(token.tooltip)}"{style}>{escape(token.text)}</span>'
    )


def _draw_masks(sample: SampleView) -> UInt8[np.ndarray, "y x 3"]:
    """Draw the masks on the canvas; hatch padding and void, where no loss is taken."""
    side = sample.image.shape[0]
    height, width = sample.hw
    pixels = np.array([_enlarge(mask.pixels, side) for mask in sample.masks], np.uint8)
    pixels = pixels.reshape(-1, side, side)
    labels = [str(number + 1) for number in range(len(pixels))]
    inside = np.ascontiguousarray(pixels[:, :height, :width] == 1)
    image = sample.image.copy()
    image[:height, :width] = draw_overlay(image[:height, :width].copy(), inside, labels)
    ignored = (pixels == VOID).all(axis=0) & bool(len(pixels))
    ignored[height:] = True
    ignored[:, width:] = True
    return _hatch(image, ignored)


def _enlarge(mask: UInt8[np.ndarray, "Y X"], side: int) -> UInt8[np.ndarray, "y x"]:
    places = np.arange(side) * len(mask) // side
    return mask[places][:, places]


def _hatch(
    image: UInt8[np.ndarray, "y x 3"], where: Bool[np.ndarray, "y x"]
) -> UInt8[np.ndarray, "y x 3"]:
    rows, columns = np.indices(where.shape)
    stripes = np.where((rows + columns) // 5 % 2, 205, 165).astype(np.uint8)
    mixed = (0.35 * image + 0.65 * stripes[..., None]).astype(np.uint8)
    return np.where(where[..., None], mixed, image)
