"""The page of `pixellm demo`: scenes, questions, answers, and masks next to the true ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from pixellm_jax.experiments.shapes_quiz import Reply, Scene, split_at_markers
from pixellm_jax.images.overlay import draw_overlay
from pixellm_jax.report.figures import fade
from pixellm_jax.report.html import (
    Tile,
    embed_image,
    grade_iou,
    render_chip,
    render_page,
    render_plots,
    render_tile,
)
from pixellm_jax.text.answer import MARKER

SCALE = 3
"""Magnification of images on the page."""

_FADE = 0.45
"""Share of white that is mixed into the image under masks."""

_QUALITY = 88
"""WebP quality of the images."""


def render_demo(
    title: str,
    lead: str,
    tiles: Sequence[Tile],
    scenes: Iterable[tuple[Scene, Sequence[Reply]]],
    *,
    plots: Sequence[str] = (),
    footer: str = "",
) -> str:
    """Render the whole page, which has no scripts and loads nothing.

    Args:
        title: first heading.
        lead: introduction below the title.
        tiles: headline numbers.
        scenes: scenes with the replies to their questions.
        plots: SVG elements.
        footer: closing remark.
    """
    parts = [
        f'<p class="lead">{escape(lead)}</p>',
        f'<div class="tiles">{"".join(map(render_tile, tiles))}</div>',
        *([render_plots(plots)] if plots else []),
        "\n".join(_render_scene(scene, replies) for scene, replies in scenes),
        f"<footer>{escape(footer)}</footer>",
    ]
    return render_page(title, "\n".join(parts))


def _render_scene(scene: Scene, replies: Sequence[Reply]) -> str:
    sections = "\n".join(_render_reply(scene, reply) for reply in replies)
    return f"""<article>
<div class="scene"><h2>Scene {scene.number}</h2>
<img alt="the scene" src="{embed_image(_enlarge(scene.image), quality=_QUALITY)}"></div>
<div>
{sections}
</div>
</article>"""


def _render_reply(scene: Scene, reply: Reply) -> str:
    texts = split_at_markers(reply.text, reply.answer.markers.tolist())
    answer = escape(texts[0]) + "".join(
        render_chip(number) + escape(text) for number, text in enumerate(texts[1:])
    )
    expected = ""
    if not reply.same_words:
        right = reply.expected.replace(f" {MARKER}", "")
        expected = f'<p class="wanted">Right would be: {escape(right)}</p>'
    return f"""<section>
<div><p class="ask">{escape(reply.question.question)}</p>
<p class="reply">{answer or "(no words)"}</p>{expected}
<ul class="marks">{_render_marks(reply)}</ul></div>
{_render_masks(scene, reply)}
</section>"""


def _render_marks(reply: Reply) -> str:
    """Render the IoU of every target."""
    if not len(reply.truth):
        return '<li class="good">right: there is none</li>'
    items = []
    for number, target in enumerate(reply.target_scores):
        chip = render_chip(number)
        items.append(f'<li>{chip} <span class="{grade_iou(target.iou)}">{target.note}</span></li>')
    return "".join(items)


def _render_masks(scene: Scene, reply: Reply) -> str:
    """Render the predicted masks next to the true ones."""
    if not len(reply.truth):
        return "<div></div>"
    grey = fade(Image.fromarray(_enlarge(scene.image)).convert("L"), _FADE)
    figures = []
    for caption, masks in (("answer", reply.predicted), ("truth", reply.truth)):
        link = embed_image(_overlay(grey, masks), quality=_QUALITY)
        figures.append(
            f'<figure><img alt="{caption}" src="{link}"><figcaption>{caption}</figcaption></figure>'
        )
    return f'<div class="pair">{"".join(figures)}</div>'


def _enlarge(image: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "Y X 3"]:
    height, width = (SCALE * side for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _overlay(
    image: UInt8[np.ndarray, "Y X 3"], masks: Bool[np.ndarray, "m y x"]
) -> UInt8[np.ndarray, "Y X 3"]:
    """Draw masks on an enlarged image."""
    large = masks.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    return np.asarray(draw_overlay(image, large, [""] * len(masks)))
