"""The shapes demo: a model answers questions about new scenes; results as a page and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from data_pipeline.sources.shapes.dataset import Shapes
from pixellm_jax.errors import InputError
from pixellm_jax.experiments.recipe import Recipe
from pixellm_jax.experiments.shapes_page import render_demo
from pixellm_jax.experiments.shapes_quiz import Quiz, Scene, Summary, select_scenes
from pixellm_jax.experiments.shapes_recipe import DEMO_LEVEL, DEMO_QUESTIONS
from pixellm_jax.experiments.shapes_training import Trained
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.report.charts import Curve, ReferenceLine, render_curves
from pixellm_jax.report.html import Tile
from pixellm_jax.weights.checkpoint import SHAPES_MODEL

RECORD, PAGE, MODEL = "demo.json", "index.html", "model"
RESULTS = (RECORD, PAGE, MODEL)
"""Contents of a demo's folder; a folder that holds anything else is never replaced."""

MAX_NEW_TOKENS = 64
"""Longest answer; an answer with six targets has about 55 tokens."""

MIN_OBJECTS = 4
"""Objects of a scene that the shipped model is asked about, at least."""

MIN_HELD_OUT = 64
"""Scenes that a newly trained model is asked about, at least."""


def load_predictor(checkpoint: Path | None) -> Predictor:
    """Load a shapes model; None is the shipped one.

    Raises:
        InputError: the checkpoint is missing or damaged.
    """
    if checkpoint is None and not SHAPES_MODEL.is_dir():
        raise InputError(
            f"{SHAPES_MODEL}: the shipped model is not there; install the package again, train a "
            "model with `pixellm demo --train`, or name one with --checkpoint"
        )
    return Predictor.load(checkpoint or SHAPES_MODEL, max_new_tokens=MAX_NEW_TOKENS)


def select_full_scenes(count: int, *, seed: int) -> list[Scene]:
    """Select test scenes of the full level, for the shipped model."""
    return select_scenes(Shapes(split="test"), count, seed=seed, min_objects=MIN_OBJECTS)


def select_simple_scenes(count: int, *, seed: int) -> list[Scene]:
    """Select test scenes as the demo's training has them, at least `MIN_HELD_OUT`."""
    shapes = Shapes(split="test", level=DEMO_LEVEL, questions=DEMO_QUESTIONS)
    return select_scenes(shapes, max(count, MIN_HELD_OUT), seed=seed, min_objects=2)


def answers_page(quiz: Quiz, *, parameters: int, seed: int) -> str:
    """Return the page of a model that was loaded.

    Args:
        quiz: its answers.
        parameters: size of the model.
        seed: seed the scenes were selected with.
    """
    return render_demo(
        "PixelLM answers in words and masks",
        f"A model of {parameters / 1e6:.1f} million parameters, which began from nothing and has "
        f"seen only drawn scenes, answers {quiz.summary.questions} questions about "
        f"{len(quiz.scenes)} scenes that are not among those it was trained on. Every number in a "
        "text is a mask, in its colour.",
        _tiles(quiz.summary),
        zip(quiz.scenes, quiz.replies, strict=True),
        footer="The scenes were chosen by their kinds of questions, before they were answered, "
        f"with seed {seed}. Answers and masks took {quiz.seconds:.0f} s, compilation included.",
    )


def training_page(
    quiz: Quiz, trained: Trained, recipe: Recipe, *, parameters: int, shown: int
) -> str:
    """Return the page of a model that was trained just now.

    Args:
        quiz: its answers.
        trained: its training curves.
        recipe: recipe of the training.
        parameters: size of the model.
        shown: number of scenes on the page, from the first.
    """
    scenes = quiz.scenes[:shown]
    images_seen = trained.steps * recipe.data.batch
    baseline = ReferenceLine(trained.constant, "best constant mask")
    return render_demo(
        f"PixelLM, trained in {trained.seconds / 60:.1f} minutes",
        f"A model of {parameters / 1e6:.1f} million parameters began from nothing and "
        f"saw {images_seen} drawn scenes, then answered {quiz.summary.questions} "
        f"questions about {len(quiz.scenes)} others; {len(scenes)} of those are below.",
        [
            *_tiles(quiz.summary)[:3],
            Tile(f"{trained.gious[0][1]:.3f}", "gIoU of the untrained model"),
            Tile(f"{trained.constant:.3f}", "gIoU of the best constant mask"),
        ],
        zip(scenes, quiz.replies[:shown], strict=True),
        plots=[
            render_curves("loss", [Curve(trained.losses, "var(--line)")], x_label="step"),
            render_curves(
                "gIoU on held-out scenes",
                [Curve(trained.gious, "var(--line)", markers=True)],
                x_label="step",
                reference_lines=[baseline],
                y_max=1.0,
            ),
        ],
        footer="The curve of gIoU is measured with the words of the answers given; the number at "
        "the top is measured on other scenes, with the model's own words.",
    )


def write_results(folder: Path, page: str, quiz: Quiz, trained: Trained | None = None) -> None:
    """Write the page, and the numbers as JSON, into a demo's folder."""
    training: Mapping[str, Any] = {} if trained is None else {"training": _training_record(trained)}
    summary = quiz.summary
    record = {
        "giou": summary.scores.giou,
        "ciou": summary.scores.ciou,
        "questions": summary.questions,
        "right_number": summary.right_number,
        "absent": summary.absent,
        "absent_right": summary.absent_right,
        **training,
        "replies": [
            {
                "scene": scene.number,
                "kind": reply.question.kind,
                "question": reply.question.question,
                "answer": reply.text,
                "right_answer": reply.expected,
                "iou": [target.iou for target in reply.target_scores],
            }
            for scene, replies in zip(quiz.scenes, quiz.replies, strict=True)
            for reply in replies
        ],
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page, encoding="utf-8")


def count_parameters(predictor: Predictor) -> int:
    """Return the number of parameters of a loaded model."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(predictor.model)))


def _training_record(trained: Trained) -> dict[str, Any]:
    return {
        "losses": trained.losses,
        "gious": trained.gious,
        "constant": trained.constant,
        "seconds": trained.seconds,
    }


def _tiles(summary: Summary) -> list[Tile]:
    return [
        Tile(f"{summary.scores.giou:.3f}", "gIoU: the mean over all targets"),
        Tile(f"{summary.scores.ciou:.3f}", "cIoU: over all of their pixels"),
        Tile(
            f"{summary.right_number} of {summary.questions}",
            "answers with the right number of targets",
        ),
        Tile(f"{summary.absent_right} of {summary.absent}", "right where there is no such object"),
    ]
