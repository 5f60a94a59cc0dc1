"""Scores of answers in words, by hand."""

from __future__ import annotations

import math

import pytest

from pixellm_jax.evaluation.text_scores import TextScorer, normalise, summarise_texts


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("There are two cups.", "there are 2 cups"),
        ("  The   CAT,\nan apple; a dog! ", "cat apple dog"),
        ("It isn't 1,000.5 km/h", "it isnt 1000.5 km h"),
        ("None", "0"),
        ("Zwei Tassen stehen da.", "zwei tassen stehen da"),
        ("红色的杯子。", "红色的杯子"),
        ("left_hand", "left hand"),
        ("...", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal
    assert normalise(normal) == normal


@pytest.mark.parametrize(
    ("expected", "answer", "exact", "rouge_l"),
    [
        ("There is 1 bus in the image.", "There is one bus in the image", True, 6 / 7),
        ("There is 1 bus in the image.", "There is 1 bus in the image.", True, 1),
        ("a b c d", "a c", False, 2 / 3),  # precision 1, recall 1/2
        ("a b c d", "d c b a", False, 1 / 4),
        ("the cat sat", "the cat sat on the mat", False, 2 / 3),
        ("yes", "no", False, 0),
        ("yes", "", False, 0),
        ("", "", True, 0),
        ("红色的杯子", "红色的杯子", True, 1),
        ("cups are red", "cup is red", False, 1 / 3),  # no stemming
    ],
)
def test_score(expected, answer, exact, rouge_l):
    found = TextScorer().score(expected, answer)
    assert found.exact is exact
    assert found.rouge_l == pytest.approx(rouge_l, abs=1e-12)


def test_ascii_text_scores_as_the_package_itself():
    from rouge_score.rouge_scorer import RougeScorer

    own, theirs = TextScorer(), RougeScorer(["rougeL"])
    texts = [
        "The picture shows 1 person, and 2 buses; left_hand isn't there.",
        "In the background there is dirt, road (sky) & wall - shows 2 persons.",
        "A_b 3.5 C-d e's",
    ]
    for expected in texts:
        for answer in texts:
            assert own.score(expected, answer).rouge_l == pytest.approx(
                theirs.score(expected, answer)["rougeL"].fmeasure, abs=1e-12
            )


def test_summary():
    pairs = [
        ("It is a red bus.", "It is a red bus."),
        ("It is a red bus.", "It is [SEG]."),
        ("It is a red bus.", "bus"),
        ("The bus [SEG] is red.", "The bus [SEG] is red."),
    ]
    found = summarise_texts(TextScorer().score_all(pairs))
    assert found.answers == 4
    assert found.exact == 0.5
    # The second: "it is seg" shares "it is": 2/3 and 2/5. The third: 1 and 1/5.
    assert found.rouge_l == pytest.approx((1 + 1 / 2 + 1 / 3 + 1) / 4)
    assert found.length == (5 + 3 + 1 + 5) / 20
    assert found.marked == 0.25


def test_nothing():
    found = summarise_texts([])
    assert found.answers == 0
    assert all(map(math.isnan, found[1:]))
