"""Histograms and the IoU of a question."""

from __future__ import annotations

from pixellm_jax.report.numbers import make_report, question_iou, read_run
from tests.support.made_up_run import box, question, random_questions, write_run


def test_histograms_count_every_mask_and_question(tmp_path):
    records = random_questions(37, seed=1)
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
