"""The page of a report: scores, histograms, questions with pictures; one file, works offline."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path

from pixellm_jax import __version__
from pixellm_jax.benchmark_question import GIVEN
from pixellm_jax.cli.report_pictures import EXTRA, HIT, MISSED, draw_figures
from pixellm_jax.evaluation.record import QuestionRecord, natural_order
from pixellm_jax.evaluation.summary import count_targets
from pixellm_jax.experiments.shapes_page import FAIR, GOOD, STYLE, Tile, draw_chip
from pixellm_jax.report.charts import Series, render_bars, render_grid
from pixellm_jax.report.numbers import (
    BINS,
    NO_JUDGE,
    Report,
    pair_iou,
    question_iou,
)
from pixellm_jax.report.tables import cell, describe, notes, published_rows, score_rows
from pixellm_jax.text.answer import MARKER

WORST, SAMPLE = 60, 40
"""Questions with pictures: the worst, and some evenly taken from the rest. About 50 kB each."""

MOST_COUNTS = 9
"""Numbers of targets that stand for themselves in the grid; this one is for all above, too."""

_STYLE = """
h3 { font-size: 1rem; margin: 1.6rem 0 .6rem; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--edge);
  border-radius: 14px; padding: .4rem .9rem; margin-bottom: .8rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; vertical-align: top; }
td { border-top: 1px solid var(--edge); } th { color: var(--soft); font-weight: 600; }
td.number { white-space: nowrap; } td small { color: var(--soft); }
.note { color: var(--soft); font-size: .84rem; margin: 0 0 .4rem; max-width: 60rem; }
.filter { display: flex; flex-wrap: wrap; gap: .4rem; margin: .8rem 0; align-items: center; }
.filter button { font: inherit; font-size: .84rem; color: inherit; background: var(--card);
  border: 1px solid var(--edge); border-radius: 99px; padding: .15rem .8rem; cursor: pointer; }
.filter button[aria-pressed=true] { background: var(--ask); border-color: var(--line); }
article { display: block; } article[hidden] { display: none; }
.three { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; margin-top: .8rem; }
@media (max-width: 640px) { .three { grid-template-columns: 1fr; } }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 3px;
  vertical-align: -.05em; margin: 0 .3em 0 .6em; }
code, pre { font: .8rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere;
  white-space: pre-wrap; }
"""

_SCRIPT = """
const buttons = [...document.querySelectorAll(".filter button")];
const articles = [...document.querySelectorAll("article")];
const shown = document.querySelector("#shown");
for (const button of buttons) button.addEventListener("click", () => {
  for (const other of buttons) other.setAttribute("aria-pressed", other === button);
  const wanted = button.dataset.targets;
  for (const one of articles) one.hidden = wanted !== "all" && one.dataset.targets !== wanted;
  shown.textContent = articles.filter((one) => !one.hidden).length;
});
"""


def write_page(title: str, body: str, script: str = "") -> str:
    """A whole page, which can load nothing and run nothing but `script`."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    policy += f"; script-src 'sha256-{digest}'" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n"
        f"<footer>pixellm {__version__}</footer>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def draw_report(report: Report, data: Path | None) -> str:
    """The page of a report. `data`: the folder that the pictures' paths are relative to."""
    run = report.run
    chosen = choose(run.records)
    rows, others = published_rows(report)
    settings = html.escape(json.dumps(run.settings, indent=2, ensure_ascii=False))
    reasons = ", ".join(f"{reason} {count}" for reason, count in report.reasons.items())
    parts = [
        '<div class="tiles">',
        *(
            f'<div class="tile"><b>{html.escape(tile.value)}</b>'
            f"<span>{html.escape(tile.about)}</span></div>"
            for tile in _tiles(report)
        ),
        "</div>",
        f"<h3>Scores</h3>{draw_table(score_rows(report.parts, run.mode))}",
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes(report)),
        f"<h3>Published, in the same mode</h3>{draw_table(rows)}" if len(rows) > 1 else "",
        *(f'<p class="note">{html.escape(note)}</p>' for note in others),
        f'<h3>How it is spread</h3><div class="plots">{_plots(report)}</div>',
        f'<p class="note">How answers ended: {html.escape(reasons)}</p>',
        f"<details><summary>settings</summary><pre>{settings}</pre></details>",
        f"<h3>Questions, the worst first</h3>{_intro(run.records, chosen)}",
        *(_article(record, part, data) for record, part in chosen),
    ]
    return write_page(describe(run), "\n".join(filter(None, parts)), _SCRIPT)


def choose(records: Sequence[QuestionRecord]) -> list[tuple[QuestionRecord, str]]:
    """Questions for pictures, the worst first, each with "worst" or "sample".

    Worst is the least mean IoU; of equal ones those with more targets, true or predicted, come
    first. The sample is even over the rest in the order of their number of targets, so that no
    large number of targets goes without.
    """
    ordered = sorted(records, key=_badness)
    rest = sorted(ordered[WORST:], key=lambda record: len(record.truth))
    places = sorted({len(rest) * i // SAMPLE for i in range(SAMPLE if rest else 0)})
    sample = sorted((rest[place] for place in places), key=_badness)
    return [(r, "worst") for r in ordered[:WORST]] + [(r, "sample") for r in sample]


def draw_table(rows: Sequence[Sequence[str]]) -> str:
    """A table, its head first. What is in brackets after a number is small."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(map(_table_cell, row))}</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _table_cell(text: str) -> str:
    number, bracket, interval = text.partition(" [")
    if bracket and text[0] in "0123456789-+":
        small = f"<small>[{html.escape(interval)}</small>"
        return f'<td class="number">{html.escape(number)} {small}</td>'
    return f"<td>{html.escape(text)}</td>"


def _badness(record: QuestionRecord) -> tuple[float, int, list[str | int]]:
    return question_iou(record), -len(record.pairs), natural_order(record)


def _tiles(report: Report) -> list[Tile]:
    tiles = []
    for part in report.parts:
        if part.name != report.parts[0].name:
            continue
        judged = f", judged by {part.judge}" if part.judge != NO_JUDGE else ""
        about = f"{part.summary.masks} masks of {part.summary.questions} questions{judged}"
        for name, title in (("giou", "gIoU"), ("ciou", "cIoU")):
            value = cell(getattr(part.summary, name))
            interval = cell(getattr(part.summary, name), getattr(part.intervals, name))
            tiles.append(Tile(value, f"{title}{interval.removeprefix(value)}, {about}"))
    if report.run.mode != GIVEN:
        right = cell(report.parts[0].summary.right_count)
        tiles.append(Tile(right, "of the answers have the right number of targets"))
    return tiles


def _plots(report: Report) -> str:
    colours = {"matched": HIT, "missed": MISSED, "extra": EXTRA}
    series = [Series(kind, report.iou[kind], _css(colours[kind])) for kind in colours]
    edges = [place / BINS for place in range(BINS + 1)]
    plots = [render_bars("masks by IoU", series, edges, x_label="IoU")]
    if report.counts:
        title = "questions by number of targets"
        plots.append(
            render_grid(
                title, report.counts, max_value=MOST_COUNTS, x_label="true", y_label="written"
            )
        )
    return "".join(f'<div class="plot">{plot}</div>' for plot in plots)


def _intro(records: Sequence[QuestionRecord], chosen: Sequence[tuple[QuestionRecord, str]]) -> str:
    worst = sum(part == "worst" for _, part in chosen)
    sample = len(chosen) - worst
    which = f"the {worst} worst" + (f" and {sample} taken evenly from the rest" if sample else "")
    if len(chosen) == len(records):
        which = "all"
    keys = "".join(
        f'<span class="key" style="background:{_css(colour)}"></span>{name}'
        for name, colour in (("both", HIT), ("missed", MISSED), ("too much", EXTRA))
    )
    counts = sorted({len(record.truth) for record, _ in chosen})
    buttons = "".join(
        f'<button type="button" data-targets="{count}" aria-pressed="false">{count}</button>'
        for count in counts
    )
    return (
        f'<p class="note">Here are {which} of {len(records)} questions; '
        f'<span id="shown">{len(chosen)}</span> shown. Difference:{keys}.</p>'
        '<div class="filter">number of true targets: <button type="button" data-targets="all" '
        f'aria-pressed="true">all</button>{buttons}</div>'
    )


def _article(record: QuestionRecord, part: str, data: Path | None) -> str:
    figures, problem = draw_figures(record, data)
    drawn = "".join(
        f'<figure><img alt="{figure.about}" src="{figure.link}">'
        f"<figcaption>{figure.about}</figcaption></figure>"
        for figure in figures
    )
    iou, written = question_iou(record), count_targets(record)
    places = {p: t for p, t, _, _ in record.pairs if p is not None and t is not None}
    extra = [p for p, t, _, _ in record.pairs if p is not None and t is None]
    places |= {p: len(record.truth) + place for place, p in enumerate(extra)}
    one = len(record.predicted) == 1
    owners = [places.get(0 if one else p) for p in range(record.answer.count(MARKER))]
    answer = _with_chips(record.answer, owners)
    expected = _with_chips(record.expected, list(range(len(record.truth))))
    wanted = f'<p class="wanted">Expected: {expected}</p>' if record.expected else ""
    about = [
        f"{len(record.truth)} true, {written} written",
        *record.groups,
        f"ended: {record.reason}",
        part,
    ]
    notes = f'<p class="note">{html.escape(problem)}: masks alone</p>' if problem else ""
    return f"""<article data-targets="{len(record.truth)}">
<h2><span class="{_grade(iou)}">IoU {iou:.4f}</span> {html.escape(record.id)}
<span>{html.escape(" · ".join(about))}</span></h2>
<p class="ask">{html.escape(record.question)}</p>
<p class="reply">{answer or "(no words)"}</p>{wanted}
<ul class="marks">{_marks(record, places)}</ul>
<div class="three">{drawn}</div>{notes}
</article>"""


def _marks(record: QuestionRecord, places: dict[int, int]) -> str:
    """IoU of every pair, with the judge's score."""
    items = []
    for pair in sorted(record.pairs, key=lambda pair: (pair[1] is None, pair[1] or 0)):
        predicted, truth, intersection, union = pair
        kind = "extra" if truth is None else "missed" if predicted is None else ""
        number = places[predicted or 0] if truth is None else truth
        scored = record.judge["scores"][truth] if record.judge and truth is not None else None
        words = [kind, f"{pair_iou(pair):.4f}", f"({intersection} of {union} px)"]
        words.append(f"judge {scored}" if scored is not None else "")
        described = record.descriptions[truth] if record.descriptions and truth is not None else ""
        items.append(
            f'<li>{draw_chip(number)} <span class="{_grade(pair_iou(pair))}">'
            f"{' '.join(filter(None, words))}</span> {html.escape(described)}</li>"
        )
    return "".join(items) or '<li class="good">right: there is none</li>'


def _with_chips(text: str, owners: Sequence[int | None]) -> str:
    """Text with a chip for each `[SEG]`; a question mark where its mask is not known."""
    pieces = text.split(MARKER)
    out = [html.escape(pieces[0])]
    for place, piece in enumerate(pieces[1:]):
        number = owners[place] if place < len(owners) else None
        out.append('<span class="chip">?</span>' if number is None else draw_chip(number))
        out.append(html.escape(piece))
    return "".join(out)


def _grade(iou: float) -> str:
    return "good" if iou >= GOOD else "fair" if iou >= FAIR else "bad"


def _css(colour: tuple[int, int, int]) -> str:
    return "rgb({},{},{})".format(*colour)
