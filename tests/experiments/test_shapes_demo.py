"""The shapes demo: scene selection, scoring, the page, the command and its training."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest

from data_pipeline.sources.shapes.dataset import Shapes
from data_pipeline.sources.shapes.questions import KINDS, Question
from data_pipeline.sources.shapes.tokenizer import FOLDER
from pixellm_jax.cli.main import main
from pixellm_jax.experiments import shapes_demo, shapes_recipe, shapes_training
from pixellm_jax.experiments.shapes_page import render_demo
from pixellm_jax.experiments.shapes_quiz import (
    Reply,
    Scene,
    score_answer,
    select_scenes,
    split_at_markers,
    summarise,
)
from pixellm_jax.images.overlay import colours
from pixellm_jax.inference.answer import Answer
from pixellm_jax.report.charts import Curve, render_curves
from pixellm_jax.report.html import Tile
from pixellm_jax.weights import checkpoint
from tests.support.pages import Page


def boxes(*places: tuple[int, int, int, int], side: int = 20) -> np.ndarray:
    masks = np.zeros((len(places), side, side), bool)
    for mask, (top, left, bottom, right) in zip(masks, places, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def made_answer(text: str, masks: np.ndarray) -> Answer:
    markers = [match.span() for match in re.finditer(r"\[SEG\]", text)]
    assert len(markers) == len(masks)
    count = len(masks)
    return Answer(
        text=text,
        masks=masks,
        scores=np.ones(count, np.float32),
        presence=np.ones(count, np.float32),
        kept=np.ones(count, bool),
        spans=np.zeros((count, 2), np.int32),
        markers=np.asarray(markers, np.int32).reshape(-1, 2),
        finish_reason="stop",
        num_tokens=9,
        num_steps=9,
    )


THINGS = boxes((0, 0, 4, 4), (0, 10, 4, 14), (10, 10, 18, 18))
SCENE = Scene(7, np.full((20, 20, 3), 90, np.uint8), THINGS, ())
BOTH = Question("names", "Where are a < b?", "Here are a {seg} and b {seg}.", (0, 2))
NONE = Question("absent", "Where is c?", "There is no such object.", ())


def partly_wrong() -> Reply:
    """The second target first, exactly; a quarter of the first; and a mask of no target."""
    masks = boxes((10, 10, 18, 18), (0, 0, 2, 2), (15, 0, 20, 5))
    return score_answer(SCENE, BOTH, made_answer("here b [SEG] and a [SEG] [SEG].", masks))


# Scoring


def test_targets_are_matched_in_any_order():
    reply = partly_wrong()
    np.testing.assert_array_equal(reply.predicted, reply.answer.masks)
    np.testing.assert_array_equal(reply.truth[:2], THINGS[[2, 0]])
    assert not reply.truth[2].any()
    assert [target.iou for target in reply.target_scores] == pytest.approx([1, 0.25, 0])
    assert [target.note for target in reply.target_scores] == [
        "IoU 1.00",
        "IoU 0.25",
        "one too many",
    ]
    assert reply.giou == pytest.approx(1.25 / 3)
    assert not reply.right_number


def test_missed_targets_come_last():
    reply = score_answer(SCENE, BOTH, made_answer("Here are b [SEG].", THINGS[2:]))
    np.testing.assert_array_equal(reply.truth, THINGS[[2, 0]])
    assert reply.predicted[0].sum() == 64 and not reply.predicted[1].any()
    assert [target.note for target in reply.target_scores] == ["IoU 1.00", "missed"]
    assert reply.giou == pytest.approx(0.5)


@pytest.mark.parametrize(("count", "giou"), [(0, 1), (1, 0)])
def test_question_without_targets_scores_one_without_masks(count, giou):
    answer = made_answer("There is" + " [SEG]" * count, THINGS[:count])
    reply = score_answer(SCENE, NONE, answer)
    assert reply.giou == giou
    assert reply.right_number == (count == 0)
    assert len(reply.target_scores) == count


def test_words_are_compared_without_case_and_punctuation():
    texts = {
        "here are a [SEG] and b [SEG].": True,
        "Here are a [SEG], and b [SEG]": True,
        "here are b [SEG] and a [SEG].": False,
    }
    for text, same in texts.items():
        reply = score_answer(SCENE, BOTH, made_answer(text, THINGS[:2]))
        assert reply.same_words == same
    assert reply.text == "Here are b [SEG] and a [SEG]."
    assert reply.expected == "Here are a [SEG] and b [SEG]."


def test_summary_counts():
    right = score_answer(SCENE, NONE, made_answer("none", THINGS[:0]))
    wrong = score_answer(SCENE, NONE, made_answer("a [SEG]", THINGS[:1]))
    summary = summarise([partly_wrong(), right, wrong])
    assert summary.scores.giou == pytest.approx(1.25 / 4)
    assert summary.scores.ciou == pytest.approx((64 + 4) / (64 + 16 + 25 + 16))
    assert summary[1:] == (3, 1, 2, 1)


def test_text_between_markers():
    text = "A [SEG] and a [SEG]."
    assert split_at_markers(text, [(2, 7), (14, 19)]) == ["A ", " and a ", "."]
    assert split_at_markers("None.", []) == ["None."]


# Scenes


def test_selected_scenes_are_varied_and_deterministic():
    shapes = Shapes(split="test")
    scenes = select_scenes(shapes, 6, seed=0, min_objects=4)
    numbers = [scene.number for scene in scenes]
    assert len(set(numbers)) == 6
    assert {q.kind for scene in scenes for q in scene.questions} == set(KINDS)
    assert all(len(scene.masks) >= 4 for scene in scenes)
    assert [scene.number for scene in select_scenes(shapes, 6, seed=0, min_objects=4)] == numbers
    assert [scene.number for scene in select_scenes(shapes, 6, seed=1, min_objects=4)] != numbers
    scene = scenes[0]
    drawn = shapes.generate(scene.number)
    assert scene.questions == drawn.questions
    np.testing.assert_array_equal(scene.masks, drawn.scene.masks())
    assert scene.image.shape == (96, 96, 3)


# The page


def test_page_shows_answers_next_to_the_truth():
    replies = [partly_wrong(), score_answer(SCENE, NONE, made_answer("none", THINGS[:0]))]
    chart = render_curves("loss", [Curve([(0.0, 1.0), (5.0, 0.5)], "red")], x_label="step")
    tiles = [Tile("0.5", "score")]
    scenes = [(SCENE, replies)]
    page = Page(render_demo("A & B", "lead", tiles, scenes, plots=[chart], footer="end"))
    assert page.tags.count("article") == 1 and page.tags.count("section") == 2
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.links) == 3  # the scene, and answer and truth of the question with targets
    assert all(link.startswith("data:image/") for link in page.links)
    for text in (
        "A & B",
        "Where are a < b?",
        "Right would be: Here are a and b.",
        "loss",
    ):
        assert text in page.text
    assert "Here b 1 and a 2 3." in page.text
    assert page.text.count("one too many") == 1 and "right: there is none" in page.text


def test_a_chip_has_the_colour_of_its_mask():
    text = render_demo("", "", [], [(SCENE, [partly_wrong()])])
    chips = re.findall(r"background:rgb\((\d+),(\d+),(\d+)\);color:#\w+\">(\d)<", text)
    shown = {int(number): tuple(map(int, rgb)) for *rgb, number in chips}
    assert shown == {i + 1: tuple(colour) for i, colour in enumerate(colours(3).tolist())}


# The baseline of the training


def test_constant_mask_is_the_best_candidate():
    masks = boxes((0, 0, 10, 10), (0, 0, 10, 10), (0, 0, 10, 20))
    best = shapes_training.fit_constant_mask(masks)
    np.testing.assert_array_equal(best, masks[0])
    far = boxes((0, 0, 2, 2), (18, 18, 20, 20), (0, 18, 2, 20))
    np.testing.assert_array_equal(shapes_training.fit_constant_mask(far), far.any(0))


# The command


def test_demo_prints_and_writes(tiny, tmp_path, capfd):
    out = tmp_path / "new" / "demo"
    options = ["demo", "--checkpoint", str(tiny.jax), "--out", str(out), "--scenes", "2"]
    assert main(options) == 0
    printed, err = capfd.readouterr()
    assert err == ""
    lines = printed.splitlines()
    questions = [line[5:] for line in lines if line.startswith("  Q  ")]
    count = 2 * Shapes().questions
    assert len(questions) == count
    assert printed.count("  A  It is [1].") == count
    assert lines[-1] == str(out / "index.html")
    assert lines[-2].startswith(f"{count} questions: gIoU 0.")

    record = json.loads((out / "demo.json").read_text())
    assert [reply["question"] for reply in record["replies"]] == questions
    assert {reply["answer"] for reply in record["replies"]} == {"It is [SEG]."}
    ious = [iou for reply in record["replies"] for iou in reply["iou"]]
    assert record["giou"] == pytest.approx(np.mean(ious), abs=1e-9)
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert page.tags.count("section") == count
    assert all(question in page.text for question in questions)
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "index.html"]

    assert main(options) == 0  # an earlier demo is replaced
    assert capfd.readouterr().out == printed


@pytest.fixture
def refuse(tmp_path, capfd):
    def refuse(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["demo", *map(str, arguments)]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("pixellm demo: ")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return refuse


def test_more_scenes_than_there_are_is_refused(tmp_path, refuse):
    shapes = Shapes(split="test")
    fit = sum(
        len(shapes.generate(i).scene.things) >= shapes_demo.MIN_OBJECTS for i in range(len(shapes))
    )
    assert f"900 scenes are more than the {fit} there are" in refuse(
        "--out", tmp_path / "out", "--scenes", 900
    )


def test_shipped_model_has_the_shapes_tokenizer():
    """The checkpoint is also small enough to ship."""
    files = [path for path in checkpoint.SHAPES_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10 << 20
    shipped, expected = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        for folder in (checkpoint.SHAPES_MODEL / "tokenizer", FOLDER)
    )
    assert shipped == expected


@pytest.mark.slow
def test_shipped_model_reaches_the_scores_of_its_recipe(tmp_path, capfd):
    """Within two minutes of processor time."""
    begin = time.process_time()
    assert main(["demo", "--out", str(tmp_path / "out"), "--scenes", "24"]) == 0
    assert time.process_time() - begin < 120
    record = json.loads((tmp_path / "out" / shapes_demo.RECORD).read_text())
    assert record["giou"] >= 0.85 and record["ciou"] >= 0.85
    assert record["right_number"] >= 0.9 * record["questions"]
    assert record["absent_right"] >= 0.75 * record["absent"] > 4
    capfd.readouterr()


def test_missing_model_is_named(tmp_path, monkeypatch, refuse):
    monkeypatch.setattr(shapes_demo, "SHAPES_MODEL", tmp_path / "no_model")
    line = refuse("--out", tmp_path / "out")
    assert f"{tmp_path / 'no_model'}: the shipped model is not there" in line
    assert "--train" in line and "--checkpoint" in line
    assert "no such folder" in refuse("--out", tmp_path / "out", "--checkpoint", tmp_path / "no")


def test_unrelated_folder_is_kept(tmp_path, refuse):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    assert "there is already a folder" in refuse("--out", tmp_path / "site")
    assert "there is already a file" in refuse("--out", tmp_path / "site" / "index.html", "--train")
    assert (tmp_path / "site" / "index.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scenes", 0], "--scenes must be at least 1"),
        (["--seed", -1], "--seed at least 0"),
        (["--train", "--checkpoint", "x"], "--train starts from scratch"),
    ],
)
def test_options_that_make_no_sense(tmp_path, refuse, options, message):
    assert message in refuse("--out", tmp_path / "out", *options)


@pytest.mark.slow
def test_training_ends_with_a_page_and_a_model(tmp_path, monkeypatch, capfd):
    few = {
        "train.steps": 4,
        "train.log_every": 2,
        "train.evaluate_every": 2,
        "train.evaluate_batches": 1,
        "train.save_every": 4,
    }
    overrides = {**shapes_recipe.DEMO_OVERRIDES, **few}
    monkeypatch.setattr(shapes_recipe, "DEMO_OVERRIDES", overrides)
    monkeypatch.setattr(shapes_training, "BASELINE_SCENES", 20)
    monkeypatch.setattr(shapes_demo, "MIN_HELD_OUT", 3)
    out = tmp_path / "demo"
    assert main(["demo", "--train", "--scenes", "2", "--out", str(out)]) == 0
    printed, _ = capfd.readouterr()
    assert "4 steps in" in printed and "the best constant mask" in printed
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "index.html", "model"]
    record = json.loads((out / "demo.json").read_text())
    training = record["training"]
    assert [step for step, _ in training["losses"]] == [2, 4]
    assert [step for step, _ in training["gious"]] == [0, 2, 4]
    assert 0 < training["constant"] < 0.3
    assert record["questions"] == 3 * shapes_recipe.DEMO_QUESTIONS
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 2 and page.tags.count("article") == 2
    config = checkpoint.read_config(out / "model")
    assert config.language.vocabulary == checkpoint.read_vocabulary(out / "model", config).size
    assert sum(array.size for array in checkpoint.open_arrays(out / "model").values()) < 2e6
