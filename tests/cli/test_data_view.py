"""`pixellm data-view`: the page shows what the model receives."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.loader import ToSample
from data_pipeline.sources import SOURCES
from data_pipeline.storage.builders import prepare
from data_pipeline.storage.stored import find_splits
from pixellm_jax.cli.main import main
from pixellm_jax.text.prompt import IMAGE_TOKEN
from pixellm_jax.weights import checkpoint
from tests.support.pages import Page, decode_image


@pytest.fixture(scope="module")
def prepared(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    wanted = (("muse", "train"), ("ReasonSeg", "val"), ("cocostuff", "train"))
    for name, split in (*wanted, ("llava_instruct", "train")):
        prepare(SOURCES[name].source, split, data_root, out)
    return out


@pytest.fixture
def view(prepared: Path, tmp_path: Path, capsys) -> Callable[..., Page]:
    def view(*arguments: object) -> Page:
        out = tmp_path / "page.html"
        options = [str(argument) for argument in arguments]
        assert main(["data-view", "--data", str(prepared), "--out", str(out), *options]) == 0
        assert capsys.readouterr().out.startswith(f"{out}: ")
        return Page(out.read_text(encoding="utf-8"))

    return view


def images(page: Page) -> list[np.ndarray]:
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    return [decode_image(link) for link in page.links]


def test_page_is_self_contained(view):
    page = view("--count", 9)
    assert page.tags.count("article") == 9
    assert "script" not in page.tags and "link" not in page.tags
    assert {image.shape for image in images(page)} == {(448, 448, 3)}
    assert len(page.links) == 18


def test_same_seed_same_page(view):
    first = view("--count", 5, "--seed", 3)
    assert view("--count", 5, "--seed", 3).text == first.text
    assert view("--count", 5, "--seed", 4).text != first.text


def test_every_example_is_shown_once(view, prepared):
    page = view("--dataset", "ReasonSeg", "--count", 100)
    stored = find_splits(prepared, dataset="ReasonSeg")[0]
    assert page.tags.count("article") == len(stored)
    for example in stored:
        assert page.text.count(f"ReasonSeg/val/{example.key}") == 1


def test_padding_is_hatched_and_masks_are_drawn(view, prepared):
    page = view("--dataset", "cocostuff", "--count", 100)
    shown = images(page)
    for with_masks, plain in zip(shown[::2], shown[1::2], strict=True):
        empty = (plain < 8).all(axis=(1, 2)) if (plain[-1] < 8).all() else (plain < 8).all((0, 2))
        padded = with_masks[empty] if (plain[-1] < 8).all() else with_masks[:, empty]
        assert not padded.size or 100 < padded.mean() < 160
        assert (
            np.abs(with_masks.astype(int) - plain)[~empty if len(empty) == 448 else ...].max() > 50
        )


def test_tokens_equal_the_batch(view, prepared, tiny):
    arguments = ("--dataset", "muse", "--count", 40, "--seed", 5, "--checkpoint", tiny.jax)
    page = view(*arguments, "--length", 2048)
    config = checkpoint.read_config(tiny.jax)
    vocabulary = checkpoint.read_vocabulary(tiny.jax, config)
    data = DataConfig(length=2048, seed=5)
    (stored,) = find_splits(prepared, dataset="muse")
    draw = ToSample(vocabulary, data, config)
    rows = {example.key: draw.map_with_index(i, example).row for i, example in enumerate(stored)}
    counts = re.findall(r"the sequence: (\d+) of 2048 positions; (\d+) supervised", page.text)
    assert sorted((int(a), int(b)) for a, b in counts) == sorted(
        (int((row.segment >= 0).sum()), int(row.loss_mask.sum())) for row in rows.values()
    )
    names = {index: token.replace("▁", " ") for token, index in vocabulary.ids.items()}
    for row in rows.values():
        ids = [int(i) for i in row.tokens[row.segment >= 0] if i != IMAGE_TOKEN]
        before, after = (
            "".join(names[i] for i in part)
            for part in (
                ids[: ids.index(vocabulary.im_start) + 1],
                ids[ids.index(vocabulary.im_end) :],
            )
        )
        assert f"{before}image, {config.image_tokens} positions{after}" in page.text
    learnt = sum(kind == "learnt" for kind in page.classes)
    assert learnt == sum(int(row.loss_mask.sum()) for row in rows.values())


def test_conversations_over_budget_are_marked(view, tiny):
    arguments = ("--dataset", "muse", "--count", 40, "--checkpoint", tiny.jax)
    assert "over budget" not in view(*arguments, "--length", 4096, "--targets", 100).text
    page = view(*arguments, "--length", 600, "--targets", 3)
    assert "over budget: left out" in page.text
    assert any(kind == "talk dropped" for kind in page.classes)


def test_evaluation_leaves_the_answer_open(view, tiny):
    for more in ((), ("--checkpoint", tiny.jax)):
        page = view("--dataset", "muse", "--evaluation", "--count", 40, *more)
        assert "the model answers" in page.text and "to be found: " in page.text
    assert "the sequence: " in view("--evaluation", "--count", 60, "--checkpoint", tiny.jax).text


BAD = [
    (["--count", "0"], "--count must be at least 1"),
    (["--seed", "-1"], "--seed at least 0"),
    (["--length", "0"], "length=0 must be at least 1"),
    (["--dataset", "refcoco"], "has no refcoco/*"),
    (["--checkpoint", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(b) for b, _ in BAD])
def test_bad_options_are_refused(arguments, message, prepared, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["data-view", "--data", str(prepared), "--out", str(out), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
    assert not out.exists()


def test_unwritable_page_is_refused(prepared, tmp_path, capsys):
    out = tmp_path / "no" / "page.html"
    assert main(["data-view", "--data", str(prepared), "--out", str(out), "--count", "1"]) == 2
    assert "cannot write here" in capsys.readouterr().err
