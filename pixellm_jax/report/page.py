"""The report of an evaluation as files: scores, histograms, and questions with their masks.

The page is one file that works offline. A report can be written again at any time:

    write_report(Path("runs/7b/muse"))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pixellm_jax import __version__
from pixellm_jax.benchmark_question import GIVEN
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.record import QuestionRecord, natural_order
from pixellm_jax.evaluation.summary import count_targets
from pixellm_jax.files import write_whole
from pixellm_jax.report.charts import Series, render_bars, render_grid
from pixellm_jax.report.figures import EXTRA, HIT, MISSED, ImageReader, render_figures
from pixellm_jax.report.html import (
    Tile,
    grade_iou,
    render_chip,
    render_page,
    render_plots,
    render_table,
    render_tile,
)
from pixellm_jax.report.numbers import (
    BINS,
    NO_JUDGE,
    Report,
    make_report,
    pair_iou,
    question_iou,
    read_run,
)
from pixellm_jax.report.tables import (
    as_json,
    as_markdown,
    describe,
    format_score,
    notes,
    published_rows,
    score_rows,
)
from pixellm_jax.text.answer import MARKER

JSON = "report.json"
"""The scores for programs."""

MARKDOWN = "report.md"
"""The scores as tables."""

PAGE = "index.html"
"""The report with figures."""

WORST = 60
"""Number of questions with the lowest IoU that are shown; each takes about 50 kB of the page."""

SAMPLE = 40
"""Number of further questions that are shown, spread evenly over the rest."""

MAX_COUNT = 9
"""Last row and column of the grid of target counts, which also holds all larger counts."""

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


def write_report(folder: Path, read_image: ImageReader | None = None) -> str:
    """Write report.json, report.md and index.html; return the Markdown.

    Args:
        folder: holds the `questions.jsonl` and `settings.json` of an evaluation.
        read_image: reads the image of a question; without it the page shows masks on grey.

    Raises:
        InputError: the records are missing or damaged, or the folder cannot be written.
    """
    report = make_report(read_run(folder))
    text = as_markdown(report)
    files = {
        JSON: json.dumps(as_json(report), indent=2, ensure_ascii=False) + "\n",
        MARKDOWN: text,
        PAGE: render_report(report, read_image),
    }
    try:
        for name, content in files.items():
            write_whole(folder / name, content)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write here ({error.strerror or error}); free some space or fix the "
            "permissions"
        ) from None
    return text


def render_report(report: Report, read_image: ImageReader | None) -> str:
    """Render the page of a report; without `read_image` it shows masks on grey."""
    run = report.run
    chosen = choose(run.records)
    published, remarks = published_rows(report)
    settings = escape(json.dumps(run.settings, indent=2, ensure_ascii=False))
    reasons = ", ".join(f"{reason} {count}" for reason, count in report.reasons.items())
    parts = [
        '<div class="tiles">',
        *map(render_tile, _tiles(report)),
        "</div>",
        f"<h3>Scores</h3>{render_table(score_rows(report.scores, run.mode))}",
        *map(_render_note, notes(report)),
        f"<h3>Published, in the same mode</h3>{render_table(published)}"
        if len(published) > 1
        else "",
        *map(_render_note, remarks),
        f"<h3>How it is spread</h3>{_render_plots(report)}",
        _render_note(f"How answers ended: {reasons}"),
        f"<details><summary>settings</summary><pre>{settings}</pre></details>",
        f"<h3>Questions, the worst first</h3>{_render_intro(run.records, chosen)}",
        *(_render_question(record, part, read_image) for record, part in chosen),
        f"<footer>pixellm {__version__}</footer>",
    ]
    body = "\n".join(filter(None, parts))
    return render_page(describe(run), body, style="report", script=_SCRIPT, restricted=True)


def choose(records: Sequence[QuestionRecord]) -> list[tuple[QuestionRecord, str]]:
    """Choose the questions to show, the worst first, each with "worst" or "sample".

    The worst have the lowest mean IoU; among equals those with more targets, true or predicted,
    come first. The sample is spread evenly over the other questions in the order of their number
    of targets, so that large numbers of targets are represented.
    """
    ordered = sorted(records, key=_badness)
    rest = sorted(ordered[WORST:], key=lambda record: len(record.truth))
    places = sorted({len(rest) * i // SAMPLE for i in range(SAMPLE if rest else 0)})
    sample = sorted((rest[place] for place in places), key=_badness)
    return [(r, "worst") for r in ordered[:WORST]] + [(r, "sample") for r in sample]


def _badness(record: QuestionRecord) -> tuple[float, int, list[str | int]]:
    return question_iou(record), -len(record.pairs), natural_order(record)


def _tiles(report: Report) -> list[Tile]:
    tiles = []
    for group in report.scores:
        if group.name != report.scores[0].name:
            continue
        judged = f", judged by {group.judge}" if group.judge != NO_JUDGE else ""
        scope = f"{group.summary.masks} masks of {group.summary.questions} questions{judged}"
        for name, title in (("giou", "gIoU"), ("ciou", "cIoU")):
            score = getattr(group.summary, name)
            value = format_score(score)
            interval = format_score(score, getattr(group.intervals, name)).removeprefix(value)
            tiles.append(Tile(value, f"{title}{interval}, {scope}"))
    if report.run.mode != GIVEN:
        right = format_score(report.scores[0].summary.right_count)
        tiles.append(Tile(right, "of the answers have the right number of targets"))
    return tiles


def _render_plots(report: Report) -> str:
    colours = {"matched": HIT, "missed": MISSED, "extra": EXTRA}
    series = [Series(kind, report.iou[kind], _css(colours[kind])) for kind in colours]
    edges = [i / BINS for i in range(BINS + 1)]
    plots = [render_bars("masks by IoU", series, edges, x_label="IoU")]
    if report.counts:
        plots.append(
            render_grid(
                "questions by number of targets",
                report.counts,
                max_value=MAX_COUNT,
                x_label="true",
                y_label="written",
            )
        )
    return render_plots(plots)


def _render_intro(
    records: Sequence[QuestionRecord], chosen: Sequence[tuple[QuestionRecord, str]]
) -> str:
    """Render which questions are shown, the colour key, and the buttons that filter them."""
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


def _render_question(record: QuestionRecord, part: str, read_image: ImageReader | None) -> str:
    figures, problem = render_figures(record, read_image)
    shown = "".join(
        f'<figure><img alt="{figure.caption}" src="{figure.link}">'
        f"<figcaption>{figure.caption}</figcaption></figure>"
        for figure in figures
    )
    iou = question_iou(record)
    numbers = _number_predictions(record)
    one = len(record.predicted) == 1
    owners = [numbers.get(0 if one else p) for p in range(record.answer.count(MARKER))]
    answer = _with_chips(record.answer, owners)
    expected = _with_chips(record.expected, list(range(len(record.truth))))
    wanted = f'<p class="wanted">Expected: {expected}</p>' if record.expected else ""
    facts = [
        f"{len(record.truth)} true, {count_targets(record)} written",
        *record.groups,
        f"ended: {record.reason}",
        part,
    ]
    note = _render_note(f"{problem}: masks alone") if problem else ""
    return f"""<article data-targets="{len(record.truth)}">
<h2><span class="{grade_iou(iou)}">IoU {iou:.4f}</span> {escape(record.id)}
<span>{escape(" · ".join(facts))}</span></h2>
<p class="ask">{escape(record.question)}</p>
<p class="reply">{answer or "(no words)"}</p>{wanted}
<ul class="marks">{_render_marks(record, numbers)}</ul>
<div class="three">{shown}</div>{note}
</article>"""


def _number_predictions(record: QuestionRecord) -> dict[int, int]:
    """Map each predicted mask to the number on the page: of its true mask, or one after those."""
    numbers = {p: t for p, t, _, _ in record.pairs if p is not None and t is not None}
    extra = [p for p, t, _, _ in record.pairs if p is not None and t is None]
    return numbers | {p: len(record.truth) + i for i, p in enumerate(extra)}


def _render_marks(record: QuestionRecord, numbers: dict[int, int]) -> str:
    """Render the IoU of every pair, with the judge's score."""
    items = []
    for pair in sorted(record.pairs, key=lambda pair: (pair[1] is None, pair[1] or 0)):
        predicted, truth, intersection, union = pair
        kind = "extra" if truth is None else "missed" if predicted is None else ""
        number = numbers[predicted or 0] if truth is None else truth
        score = record.judge["scores"][truth] if record.judge and truth is not None else None
        words = [kind, f"{pair_iou(pair):.4f}", f"({intersection} of {union} px)"]
        words.append(f"judge {score}" if score is not None else "")
        described = record.descriptions[truth] if record.descriptions and truth is not None else ""
        items.append(
            f'<li>{render_chip(number)} <span class="{grade_iou(pair_iou(pair))}">'
            f"{' '.join(filter(None, words))}</span> {escape(described)}</li>"
        )
    return "".join(items) or '<li class="good">right: there is none</li>'


def _with_chips(text: str, owners: Sequence[int | None]) -> str:
    """Replace each `[SEG]` by the chip of its mask; "?" where the mask is not known."""
    first, *others = text.split(MARKER)
    parts = [escape(first)]
    for i, piece in enumerate(others):
        parts.append(render_chip(owners[i] if i < len(owners) else None))
        parts.append(escape(piece))
    return "".join(parts)


def _render_note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _css(colour: tuple[int, int, int]) -> str:
    return "rgb({},{},{})".format(*colour)
