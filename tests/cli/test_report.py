"""`pixellm report`: its numbers are those of the records, and its page shows what they say."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pixellm_jax.cli.main import main
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.bootstrap import intervals
from pixellm_jax.evaluation.summary import summarise, tally_record
from pixellm_jax.experiments.question_images import image_reader
from pixellm_jax.images import rle
from pixellm_jax.report import page as report_page
from pixellm_jax.report.figures import EXTRA, HIT, MISSED, render_figures
from pixellm_jax.report.numbers import make_report, question_iou, read_run
from pixellm_jax.report.page import write_report
from pixellm_jax.report.published import find_published, read_published
from tests.support.made_up_run import HW, box, judged, question, random_questions, write_run


class Page(HTMLParser):
    """Text outside of style and script, tags with their attributes, and cells of the tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.rows, self._inside = "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._inside = "" if tag in ("style", "script") else self._inside

    def handle_data(self, data):
        if self._inside in ("td", "th", "small") and self.rows:
            self.rows[-1][-1] += data
        if self._inside not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(out) -> Page:
    return Page((out / "index.html").read_text(encoding="utf-8"))


@pytest.fixture
def records():
    return random_questions(37, seed=1)


def test_report_has_the_numbers_of_the_records(tmp_path, records):
    write_report(write_run(tmp_path, records))
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    parts = {"all": (found["scores"], records)}
    for name, numbers in found["groups"].items():
        parts[name] = (numbers, [record for record in records if name in record.groups])
    assert parts.keys() == {"all", "few", "many"}
    for numbers, own in parts.values():
        expected = summarise(own)._asdict()
        assert {k: v for k, v in numbers.items() if k != "intervals"} == {
            k: None if v != v else v for k, v in expected.items()
        }
        bounds = intervals([tally_record(record) for record in own])
        assert numbers["intervals"]["giou"] == [bounds.giou.low, bounds.giou.high]
        assert numbers["intervals"]["ciou"] == [bounds.ciou.low, bounds.ciou.high]
    assert (found["benchmark"], found["split"], found["mode"]) == ("muse", "val", "generated")
    assert found["judged"] is None


def test_page_and_markdown_have_the_numbers_of_the_report(tmp_path, records):
    text = write_report(write_run(tmp_path, records))
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    scores = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["scores"]
    low, high = scores["intervals"]["giou"]
    shown = f"{scores['giou']:.4f} [{low:.4f}, {high:.4f}]"
    table = [row for row in page(tmp_path).rows if row[0] == "all" and row[3] == str(len(records))]
    (row,) = table
    assert row[:3] == ["all", "generated", "none"] and row[5] == shown
    (line,) = [line for line in text.splitlines() if line.startswith("| all |")]
    assert [part.strip() for part in line.strip("|").split("|")] == row
    for record in records:  # all of them have pictures: they are fewer than `WORST`
        assert f"IoU {question_iou(record):.4f} {record.id}" in page(tmp_path).text


def test_histograms_count_every_mask_and_question(tmp_path, records):
    report = make_report(read_run(write_run(tmp_path, records)))
    pairs = [pair for record in records for pair in record.pairs]
    assert sum(map(sum, report.iou.values())) == len(pairs)
    assert report.iou["missed"] == [sum(p[0] is None for p in pairs)] + [0] * 19
    assert sum(report.iou["extra"]) == sum(p[1] is None for p in pairs)
    top = sum(None not in p[:2] and p[2] / p[3] >= 0.95 for p in pairs)
    assert report.iou["matched"][-1] == top > 0
    assert sum(report.counts.values()) == len(records)
    for (true, written), count in report.counts.items():
        assert count == sum(
            (len(r.truth), r.answer.count("[SEG]")) == (true, written) for r in records
        )


def test_perfect_and_empty_runs():
    mask = box(3, 4, 11, 13)
    assert question_iou(question(0, [(mask, mask)])) == 1
    assert question_iou(question(0, missed=[mask])) == 0
    assert question_iou(question(0, extra=[mask])) == 0
    assert question_iou(question(0)) == 1  # rightly nothing


def test_judged_rows_count_rejected_targets_as_missed(tmp_path):
    mask = box(3, 4, 10, 10)
    good, bad = question(0, [(mask, mask)]), question(1, [(mask, mask)])
    records = [judged(good, [9]), judged(bad, [3]), question(2, [(mask, mask)])]
    text = write_report(write_run(tmp_path, records))
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["scores"]["giou"] == 1
    assert found["judged"]["judge"] == "made-up judge"
    assert found["judged"]["scores"]["questions"] == 2
    assert found["judged"]["scores"]["giou"] == found["judged"]["scores"]["ciou"] == 0.5
    assert found["judged"]["scores"]["right_count"] is None  # is no matter of the judge
    assert found["judged"]["questions_without_scores"] == 1
    assert "1 of 3 questions have no scores of the judge" in text
    assert re.search(r"\| all \| generated \| made-up judge \| 2 \| 2 \| 0\.5000 ", text)
    (tmp_path / "judge.json").write_text('{"threshold": 3}')
    assert "| made-up judge | 2 | 2 | 1.0000 " in write_report(tmp_path)


def test_scores_of_two_judges_do_not_mix(tmp_path):
    mask = box(3, 4, 10, 10)
    records = [judged(question(n, [(mask, mask)]), [5], f"judge {n}") for n in range(2)]
    with pytest.raises(InputError, match="scores of several judges"):
        write_report(write_run(tmp_path, records))


def test_questions_are_sorted_by_error_and_bounded(monkeypatch, records):
    monkeypatch.setattr(report_page, "WORST", 5)
    monkeypatch.setattr(report_page, "SAMPLE", 7)
    chosen = report_page.choose(records)
    ious = [question_iou(record) for record, _ in chosen]
    assert [part for _, part in chosen] == ["worst"] * 5 + ["sample"] * 7
    assert len({record.id for record, _ in chosen}) == 12
    assert ious[:5] == sorted(question_iou(record) for record in records)[:5]
    assert ious == sorted(ious)
    assert report_page.choose(records[:3]) == [
        (record, "worst") for record, _ in report_page.choose(records[:3])
    ]
    counts = {len(record.truth) for record, part in chosen if part == "sample"}
    assert {0, max(len(record.truth) for record in records)} <= counts | {0}


def test_page_says_which_questions_it_shows(tmp_path, monkeypatch, records):
    monkeypatch.setattr(report_page, "WORST", 5)
    monkeypatch.setattr(report_page, "SAMPLE", 7)
    write_report(write_run(tmp_path, records))
    found = page(tmp_path)
    assert "the 5 worst and 7 taken evenly from the rest of 37 questions" in found.text
    articles = found.all("article")
    assert len(articles) == 12
    buttons = {button["data-targets"] for button in found.all("button")}
    assert buttons == {"all"} | {article["data-targets"] for article in articles}


def test_page_loads_nothing(tmp_path, records):
    write_report(write_run(tmp_path, records[:5]))
    found = page(tmp_path)
    assert not found.all("link") and not found.all("iframe")
    assert all(image["src"].startswith("data:image/webp;base64,") for image in found.all("img"))
    assert [script for script in found.all("script") if script] == []
    (policy,) = [m["content"] for m in found.all("meta") if m.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")


EVIL = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>&\'|'


def test_nothing_in_the_records_becomes_markup(tmp_path):
    mask = box(3, 4, 10, 10)
    record = judged(question(0, [(mask, mask)], missed=[mask]), [4], EVIL)._replace(
        question=EVIL,
        answer=f"{EVIL} [SEG]",
        expected=f"{EVIL} [SEG] [SEG]",
        picture=EVIL,
        groups=(EVIL,),
        descriptions=(EVIL, EVIL),
        reason=EVIL,
        id=f"muse/val/{EVIL}/0",
    )
    run = write_run(tmp_path, [record], checkpoint=EVIL, data=EVIL)
    write_report(run, image_reader(tmp_path))
    found = page(tmp_path)
    assert len(found.all("script")) == 1
    assert not any(name.startswith("on") for _, tags in found.tags for name in tags)
    assert all(image["src"].startswith("data:") for image in found.all("img"))
    assert found.text.count("alert(1)") >= 8  # it is there, as text
    plain = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert EVIL not in plain and html.escape(EVIL) in plain


def decoded(link: str) -> np.ndarray:
    data = base64.b64decode(link.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)


def near(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Largest distance in a channel: the picture is a quarter grey, and WebP is lossy."""
    return float(np.abs(pixels - (0.75 * np.array(colour) + 0.25 * 240)).mean(axis=(0, 1)).max())


def test_pictures_show_hits_misses_and_extras():
    true, found = box(4, 4, 24, 24), box(4, 16, 24, 24)
    record = question(0, [(found, true)], extra=[box(32, 4, 12, 12)], picture="")
    (truth, prediction, difference), problem = render_figures(record, image_reader(None))
    assert [f.caption for f in (truth, prediction, difference)] == [
        "truth",
        "prediction",
        "difference",
    ]
    assert problem == "the picture was drawn and is not kept"
    pixels = decoded(difference.link)
    assert pixels.shape == (*HW, 3)
    assert near(pixels[8:24, 18:26], HIT) < 20
    assert near(pixels[8:24, 6:14], MISSED) < 20
    assert near(pixels[8:24, 30:38], EXTRA) < 20
    assert near(pixels[34:42, 6:14], EXTRA) < 20
    # Colour of the match, not of the place in the answer: blue in both pictures.
    blue = decoded(truth.link)[8:24, 18:26].mean(axis=(0, 1))
    again = decoded(prediction.link)[8:24, 18:26].mean(axis=(0, 1))
    np.testing.assert_allclose(blue, again, atol=25)
    assert blue[2] - blue[0] > 40 < again[2] - again[0]


def test_void_pixels_are_no_difference():
    mask = box(4, 4, 24, 24)
    record = question(0, missed=[mask], void=rle.encode(box(0, 0, 47, 16)))
    (_, _, difference), _ = render_figures(record, image_reader(None))
    pixels = decoded(difference.link)
    assert near(pixels[8:24, 18:26], MISSED) < 20
    grey = pixels[8:24, 4:14]
    assert (grey.max(axis=-1) - grey.min(axis=-1)).mean() < 15


def test_pictures_come_from_the_data_folder_alone(tmp_path):
    data = tmp_path / "data"
    (data / "photos").mkdir(parents=True)
    photo = np.zeros((*HW, 3), np.uint8)
    photo[:, 30:] = 255
    Image.fromarray(photo).save(data / "photos" / "0.png")
    Image.fromarray(photo).save(tmp_path / "secret.png")
    (truth, _, _), problem = render_figures(question(0), image_reader(data))
    pixels = decoded(truth.link)
    assert problem == "" and pixels[:, 40:].mean() - pixels[:, :20].mean() > 100
    outside = question(0, picture="../secret.png")
    assert (
        render_figures(outside, image_reader(data))[1] == "the picture is outside the data folder"
    )
    assert "cannot be read" in render_figures(question(1), image_reader(data))[1]
    assert render_figures(question(0), image_reader(None))[1] == "no data folder was given"


def test_drawn_shapes_are_drawn_again():
    record = question(0, id="shapes/test/3/1", picture="", hw=(96, 96))
    (truth, _, _), problem = render_figures(record, image_reader(None))
    assert problem == "" and decoded(truth.link).std() > 5


def test_given_answers_are_not_counted(tmp_path):
    mask = box(3, 4, 10, 10)
    records = [question(0, [(mask, mask)], reason="given")]
    text = write_report(write_run(tmp_path, records, mode="given", benchmark="refcoco"))
    assert "The answers were given" in text and "| all | given | none |" in text
    assert "questions by number of targets" not in page(tmp_path).text


def test_published_scores_stand_beside_those_of_the_same_mode(tmp_path):
    mask = box(3, 4, 10, 10)
    records = [question(0, [(mask, mask)], reason="given")]
    settings = {"benchmark": "refcoco", "split": "testA"}
    text = write_report(write_run(tmp_path / "a", records, mode="given", **settings))
    assert re.search(r"\| PixelLM \| all \| given \| none \| – \| 0\.765 \|", text)
    assert "| GLaMM |" not in text and "not beside it: " in text and "GLaMM" in text
    other = write_report(write_run(tmp_path / "b", records, mode="generated", **settings))
    assert "| PixelLM |" not in other and "PixelLM" in other
    part = write_report(write_run(tmp_path / "c", records, mode="given", limit=9, **settings))
    assert "This run is of a part of the split" in part
    own = write_report(write_run(tmp_path / "d", records, benchmark="shapes", split="test"))
    assert "Published" not in own


def test_published_scores_are_whole():
    rows = read_published()
    keys = [(r.system, r.benchmark, r.split, r.group, r.source) for r in rows]
    assert len(set(keys)) == len(keys) > 100
    for row in rows:
        assert row.mode in ("given", "generated", None)
        assert row.scores and row.scores.keys() <= {"giou", "ciou", "t_acc", "n_acc"}
        assert all(0.1 < score < 1 for score in row.scores.values())
        assert re.search(r"arXiv:\d{4}\.\d{5}|github\.com/", row.source)
    same, others = find_published("muse", "val", "generated")
    assert {row.system for row in same} >= {"PixelLM-7B", "PixelLM-13B"} and not others
    assert all(row.judge for row in same)


def test_command_makes_the_report_anew(tmp_path, capsys, records):
    assert main(["report", str(write_run(tmp_path, records))]) == 0
    assert "| all | generated | none | 37 |" in capsys.readouterr().out
    assert (tmp_path / "index.html").is_file()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", None, "no such file"),
        ("settings.json", '{"benchmark": "muse"}', "'split' is missing"),
        ("questions.jsonl", "", "no question in it"),
        ("questions.jsonl", "{}\n", "questions.jsonl:1"),
    ],
)
def test_damaged_runs_are_refused(tmp_path, capsys, name, content, message):
    write_run(tmp_path, random_questions(2, seed=0))
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_unknown_data_folder_is_refused(tmp_path, capsys, records):
    write_run(tmp_path, records)
    assert main(["report", str(tmp_path), "--data", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
