"""The page of `pixellm demo`: scenes, questions, answers, masks beside the truth; one file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from pixellm_jax.experiments.shapes_quiz import Reply, Scene, split_at_markers
from pixellm_jax.images.overlay import colours, draw_overlay
from pixellm_jax.text.answer import MARKER

ENLARGED = 3
"""Pixels of a picture on the page for each of its own, along a side."""

GOOD, FAIR = 0.75, 0.5
"""Least IoU of what is shown in green, and in yellow."""

_PALE = 0.45
"""How far the picture under masks is bleached towards white."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b2130; --soft: #667085; --page: #f4f5f8;
  --card: #fff; --edge: #e1e5ec; --ask: #e8eefb; --good: #1a7f4b; --fair: #a86400; --bad: #c03030;
  --line: #2c6fdb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf1; --soft: #98a2b5; --page: #12151b;
  --card: #1b2029; --edge: #303847; --ask: #25324d; --good: #4cc38a; --fair: #e0a33e;
  --bad: #f07070; --line: #6ea8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 2.4rem clamp(1rem, 4vw, 2rem);
  background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
.lead { color: var(--soft); margin: 0 0 1.4rem; max-width: 46rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: .8rem;
  margin-bottom: 1.4rem; }
.tile, article, .plot { background: var(--card); border: 1px solid var(--edge);
  border-radius: 14px; }
.tile { padding: .8rem 1rem; } .tile b { display: block; font-size: 1.7rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); font-size: .82rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: .8rem;
  margin-bottom: 1.4rem; }
.plot { padding: .9rem 1rem .5rem; } .plot svg { width: 100%; height: auto; display: block; }
article { display: grid; grid-template-columns: 228px 1fr; gap: 1.6rem; margin-bottom: 1.2rem;
  padding: 1.2rem 1.3rem; }
@media (max-width: 760px) { article { grid-template-columns: 1fr; } }
h2 { font-size: .95rem; margin: 0 0 .6rem; } h2 span { color: var(--soft); font-weight: normal; }
img { width: 100%; display: block; border-radius: 8px; }
.scene { max-width: 228px; position: sticky; top: 1rem; align-self: start; }
section { display: grid; grid-template-columns: 1fr 300px; gap: 1.2rem; padding: .9rem 0;
  border-top: 1px solid var(--edge); } section:first-child { border-top: 0; padding-top: 0; }
section:last-child { padding-bottom: 0; }
@media (max-width: 560px) { section { grid-template-columns: 1fr; } }
p { margin: 0; overflow-wrap: anywhere; }
.ask { background: var(--ask); border-radius: 12px 12px 12px 3px; padding: .35rem .8rem;
  width: fit-content; margin-bottom: .5rem; }
.reply { padding: 0 .2rem; }
.wanted { color: var(--soft); font-size: .82rem; padding: .3rem .2rem 0; }
.chip { border-radius: 5px; padding: 0 .42em; font-size: .78em; font-weight: 650; }
.marks { display: flex; flex-wrap: wrap; gap: .3rem .9rem; list-style: none; margin: .6rem 0 0;
  padding: 0 .2rem; font-size: .84rem; font-variant-numeric: tabular-nums; color: var(--soft); }
.good { color: var(--good); } .fair { color: var(--fair); } .bad { color: var(--bad); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; align-content: start; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .74rem; text-align: center;
  padding-top: .2rem; }
footer { color: var(--soft); font-size: .8rem; margin-top: 1.6rem; }
footer code { font-size: .95em; }
"""
"""Colours, letters and boxes of a page; light and dark."""


class Tile(NamedTuple):
    """A number in large letters, and what it is."""

    value: str
    about: str


def write_page(
    title: str,
    lead: str,
    tiles: Sequence[Tile],
    scenes: Iterable[tuple[Scene, Sequence[Reply]]],
    *,
    plots: Sequence[str] = (),
    foot: str = "",
) -> str:
    """The whole page; no scripts, nothing outside of it. `plots`: SVG elements."""
    articles = "\n".join(_article(scene, replies) for scene, replies in scenes)
    numbers = "".join(
        f'<div class="tile"><b>{html.escape(tile.value)}</b><span>{html.escape(tile.about)}</span>'
        "</div>"
        for tile in tiles
    )
    drawn = "".join(f'<div class="plot">{plot}</div>' for plot in plots)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n'
        f'<div class="tiles">{numbers}</div>\n'
        + (f'<div class="plots">{drawn}</div>\n' if drawn else "")
        + f"{articles}\n<footer>{html.escape(foot)}</footer>\n</body>\n</html>\n"
    )


def _article(scene: Scene, replies: Sequence[Reply]) -> str:
    sections = "\n".join(_section(scene, reply) for reply in replies)
    return f"""<article>
<div class="scene"><h2>Scene {scene.number}</h2>
<img alt="the scene" src="{_link(_enlarge(scene.image))}"></div>
<div>
{sections}
</div>
</article>"""


def _section(scene: Scene, reply: Reply) -> str:
    texts = split_at_markers(reply.text, reply.answer.markers.tolist())
    answer = html.escape(texts[0]) + "".join(
        draw_chip(number) + html.escape(text) for number, text in enumerate(texts[1:])
    )
    wanted = ""
    if not reply.same_words:
        right = reply.expected.replace(f" {MARKER}", "")
        wanted = f'<p class="wanted">Right would be: {html.escape(right)}</p>'
    return f"""<section>
<div><p class="ask">{html.escape(reply.question.question)}</p>
<p class="reply">{answer or "(no words)"}</p>{wanted}
<ul class="marks">{_marks(reply)}</ul></div>
{_pair(scene, reply)}
</section>"""


def _marks(reply: Reply) -> str:
    """IoU of every target."""
    if not len(reply.truth):
        return '<li class="good">right: there is none</li>'
    items = []
    for number, target in enumerate(reply.target_scores):
        kind = "good" if target.iou >= GOOD else "fair" if target.iou >= FAIR else "bad"
        items.append(f'<li>{draw_chip(number)} <span class="{kind}">{target.note}</span></li>')
    return "".join(items)


def _pair(scene: Scene, reply: Reply) -> str:
    if not len(reply.truth):
        return "<div></div>"
    grey = _bleach(_enlarge(scene.image))
    figures = [
        f'<figure><img alt="{what}" src="{_link(_with_masks(grey, masks))}">'
        f"<figcaption>{what}</figcaption></figure>"
        for what, masks in (("answer", reply.predicted), ("truth", reply.truth))
    ]
    return f'<div class="pair">{"".join(figures)}</div>'


def draw_chip(number: int) -> str:
    """A target's number, from 0, as a plate of its colour."""
    red, green, blue = (int(value) for value in colours(number + 1)[number])
    luminance = (np.array([red, green, blue]) / 255) ** 2.2 @ (0.2126, 0.7152, 0.0722)
    ink = "#000" if luminance > 0.179 else "#fff"
    style = f"background:rgb({red},{green},{blue});color:{ink}"
    return f'<span class="chip" style="{style}">{number + 1}</span>'


def _enlarge(picture: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "Y X 3"]:
    height, width = (ENLARGED * side for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def _bleach(picture: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "y x 3"]:
    """The picture in pale grey, on which every colour shows."""
    grey = np.asarray(Image.fromarray(picture).convert("L"), np.float32)
    pale = (grey + _PALE * (255 - grey)).astype(np.uint8)
    return np.repeat(pale[..., None], 3, axis=2)


def _with_masks(
    picture: UInt8[np.ndarray, "Y X 3"], masks: Bool[np.ndarray, "m y x"]
) -> UInt8[np.ndarray, "Y X 3"]:
    """Masks on an enlarged picture."""
    large = masks.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
    return np.asarray(draw_overlay(picture, large, [""] * len(masks)))


def _link(pixels: UInt8[np.ndarray, "y x 3"]) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", quality=88, method=2)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
