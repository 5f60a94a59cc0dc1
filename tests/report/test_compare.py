"""Differences of two runs on the questions that both have."""

from __future__ import annotations

import pytest

from pixellm_jax.cli.main import main
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.bootstrap import paired_intervals
from pixellm_jax.evaluation.summary import summarise, tally_record
from pixellm_jax.report.compare import as_markdown, compare, render_comparison
from pixellm_jax.report.numbers import read_run
from tests.support.made_up_run import box, judged, question, random_questions, write_run

MASK = box(3, 4, 10, 10)


def runs(tmp_path, first, second, **settings):
    return (
        read_run(write_run(tmp_path / "a", first)),
        read_run(write_run(tmp_path / "b", second, **settings)),
    )


def test_rows_have_the_scores_of_both_runs(tmp_path):
    first, second = random_questions(41, 1, quality=0.3), random_questions(41, 2, quality=1.0)
    comparison = compare(*runs(tmp_path, first, second))
    rows = {(row.group, row.score): row for row in comparison.rows}
    assert {group for group, _ in rows} == {"all", "few", "many"}
    for group in ("all", "few", "many"):
        members = [
            [r for r in records if group == "all" or group in r.groups]
            for records in (first, second)
        ]
        row = rows[group, "giou"]
        assert (row.first, row.second) == tuple(summarise(records).giou for records in members)
        sums = [[tally_record(record) for record in records] for records in members]
        assert row.difference == paired_intervals(*sums).giou
    assert rows["all", "giou"].significant
    assert rows["all", "giou"].difference.low > 0


def test_order_of_the_records_changes_nothing(tmp_path):
    first, second = random_questions(23, 1), random_questions(23, 2)
    rows = compare(*runs(tmp_path, first, second)).rows
    assert compare(*runs(tmp_path, first, second[::-1])).rows == rows


def test_a_run_does_not_differ_from_itself(tmp_path):
    records = random_questions(23, 1)
    for row in compare(*runs(tmp_path, records, records)).rows:
        assert row.difference[:3] == (0, 0, 0) and not row.significant


def test_only_common_questions_are_compared(tmp_path):
    first, second = random_questions(20, 1), random_questions(20, 2)
    comparison = compare(*runs(tmp_path, first[:15], second[5:]))
    assert len(comparison.pairs) == comparison.rows[0].questions == 10
    assert comparison.rows[0].first == summarise(first[5:15]).giou
    assert "10 questions are in both runs; A has 15, B has 15." in as_markdown(comparison)


def test_nothing_in_common_is_refused(tmp_path):
    with pytest.raises(InputError, match="no question in common"):
        compare(*runs(tmp_path, [question(0)], [question(1)]))


def test_other_data_under_the_same_names_are_refused(tmp_path):
    other = question(0, missed=[box(3, 4, 10, 11)])
    with pytest.raises(InputError, match="other true masks"):
        compare(*runs(tmp_path, [question(0, missed=[MASK])], [other]))


def test_other_modes_are_named(tmp_path):
    records = random_questions(5, 1)
    text = as_markdown(compare(*runs(tmp_path, records, records, mode="given")))
    assert "NOT THE SAME MODE: A is generated, B is given" in text
    assert "| all | generated / given |" in text


def test_other_settings_are_named(tmp_path):
    records = random_questions(5, 1)
    same = as_markdown(compare(*runs(tmp_path, records, records, checkpoint="other", limit=5)))
    assert "Other settings" not in same
    text = as_markdown(compare(*runs(tmp_path, records, records, max_new_tokens=64)))
    assert "Other settings: max_new_tokens None in A, 64 in B." in text


def test_judged_rows_need_the_same_judge(tmp_path):
    bare = [question(n, [(MASK, MASK)]) for n in range(4)]
    first = [judged(record, [9]) for record in bare]
    second = [judged(record, [9 if n else 1]) for n, record in enumerate(bare)]
    rows = {(r.judge, r.score): r for r in compare(*runs(tmp_path, first, second)).rows[:20]}
    assert rows["none", "giou"].difference.score == 0
    assert rows["made-up judge", "giou"].difference.score == -0.25
    assert ("made-up judge", "t_acc") not in rows
    other = [judged(record, [9], "another") for record in bare]
    comparison = compare(*runs(tmp_path, first, other))
    assert {row.judge for row in comparison.rows} == {"none"}
    assert "NOT THE SAME JUDGE: A has made-up judge (threshold 4), B has another" in as_markdown(
        comparison
    )


def test_questions_without_a_judges_scores_are_left_out_of_both(tmp_path):
    bare = [question(n, [(MASK, MASK)]) for n in range(4)]
    first = [judged(record, [9]) for record in bare]
    second = [bare[0], *first[1:]]
    comparison = compare(*runs(tmp_path, first, second))
    assert [row.questions for row in comparison.rows if row.judge != "none"] == [3] * 4
    assert "3 of the questions have scores of the judge" in as_markdown(comparison)


def test_page_has_the_table_and_escapes(tmp_path, capsys):
    first, second = random_questions(11, 1), random_questions(11, 2)
    evil = "<script>alert(1)</script>"
    first = [record._replace(question=evil, answer=f"{evil} {record.answer}") for record in first]
    comparison = compare(*runs(tmp_path, first, second))
    page = render_comparison(comparison)
    assert "<script" not in page and "&lt;script&gt;" in page
    row = comparison.rows[0]
    assert f"<td>{row.first:.4f}</td><td>{row.second:.4f}</td>" in page
    out = tmp_path / "page.html"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    assert f"| {row.first:.4f} | {row.second:.4f} | {row.difference.score:+.4f} [" in (
        capsys.readouterr().out
    )
    assert out.read_text(encoding="utf-8") == page
    assert "11 of the questions are worded differently" in page
