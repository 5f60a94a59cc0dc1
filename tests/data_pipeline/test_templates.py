from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import templates
from data_pipeline.example import KINDS
from data_pipeline.templates import (
    Choices,
    choices,
    enumerate_words,
    fill,
    fill_each,
    fill_question,
)

LISTS = {name: value for name, value in vars(templates).items() if name.isupper()}
SAMPLED = ("names", "short", "long", "muse")


def placeholders(template: str) -> list[str]:
    return re.findall(r"\{(.*?)\}", template)


def test_numbers_of_templates():
    sizes = {name: len(value) for name, value in LISTS.items() if isinstance(value, tuple)}
    assert sizes == {
        "SHORT_QUESTIONS": 4,
        "MORE_SHORT_QUESTIONS": 14,
        "LONG_QUESTIONS": 2,
        "MORE_LONG_QUESTIONS": 5,
        "EXPLANATORY_QUESTIONS": 3,
        "ANSWERS": 5,
        "SEPARATE_ANSWERS": 3,
        "JOINT_ANSWERS": 11,
        "MUSE_SEPARATE_ANSWERS": 1,
        "MUSE_JOINT_ANSWERS": 8,
    }


def test_templates_are_distinct_and_well_formed():
    for name, value in LISTS.items():
        rows = value if isinstance(value, tuple) else (value,)
        assert len(set(rows)) == len(rows)
        for template in rows:
            expected = "seg" if "ANSWERS" in name else "name" if "SHORT" in name else "text"
            assert placeholders(template).count(expected) == 1
            assert set(placeholders(template)) <= {expected, "name"}
            assert "\n" not in template and "<image>" not in template
            assert template == template.strip()


@pytest.mark.parametrize("kind", SAMPLED)
def test_choices_of_each_kind(kind):
    plain, expanded = choices(kind, expanded=False), choices(kind, expanded=True)
    more = 5 if kind in ("long", "muse") else 14
    assert plain.questions == expanded.questions[:-more]
    assert plain[1:] == expanded[1:]
    everything = itertools.chain(*plain, *expanded)
    fields = {field for template in everything for field in placeholders(template)}
    assert fields <= {"seg", "name", "text"}
    assert bool(plain.answers) == (kind != "muse")
    assert bool(plain.separate) == bool(plain.joint) == (kind in ("names", "muse"))
    assert bool(plain.explanatory) == (kind in ("short", "long"))


def test_choices_differ_between_kinds():
    names, short, long, muse = (choices(kind, expanded=True) for kind in SAMPLED)
    assert names.questions == short.questions and long.questions == muse.questions
    assert [len(names.questions), len(long.questions)] == [18, 7]
    assert [len(names.separate), len(muse.separate)] == [3, 1]
    assert [len(names.joint), len(muse.joint)] == [11, 8]
    assert all(
        isinstance(value, tuple) for kind in SAMPLED for value in choices(kind, expanded=True)
    )
    assert choices("names", expanded=True) == names
    assert isinstance(names, Choices)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(SAMPLED)) + ["nonsense"])
def test_kinds_without_templates(kind):
    with pytest.raises(ValueError, match=kind):
        choices(kind, expanded=False)


@given(st.text(), st.text())
def test_placeholders_in_values_stay_unchanged(name, seg):
    assert fill("a {name} is {seg}.", name=name, seg=seg) == "a " + name + " is " + seg + "."


def test_fill():
    braces = r"{seg} {0} {name} {} { \1 %s"
    assert fill("{name}: {seg}", name=braces, seg="S") == f"{braces}: S"
    assert fill("{seg}", name="unused", seg="S") == "S"
    with pytest.raises(KeyError):
        fill("{name}", seg="S")


def test_fill_each():
    assert fill_each("{name} is {seg}.", ["A"], seg="S") == "A is S."
    assert fill_each("{name} is {seg}.", ["A.", "b {seg}"], seg="S") == "A. is S and b {seg} is S."
    assert fill_each("{seg}.", ["a", "b", "c"], seg="S") == "S, S and S."


def test_fill_question():
    assert fill_question("Is it {name}?", "The {Cat}") == "Is it the {cat}?"
    assert fill_question("{text} Show it.", "The {Cat}?") == "The {Cat}? Show it."


def test_enumerate_words():
    assert enumerate_words(["a"]) == "a"
    assert enumerate_words(["a", "b"]) == "a and b"
    assert enumerate_words(["a", "b", "c"]) == "a, b and c"
    assert enumerate_words(["a", "b", "c", "d"]) == "a, b, c and d"
