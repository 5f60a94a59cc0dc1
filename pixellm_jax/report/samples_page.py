"""An HTML page of samples: pictures, masks, conversations and tokens; no scripts, one file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from pixellm_jax.benchmark_question import IMAGE
from pixellm_jax.images.geometry import VOID
from pixellm_jax.images.overlay import colours, draw_overlay

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #6a7385; --page: #f3f4f7;
  --card: #fff; --edge: #dfe3ea; --ask: #e9eef8; --reply: #eef7ee; --learnt: #d4efd2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #98a1b3; --page: #14171d;
  --card: #1d222b; --edge: #333b49; --ask: #27324a; --reply: #223527; --learnt: #2c5232; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem clamp(1rem, 4vw, 3rem); background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } .lead { color: var(--soft); margin: .2rem 0 1.6rem; }
article { background: var(--card); border: 1px solid var(--edge); border-radius: 12px;
  margin: 0 auto 1.6rem; padding: 1.1rem 1.3rem; max-width: 1280px; }
h2 { font-size: 1rem; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 span { color: var(--soft); font-weight: normal; margin-left: .6em; }
.sides { display: grid; grid-template-columns: minmax(300px, 448px) 1fr; gap: 1.4rem; }
@media (max-width: 820px) { .sides { grid-template-columns: 1fr; } }
figure { margin: 0 0 .9rem; } img { width: 100%; display: block; border-radius: 6px; }
figcaption { color: var(--soft); font-size: .8rem; margin-top: .25rem; }
ul { list-style: none; margin: 0; padding: 0; font-size: .86rem; }
li { display: flex; gap: .5em; align-items: baseline; padding: .1rem 0; }
li small { color: var(--soft); margin-left: auto; white-space: nowrap; }
.chip { border-radius: 5px; padding: 0 .45em; font-size: .82em; font-weight: 600; }
.talk { border-left: 3px solid var(--edge); padding-left: .9rem; margin-bottom: 1rem; }
.talk.dropped { opacity: .5; border-left-style: dashed; }
.note { color: var(--soft); font-size: .8rem; }
.turn { border-radius: 10px; padding: .45rem .8rem; margin: .35rem 0; width: fit-content;
  max-width: 100%; overflow-wrap: anywhere; white-space: pre-wrap; }
.ask { background: var(--ask); } .reply { background: var(--reply); margin-left: 1.6rem; }
.tag { border: 1px dashed var(--soft); border-radius: 4px; color: var(--soft); font-size: .75em;
  padding: 0 .35em; }
.empty { color: var(--soft); font-style: italic; }
details { font-size: .8rem; border-top: 1px solid var(--edge); margin-top: .8rem;
  padding-top: .6rem; }
summary { cursor: pointer; color: var(--soft); }
.tokens { font-family: ui-monospace, monospace; line-height: 1.9; margin: .5rem 0 0;
  overflow-wrap: anywhere; }
.tokens span { border: 1px solid var(--edge); border-radius: 4px; padding: .05em .2em;
  margin-right: 1px; white-space: pre-wrap; }
.tokens .learnt { background: var(--learnt); border-color: transparent; }
"""


class Mask(NamedTuple):
    """A mask (0, 1, `VOID`) on the canvas, and what it is called."""

    phrases: tuple[str, ...]
    pixels: UInt8[np.ndarray, "Y X"]


class Talk(NamedTuple):
    """A conversation: questions and answers in turn; `Sample.group` stands for the next target.

    targets: places in `Sample.masks`, in the order of the groups. kept: within the budget.
    """

    messages: tuple[str, ...]
    targets: tuple[int, ...]
    kept: bool = True


class Token(NamedTuple):
    """A piece of text in the sequence. target: its mask, of a codebook token."""

    text: str
    about: str
    learnt: bool = False
    target: int | None = None


class Sample(NamedTuple):
    """What the model gets of an example: the canvas with its fitted part, masks, text, tokens."""

    title: str
    about: str
    image: UInt8[np.ndarray, "y x 3"]
    hw: tuple[int, int]
    masks: tuple[Mask, ...]
    talks: tuple[Talk, ...]
    group: str
    tokens: tuple[Token, ...] = ()
    length: str = ""


def write_page(title: str, lead: str, samples: Iterable[Sample]) -> str:
    """The whole page."""
    articles = "\n".join(_article(sample) for sample in samples)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{_text(title)}</h1>\n<p class="lead">{_text(lead)}</p>\n{articles}\n'
        "</body>\n</html>\n"
    )


def _article(sample: Sample) -> str:
    side = sample.image.shape[0]
    height, width = sample.hw
    talks = "\n".join(_talk(talk, sample.group) for talk in sample.talks)
    return f"""<article>
<h2>{_text(sample.title)}<span>{_text(sample.about)}</span></h2>
<div class="sides">
<div>
<figure><img alt="canvas with masks" src="{_picture(_with_masks(sample))}">
<figcaption>{len(sample.masks) or "no"} masks; hatched: padding and void</figcaption></figure>
<ul>{"".join(map(_legend, range(len(sample.masks)), sample.masks))}</ul>
</div>
<div>
{talks or '<p class="empty">No conversation.</p>'}
<details><summary>the canvas as it is: {side} × {side}, picture {height} × {width}</summary>
<figure style="max-width:{side}px"><img alt="canvas" src="{_picture(sample.image)}"></figure>
</details>
{_sequence(sample)}
</div>
</div>
</article>"""


def _legend(number: int, mask: Mask) -> str:
    share = 100 * float((mask.pixels == 1).sum()) / max(1, int((mask.pixels != VOID).sum()))
    area = f"{share:.2g} %" if share else "empty"
    phrases = _text("; ".join(mask.phrases))
    return f"<li>{_chip(number)}<span>{phrases}</span><small>{area}</small></li>"


def _talk(talk: Talk, group: str) -> str:
    targets = iter(talk.targets)
    turns = []
    for place, message in enumerate(talk.messages):
        parts = [_text(part) for part in (message.split(group) if place % 2 else [message])]
        text = parts[0] + "".join(_chip(next(targets, None)) + part for part in parts[1:])
        if not place % 2:
            text = text.replace(_text(f"{IMAGE}\n"), '<span class="tag">image</span> ')
        open_answer = '<span class="empty">the model answers</span>'
        turns.append(
            f'<div class="turn {"reply" if place % 2 else "ask"}">{text or open_answer}</div>'
        )
    left = " ".join(map(_chip, targets))
    wanted = f'<div class="note">to be found: {left}</div>' if left and talk.kept else ""
    note = "" if talk.kept else '<div class="note">over budget: left out</div>'
    kind = "talk" if talk.kept else "talk dropped"
    return f'<div class="{kind}">{note}{"".join(turns)}{wanted}</div>'


def _sequence(sample: Sample) -> str:
    if not sample.tokens:
        return ""
    learnt = sum(token.learnt for token in sample.tokens)
    spans = "".join(map(_token, sample.tokens))
    return (
        f"<details><summary>the sequence: {sample.length}; {learnt} supervised, in green"
        f'</summary><p class="tokens">{spans}</p></details>'
    )


def _token(token: Token) -> str:
    style = "" if token.target is None else f' style="{_colour(token.target)}"'
    kind = "learnt" if token.learnt else ""
    return f'<span class="{kind}" title="{_text(token.about)}"{style}>{_text(token.text)}</span>'


def _chip(number: int | None) -> str:
    if number is None:
        return '<span class="chip">?</span>'
    return f'<span class="chip" style="{_colour(number)}">{number + 1}</span>'


def _colour(number: int) -> str:
    red, green, blue = (int(value) for value in colours(number + 1)[number])
    luminance = (np.array([red, green, blue]) / 255) ** 2.2 @ (0.2126, 0.7152, 0.0722)
    return f"background:rgb({red},{green},{blue});color:{'#000' if luminance > 0.179 else '#fff'}"


def _with_masks(sample: Sample) -> UInt8[np.ndarray, "y x 3"]:
    """The canvas with the masks, hatched where no loss is taken: padding and void."""
    side, (height, width) = sample.image.shape[0], sample.hw
    pixels = np.array([_enlarged(mask.pixels, side) for mask in sample.masks], np.uint8)
    pixels = pixels.reshape(-1, side, side)
    labels = [str(number + 1) for number in range(len(pixels))]
    inside = np.ascontiguousarray(pixels[:, :height, :width] == 1)
    picture = sample.image.copy()
    picture[:height, :width] = draw_overlay(picture[:height, :width].copy(), inside, labels)
    nowhere = (pixels == VOID).all(axis=0) & bool(len(pixels))
    nowhere[height:] = nowhere[:, width:] = True
    return _hatched(picture, nowhere)


def _enlarged(mask: UInt8[np.ndarray, "Y X"], side: int) -> UInt8[np.ndarray, "y x"]:
    places = np.arange(side) * len(mask) // side
    return mask[places][:, places]


def _hatched(
    picture: UInt8[np.ndarray, "y x 3"], where: Bool[np.ndarray, "y x"]
) -> UInt8[np.ndarray, "y x 3"]:
    rows, columns = np.indices(where.shape)
    stripes = np.where((rows + columns) // 5 % 2, 205, 165).astype(np.uint8)
    mixed = (0.35 * picture + 0.65 * stripes[..., None]).astype(np.uint8)
    return np.where(where[..., None], mixed, picture)


def _picture(pixels: UInt8[np.ndarray, "y x 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _text(text: str) -> str:
    return html.escape(text)
