"""Judge questions, the effect of scores on the metrics, judged folders, and the offline judge."""

from __future__ import annotations

import json
import math

import pytest

from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.judge.judge import MAX_CONSECUTIVE_FAILURES, apply_judge, judge_records
from pixellm_jax.evaluation.judge.offline import WordJudge
from pixellm_jax.evaluation.judge.prompt import (
    JudgeDownError,
    JudgeQuestion,
    NotJudgedError,
    make_question,
)
from pixellm_jax.evaluation.judge.report import Price, judge_folder, summarise_judged
from pixellm_jax.evaluation.record import read_records
from pixellm_jax.evaluation.summary import summarise
from tests.support.judging import mask, record


class FixedJudge:
    """Scores by question number; a score that is an exception is raised."""

    name, workers = "fixed", 3

    def __init__(self, scores):
        self.scores, self.read = scores, []

    def score(self, question: JudgeQuestion) -> list[int]:
        self.read.append(question)
        found = self.scores(int(question.question.split()[-1][:-1]))
        if isinstance(found, Exception):
            raise found
        return found

    def describe(self):
        return {"kind": "fixed"}

    def counts(self):
        return {"tokens_in": 500_000, "tokens_out": 10, "scored_tokens_in": 1_000_000}


def test_masks_are_replaced_by_the_descriptions_of_their_matches():
    found = make_question(record(0))
    assert found.answer == (
        "There is a wooden table <target 1: a round wooden table> and a green plant "
        "<target 2: a red cup>."
    )
    assert found.descriptions == ("a round wooden table", "a red cup")
    assert found.truths == (1, 0)


def test_an_unmatched_prediction_shows_nothing():
    found = make_question(record(0, pairs=((0, None, 0, 52), (1, 0, 13, 26), (None, 1, 0, 52))))
    assert found.answer == (
        "There is a wooden table <nothing> and a green plant <target 1: a red cup>."
    )
    assert found.truths == (0,) and found.marker_targets == (None, 0)


def test_united_predictions_are_one_target():
    united = record(0, predicted=(mask(4),), pairs=((0, 1, 52, 52), (None, 0, 0, 26)))
    found = make_question(united)
    assert found.answer.count("<target 1: a round wooden table>") == 2
    assert found.truths == (1,)


def test_nothing_to_judge():
    assert (
        make_question(record(0, predicted=(), pairs=((None, 0, 0, 26), (None, 1, 0, 52)))) is None
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "[SEG] [SEG] [SEG]"}, "3 [SEG] for 2 predicted masks"),
        ({"answer": ""}, "0 [SEG] for 2 predicted masks"),
        ({"descriptions": ()}, "no descriptions"),
    ],
)
def test_records_that_cannot_be_judged(changes, message):
    with pytest.raises(NotJudgedError) as caught:
        make_question(record(0, **changes))
    assert message in str(caught.value)


def test_a_target_below_the_threshold_has_no_intersection():
    judged = record(0, judge={"judge": "x", "scores": [3, 4]})
    assert apply_judge(judged, 4).pairs == ((0, 1, 52, 52), (1, 0, 0, 26))
    assert apply_judge(judged, 3).pairs == judged.pairs
    assert apply_judge(judged, 5).pairs == ((0, 1, 0, 52), (1, 0, 0, 26))
    found = summarise([apply_judge(judged, 4)])
    assert found.giou == 0.5 and found.ciou == 52 / 78 and found.masks == 2


def test_two_empty_masks_do_not_agree_against_the_judge():
    empty = record(
        0,
        truth=(mask(0),),
        predicted=(mask(0),),
        pairs=((0, 0, 0, 0),),
        descriptions=("a cup",),
        judge={"judge": "x", "scores": [1]},
    )
    assert summarise([empty]).giou == 1
    assert summarise([apply_judge(empty, 4)]).giou == 0
    assert summarise([apply_judge(empty, 1)]).giou == 1


def test_a_record_without_scores_is_refused():
    with pytest.raises(ValueError, match="not judged"):
        apply_judge(record(0), 4)
    with pytest.raises(ValueError, match="has no score"):
        apply_judge(record(0, judge={"judge": "x", "scores": [None, 4]}), 4)


def test_scores_reach_their_targets_and_failures_are_separate():
    judge = FixedJudge(lambda n: NotJudgedError("no reply") if n % 3 == 1 else [n % 10 + 1, 7])
    records = [record(n, judge={"judge": "an older one", "scores": [5, 5]}) for n in range(31)]
    missed = ((None, 0, 0, 26), (None, 1, 0, 52))
    records[5] = record(5, predicted=(), answer="Nothing.", pairs=missed)
    calls = []
    found = judge_records(records, judge, advance=lambda: calls.append(1))
    assert found.stopped is None and len(calls) == 31
    assert [one.id for one in found.records] == [one.id for one in records]
    assert found.failures == {f"muse/val/{n}/0": "no reply" for n in range(1, 31, 3)}
    for n, one in enumerate(found.records):
        if n % 3 == 1:
            assert one.judge is None
        elif n == 5:
            assert one.judge == {"judge": "fixed", "scores": [None, None]}
        else:  # the first target of the answer is the second true mask
            assert one.judge == {"judge": "fixed", "scores": [7, n % 10 + 1]}


def test_a_judge_that_is_down_receives_no_more_questions():
    judge = FixedJudge(lambda n: JudgeDownError("wrong key") if n >= 2 else [1, 2])
    found = judge_records([record(n) for n in range(97)], judge)
    assert found.stopped == "wrong key"
    assert len(judge.read) <= 2 + 2 * judge.workers
    assert len(found.failures) + sum(one.judge is not None for one in found.records) == 97


def test_consecutive_failures_end_the_run():
    judge = FixedJudge(lambda n: NotJudgedError("status 500"))
    found = judge_records([record(n) for n in range(97)], judge)
    assert "failed in a row" in found.stopped and "status 500" in found.stopped
    assert len(judge.read) <= MAX_CONSECUTIVE_FAILURES + judge.workers
    assert len(found.failures) == 97


def test_a_bug_in_a_judge_is_neither_score_nor_failure():
    with pytest.raises(ZeroDivisionError):
        judge_records([record(n) for n in range(9)], FixedJudge(lambda n: ZeroDivisionError()))
    with pytest.raises(ValueError, match="from 1 to 10"):
        judge_records([record(n) for n in range(9)], FixedJudge(lambda n: [0, 7]))
    with pytest.raises(ValueError):
        judge_records([record(n) for n in range(9)], FixedJudge(lambda n: [7]))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("It is the red cup [SEG].", 10),
        ("It is a cup [SEG].", 10),
        ("It is the red apple [SEG].", 6),  # 1 + 9 / 2, rounded up
        ("It is the plant [SEG].", 1),
        ("It is [SEG].", 6),  # nothing names it: "hot", "cup" of the question are compared
    ],
)
def test_shared_words(answer, score):
    asked = record(
        0,
        question="Which hot cup is there?",
        answer=answer,
        truth=(mask(2),),
        predicted=(mask(2),),
        pairs=((0, 0, 26, 26),),
        descriptions=("red cup on the left",),
    )
    question = make_question(asked)
    assert WordJudge().score(question) == [score]
    assert WordJudge().score(question) == WordJudge().score(question)


def test_shared_words_of_several_targets():
    assert WordJudge().score(make_question(record(0))) == [10, 1]


@pytest.fixture
def folder(tmp_path):
    records = [record(n, groups=("few",) if n % 2 else ("many",)) for n in range(6)]
    lines = [one.to_json() + "\n" for one in records]
    (tmp_path / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "settings.json").write_text('{"mode": "generated", "benchmark": "muse"}')
    return tmp_path


def test_a_folder_is_judged(folder):
    judge = FixedJudge(lambda n: NotJudgedError("no reply") if n == 5 else [7, 2])
    report = judge_folder(folder, judge, 4, price=Price(2.0, 8.0))
    records = read_records(folder / "questions.jsonl")
    assert [one.judge and one.judge["scores"] for one in records] == [[2, 7]] * 5 + [None]
    assert report.judged == 5 and report.failures == {"muse/val/5/0": "no reply"}
    whole = report.scores["all"]
    assert whole == summarise_judged(records[:5], 4)
    assert (whole.questions, whole.masks) == (5, 10)
    assert (whole.giou, whole.judged_giou) == (0.75, 0.5)
    assert (whole.ciou, whole.judged_ciou) == (65 / 78, 52 / 78)
    assert (whole.score, whole.rejected) == (4.5, 0.5)
    assert report.scores["few"].questions == 2 and report.scores["many"].questions == 3
    assert report.cost == pytest.approx({"run": 1.00008, "scores": 2.0})
    stored = json.loads((folder / "judge.json").read_text())
    assert stored == json.loads(json.dumps(report.to_json()))
    assert stored["judge"] == "fixed" and stored["threshold"] == 4
    assert sorted(path.name for path in folder.iterdir()) == [
        "judge.json",
        "questions.jsonl",
        "settings.json",
    ]


def test_a_judge_without_any_score_changes_nothing(folder):
    judge_folder(folder, WordJudge(), 4)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="no answer was judged: wrong key"):
        judge_folder(folder, FixedJudge(lambda n: JudgeDownError("wrong key")), 4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_record_of_a_running_evaluation_is_lost(folder):
    path = folder / "questions.jsonl"

    def write_on(n):
        if n == 3:
            with path.open("a", encoding="utf-8") as file:
                file.write(record(99).to_json() + "\n")
        return [1, 1]

    with pytest.raises(InputError, match="changed while it was judged"):
        judge_folder(folder, FixedJudge(write_on), 4)
    assert [one.judge for one in read_records(path)] == [None] * 7


def test_scores_of_nothing_are_null(folder):
    empty = record(0, predicted=(), answer="", pairs=((None, 0, 0, 26), (None, 1, 0, 52)))
    (folder / "questions.jsonl").write_text(empty.to_json() + "\n")
    report = judge_folder(folder, WordJudge(), 4)
    assert math.isnan(report.scores["all"].score) and report.scores["all"].judged_giou == 0
    assert json.loads((folder / "judge.json").read_text())["scores"]["all"]["score"] is None


def test_folders_that_cannot_be_judged_are_refused(folder):
    with pytest.raises(InputError, match="threshold 11"):
        judge_folder(folder, WordJudge(), 11)
    (folder / "settings.json").write_text('{"mode": "given"}')
    with pytest.raises(InputError, match="given to the model"):
        judge_folder(folder, WordJudge(), 4)
    (folder / "settings.json").write_text('{"mode": "generated"}')
    (folder / "questions.jsonl").write_text(record(0, descriptions=()).to_json() + "\n")
    with pytest.raises(InputError, match="no question has descriptions"):
        judge_folder(folder, WordJudge(), 4)
    (folder / "questions.jsonl").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        judge_folder(folder, WordJudge(), 4)
