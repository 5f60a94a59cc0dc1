"""Docstrings are plain technical English: the worst turns of an older private style are refused."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "data_pipeline", "pixellm_jax", "scripts")
MODULES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))

REFUSED = {
    r"go(es|ing)? on": "resumes, continues",
    r"so many": "the number",
    r"(that|those) of (the|an?)": "repeat the noun",
    r"those of": "repeat the noun",
    r"anew": "again",
    r"from nothing": "from scratch",
}
"""Turns that are refused anywhere in a docstring, and what to write."""

FIRST_WORDS = ("As", "How", "Into", "Of", "Such", "That", "Those", "What", "Where", "Which")
"""Words that cannot begin a summary: it is an imperative sentence or a noun phrase."""


def faults(source: str) -> list[str]:
    """Every refused turn of the docstrings in `source`, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                found += [f"line {node.lineno}: {fault}" for fault in text_faults(text)]
    return found


def text_faults(text: str) -> list[str]:
    """The refused turns of one docstring. Code in backticks and quotations are not looked at."""
    text = re.sub(r'`[^`]*`|"[^"]*"', "CODE", " ".join(text.split()))
    found = [
        f"{match.group()!r}: write {better!r}"
        for turn, better in REFUSED.items()
        if (match := re.search(rf"\b{turn}\b", text, re.I))
    ]
    if (first := text.partition(" ")[0].rstrip(",:;.")) in FIRST_WORDS:
        found.append(f"the summary begins with {first!r}: write a sentence or a noun phrase")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_plain_english(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "Return the ids of a prompt.",
        "Continuous-batching engine: requests join and leave the running batch at any step.",
        "Resume a run from its last checkpoint.",
        "Return whether a mask has as many pixels as its box.",
        "Key of a picture: its bytes and what is left of them.",
        "Offset of the text that it belongs to, ongoing or not.",
        'Report the key "go on" of `those_of` and of `what goes on`.',
        "Whatever a reader raises.",
    ],
)
def test_accepts(text):
    assert text_faults(text) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Of the config, and of the names.", "begins with 'Of'"),
        ("What ends it.", "begins with 'What'"),
        ("Those that are read together.", "begins with 'Those'"),
        ("That it may\nrun.", "begins with 'That'"),
        ("Start a run that goes on where it ended.", "'goes on'"),
        ("Let others go\n    on.", "'go on'"),
        ("Room for so many new tokens.", "'so many'"),
        ("The mask, and that of the image.", "'that of the'"),
        ("The ids, and those of one row.", "'those of'"),
        ("Make the report anew.", "'anew'"),
        ("Train from nothing.", "'from nothing'"),
    ],
)
def test_refuses(text, fault):
    assert any(fault in found for found in text_faults(text))


def test_docstrings_of_every_kind_are_read():
    source = '''"""Of a file."""
x = 1
"""Of a constant."""
class A:
    """Of a class."""
    def f(self):
        """Of a method."""
        return "Of a string"
'''
    assert len(faults(source)) == 4
