"""The documents name existing files and cited notes, and their Python compiles."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CI = ROOT / ".ci" / "run"
FOLDERS = ("configs", "data_pipeline", "pixellm_jax", "scripts", "tests")
MODULES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))


@pytest.mark.parametrize("document", [*DOCUMENTS, CI], ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document):
    text = document.read_text(encoding="utf-8")
    named = set(
        re.findall(r"(?:tests|docs|scripts|configs|pixellm_jax|data_pipeline)/[\w/]+\.\w+", text)
    )
    named |= {
        str((document.parent / link).resolve().relative_to(ROOT))
        for link in re.findall(r"\]\(([\w./-]+)\)", text)
    }
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_compile(document):
    for block in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.S):
        ast.parse(block)


NOTES = ROOT / "docs" / "reference_notes.md"
# "docs/reference_notes.md 4.7, 5.5, M1": section numbers and the names of faults.
CITATION = re.compile(r"reference_notes\.md[\s#]+((?:(?:\d+\.\d+|[DTMI]\d+)(?:,\s+(?:and\s+)?)?)+)")
NUMBER = re.compile(r"\d+\.\d+|[DTMI]\d+")


def cited_numbers(text: str) -> list[str]:
    """Every section or fault of the reference notes that `text` cites."""
    return [number for cited in CITATION.findall(text) for number in NUMBER.findall(cited)]


def test_reference_notes_have_every_number_that_is_cited():
    notes = NOTES.read_text(encoding="utf-8")
    numbers = re.findall(r"^(?:### |\| )(\d+\.\d+|[DTMI]\d+) ", notes, re.M)
    assert len(set(numbers)) == len(numbers) > 50
    cited = {
        (str(path.relative_to(ROOT)), number)
        for path in [*DOCUMENTS, *MODULES]
        if path != Path(__file__)
        for number in cited_numbers(path.read_text(encoding="utf-8"))
    }
    assert len(cited) > 20
    assert sorted(place for place in cited if place[1] not in numbers) == []


def test_no_file_cites_notes_outside_the_repository():
    name = "reference" + ".md"
    dead = [
        str(path.relative_to(ROOT))
        for path in [*DOCUMENTS, *MODULES]
        if re.search(rf"(?<![\w/]){name}", path.read_text(encoding="utf-8"))
    ]
    assert dead == []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("(docs/reference_notes.md 4.7, 5.5).", ["4.7", "5.5"]),
        ("docs/reference_notes.md\n5.6, M9): ours", ["5.6", "M9"]),
        ("reference_notes.md D12 and no other, 7.1", ["D12"]),
        ("reference_notes.md is a file", []),
    ],
)
def test_finds_citations(text, numbers):
    assert cited_numbers(text) == numbers


def test_architecture_lists_the_files_of_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    sections = {
        folder: set(re.findall(r"^\| `(\w+\.py)` \|", section, re.M))
        for folder, section in re.findall(r"^### `([\w/]+)/`(.*?)(?=^##)", text, re.M | re.S)
    }
    folders = [path.parent for path in MODULES if path.name == "__init__.py"]
    for folder in folders:
        name = str(folder.relative_to(ROOT))
        if name.startswith("tests") or name == "pixellm_jax/cli":
            continue  # one sub-command per file
        files = {path.name for path in folder.glob("*.py") if not path.name.startswith("__")}
        assert sections.get(name, set()) == files, f"correct the table of {name}"
    assert sections.keys() >= {"pixellm_jax", "pixellm_jax/model", "data_pipeline/storage"}


def test_architecture_names_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+/[\w/]+\.py)`", text))
    missing = [
        name
        for name in named
        if not (ROOT / name).is_file() and not (ROOT / "pixellm_jax" / name).is_file()
    ]
    assert missing == []
