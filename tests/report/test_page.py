"""The written report: its numbers are those of the records, and its page shows what they say."""

from __future__ import annotations

import html
import json
import re

import pytest

from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.bootstrap import intervals
from pixellm_jax.evaluation.summary import summarise, tally_record
from pixellm_jax.experiments.question_images import image_reader
from pixellm_jax.report import page as page_module
from pixellm_jax.report.numbers import question_iou
from pixellm_jax.report.page import write_report
from tests.support.made_up_run import box, judged, question, random_questions, write_run
from tests.support.pages import Page


def read_page(folder) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


@pytest.fixture
def records():
    return random_questions(37, seed=1)


def test_report_has_the_numbers_of_the_records(tmp_path, records):
    write_report(write_run(tmp_path, records))
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    groups = {"all": (report["scores"], records)}
    for name, numbers in report["groups"].items():
        groups[name] = (numbers, [record for record in records if name in record.groups])
    assert groups.keys() == {"all", "few", "many"}
    for numbers, members in groups.values():
        expected = summarise(members)._asdict()
        assert {k: v for k, v in numbers.items() if k != "intervals"} == {
            k: None if v != v else v for k, v in expected.items()
        }
        bounds = intervals([tally_record(record) for record in members])
        assert numbers["intervals"]["giou"] == [bounds.giou.low, bounds.giou.high]
        assert numbers["intervals"]["ciou"] == [bounds.ciou.low, bounds.ciou.high]
    assert (report["benchmark"], report["split"], report["mode"]) == ("muse", "val", "generated")
    assert report["judged"] is None


def test_page_and_markdown_have_the_numbers_of_the_report(tmp_path, records):
    text = write_report(write_run(tmp_path, records))
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    scores = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["scores"]
    low, high = scores["intervals"]["giou"]
    shown = f"{scores['giou']:.4f} [{low:.4f}, {high:.4f}]"
    table = [
        row for row in read_page(tmp_path).rows if row[0] == "all" and row[3] == str(len(records))
    ]
    (row,) = table
    assert row[:3] == ["all", "generated", "none"] and row[5] == shown
    (line,) = [line for line in text.splitlines() if line.startswith("| all |")]
    assert [part.strip() for part in line.strip("|").split("|")] == row
    for record in records:  # all of them have figures: they are fewer than `WORST`
        assert f"IoU {question_iou(record):.4f} {record.id}" in read_page(tmp_path).text


def test_judged_rows_count_rejected_targets_as_missed(tmp_path):
    mask = box(3, 4, 10, 10)
    good, bad = question(0, [(mask, mask)]), question(1, [(mask, mask)])
    records = [judged(good, [9]), judged(bad, [3]), question(2, [(mask, mask)])]
    text = write_report(write_run(tmp_path, records))
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["scores"]["giou"] == 1
    assert report["judged"]["judge"] == "made-up judge"
    assert report["judged"]["scores"]["questions"] == 2
    assert report["judged"]["scores"]["giou"] == report["judged"]["scores"]["ciou"] == 0.5
    assert report["judged"]["scores"]["right_count"] is None  # does not depend on the judge
    assert report["judged"]["questions_without_scores"] == 1
    assert "1 of 3 questions have no scores of the judge" in text
    assert re.search(r"\| all \| generated \| made-up judge \| 2 \| 2 \| 0\.5000 ", text)
    (tmp_path / "judge.json").write_text('{"threshold": 3}')
    assert "| made-up judge | 2 | 2 | 1.0000 " in write_report(tmp_path)


def test_scores_of_two_judges_do_not_mix(tmp_path):
    mask = box(3, 4, 10, 10)
    records = [judged(question(n, [(mask, mask)]), [5], f"judge {n}") for n in range(2)]
    with pytest.raises(InputError, match="scores of several judges"):
        write_report(write_run(tmp_path, records))


def test_questions_are_sorted_by_error_and_limited(monkeypatch, records):
    monkeypatch.setattr(page_module, "WORST", 5)
    monkeypatch.setattr(page_module, "SAMPLE", 7)
    chosen = page_module.choose(records)
    ious = [question_iou(record) for record, _ in chosen]
    assert [part for _, part in chosen] == ["worst"] * 5 + ["sample"] * 7
    assert len({record.id for record, _ in chosen}) == 12
    assert ious[:5] == sorted(question_iou(record) for record in records)[:5]
    assert ious == sorted(ious)
    assert page_module.choose(records[:3]) == [
        (record, "worst") for record, _ in page_module.choose(records[:3])
    ]
    counts = {len(record.truth) for record, part in chosen if part == "sample"}
    assert {0, max(len(record.truth) for record in records)} <= counts | {0}


def test_page_says_which_questions_it_shows(tmp_path, monkeypatch, records):
    monkeypatch.setattr(page_module, "WORST", 5)
    monkeypatch.setattr(page_module, "SAMPLE", 7)
    write_report(write_run(tmp_path, records))
    page = read_page(tmp_path)
    assert "the 5 worst and 7 taken evenly from the rest of 37 questions" in page.text
    articles = page.all("article")
    assert len(articles) == 12
    buttons = {button["data-targets"] for button in page.all("button")}
    assert buttons == {"all"} | {article["data-targets"] for article in articles}


def test_page_loads_nothing(tmp_path, records):
    write_report(write_run(tmp_path, records[:5]))
    page = read_page(tmp_path)
    assert not page.all("link") and not page.all("iframe")
    assert all(image["src"].startswith("data:image/webp;base64,") for image in page.all("img"))
    assert [script for script in page.all("script") if script] == []
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
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
    page = read_page(tmp_path)
    assert len(page.all("script")) == 1
    assert not any(name.startswith("on") for _, tags in page.elements for name in tags)
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert page.text.count("alert(1)") >= 8  # it is there, as text
    plain = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert EVIL not in plain and html.escape(EVIL) in plain


def test_given_answers_are_not_counted(tmp_path):
    mask = box(3, 4, 10, 10)
    records = [question(0, [(mask, mask)], reason="given")]
    text = write_report(write_run(tmp_path, records, mode="given", benchmark="refcoco"))
    assert "The answers were given" in text and "| all | given | none |" in text
    assert "questions by number of targets" not in read_page(tmp_path).text


def test_published_scores_of_the_same_mode_are_compared(tmp_path):
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
    unpublished = write_report(write_run(tmp_path / "d", records, benchmark="shapes", split="test"))
    assert "Published" not in unpublished
