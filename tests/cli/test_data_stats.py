"""`pixellm data-stats`: the numbers are those of the data, the figure is a figure."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.example import Example, Target, Turn
from data_pipeline.formats.masks import encode
from data_pipeline.sources import SOURCES
from data_pipeline.statistics import Statistics, render_figure
from data_pipeline.storage.builders import prepare
from pixellm_jax.cli.main import main


@pytest.fixture(scope="module")
def prepared(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    for name, split in (("muse", "val"), ("grefcoco", "train"), ("llava_instruct", "train")):
        prepare(SOURCES[name].source, split, data_root, out)
    return out


def example(targets: int = 0, **fields: object) -> Example:
    mask = np.zeros((10, 20), np.uint8)
    mask[2:6, 5:15] = 1
    made = Example("k", "d", "train", "names", b"", (10, 20), (encode(mask),))
    return made._replace(targets=(Target(("The red cup", "cup"), 0),) * targets, **fields)


def test_counts_by_hand():
    statistics = Statistics()
    turns = (Turn("Where is it?", "Here {seg}.", (0,)), Turn("And all?", None, (0, 1, 2)))
    statistics.add(example(3, conversations=(turns, turns[:1])))
    statistics.add(example(0, masks=(encode(np.zeros((10, 20), np.uint8)),), conversations=()))
    assert (statistics.images, statistics.questions, statistics.empty) == (2, 3, 1)
    assert statistics.targets == Counter({1: 2, 3: 1, 0: 1})
    assert statistics.names == Counter({"cup": 3})
    assert statistics.words == {
        "phrase": Counter({3: 3}),
        "question": Counter({3: 2, 2: 1}),
        "answer": Counter({2: 2}),
    }
    assert list(statistics.shares) == [pytest.approx(0.2)]
    assert list(statistics.centres) == [pytest.approx(0.4), pytest.approx(0.5)]
    assert statistics.unit == "question"


def test_candidates_count_per_picture():
    statistics = Statistics()
    statistics.add(example(2))
    assert (statistics.unit, statistics.targets) == ("picture", Counter({2: 1}))
    assert "targets per picture" in statistics.describe("d")


def test_table_has_the_published_numbers(prepared, data_root, capsys):
    assert main(["data-stats", "--data", str(prepared / "muse")]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = json.loads((data_root / "COUNTS.json").read_text())["datasets"]["muse_val"]
    numbers = [str(expected[name]) for name in ("images", "questions", "targets")]
    head = ["dataset", "split", "pictures", "questions", "targets", "left", "out"]
    assert lines[0].split() == head
    assert lines[1].split() == ["muse", "val", *numbers, "0"]
    start = lines.index("  targets per question") + 1
    bars = [line.replace("█", " ").split() for line in lines[start:] if "%)" in line]
    assert {bar[0]: int(bar[1]) for bar in bars} == expected["questions_by_target_count"]
    assert any(line.startswith("  words per phrase: mean ") for line in lines)
    assert any(line.endswith("; 0 empty") for line in lines)


@pytest.mark.parametrize(("data", "suffix"), [("muse", "png"), (".", "png"), ("muse", "svg")])
@pytest.mark.parametrize("chosen", ["muse", "llava_instruct", None])
def test_figure(data, suffix, chosen, prepared, tmp_path, capsys):
    out = tmp_path / f"figure.{suffix}"
    options = ["--dataset", chosen] if chosen and data == "." else []
    assert main(["data-stats", "--data", str(prepared / data), "--out", str(out), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    if suffix == "png":
        picture = np.asarray(Image.open(out).convert("L"))
        assert picture.shape == (1200, 2100)
        assert 0.01 < (picture < 250).mean() < 0.6
    else:
        assert out.read_text().lstrip().startswith("<?xml")


def test_bar_of_the_figure():
    """A single dataset of one kind of question: its bar is 100 %."""
    statistics = Statistics()
    for _ in range(3):
        statistics.add(example(3, conversations=((Turn("Where?", "{seg}{seg}", (0, 1)),),)))
    picture = Image.open(io.BytesIO(render_figure({"d": statistics}, "png"))).convert("RGB")
    first = np.asarray(picture)[:600, :700]
    blue = (first == (44, 155, 255)).all(-1)
    rows, columns = np.flatnonzero(blue.any(1)), np.flatnonzero(blue.any(0))
    assert blue[rows[0] : rows[-1], columns[0] : columns[-1]].mean() > 0.95


def test_odd_names_and_empty_data():
    statistics = Statistics()
    odd = Target(("$x^2 <b> " + "é" * 60, "\u4e2d"), 0)
    statistics.add(example()._replace(targets=(odd, odd._replace(phrases=()))))
    assert render_figure({"a$b": statistics, "c": Statistics()}, "png")[:4] == b"\x89PNG"
    assert render_figure({"c": Statistics()}, "png")[:4] == b"\x89PNG"


BAD = [
    (["--out", "figure.gif"], "figure.gif: a figure is one of .png, .pdf, .svg"),
    (["--out", "nowhere/figure.png"], "no place for a file"),
    (["--dataset", "refcoco"], "has no refcoco/*, it has grefcoco/train, llava_instruct/train, mu"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(b) for b, _ in BAD])
def test_refuses(arguments, message, prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data-stats", "--data", str(prepared), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_an_extra(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["data-stats", "--data", str(prepared / "muse")]
    assert main([*arguments, "--out", str(tmp_path / "x.png")]) == 2
    assert "pip install 'pixellm_jax[figures]'" in capsys.readouterr().err
    assert main(arguments) == 0
