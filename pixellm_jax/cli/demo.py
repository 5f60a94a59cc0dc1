"""`pixellm demo`: a shipped model answers questions about scenes it has never seen."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from data_pipeline.sources.shapes.dataset import Shapes
from pixellm_jax.errors import InputError
from pixellm_jax.experiments import shapes_training
from pixellm_jax.experiments.shapes_page import Tile, write_page
from pixellm_jax.experiments.shapes_quiz import (
    Reply,
    Scene,
    Summary,
    answer_all,
    choose,
    number_markers,
    summarise,
)
from pixellm_jax.files import whole_folder
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.report.charts import Curve, ReferenceLine, render_curves
from pixellm_jax.weights.checkpoint import SHAPES_MODEL

RECORD, PAGE, MODEL = "demo.json", "index.html", "model"
RESULTS = (RECORD, PAGE, MODEL)
"""What a demo's folder holds; a folder that holds anything else is never replaced."""

LONGEST_ANSWER = 64
"""New tokens; six targets need about 55."""

FEWEST_THINGS = 4
"""Of a scene that the shipped model is shown."""

HELD_OUT = 64
"""Scenes that a trained model is asked about, at least."""

EXAMPLES = """examples:
  pixellm demo
  pixellm demo --scenes 20 --seed 3 --out more
  pixellm demo --train

Nothing is downloaded. The folder gets index.html, which any browser opens offline, and demo.json,
the same in numbers; with --train also model/, a checkpoint that --checkpoint takes.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the options."""
    parser = commands.add_parser(
        "demo",
        help="watch a small model answer, or train one in minutes; no download",
        description="Asks the shipped model about drawn scenes that it has never seen, prints the "
        "answers and writes a page with pictures, masks and scores.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("pixellm_demo"),
        metavar="DIR",
        help="folder of the page (pixellm_demo)",
    )
    parser.add_argument("--scenes", type=int, default=8, metavar="N", help="how many (8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (0)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="another model of shapes (the shipped one)"
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="train a smaller model on simpler scenes first, from nothing: about 3 minutes",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Asks, prints and writes the page."""
    if options.scenes < 1 or options.seed < 0:
        raise InputError("--scenes must be at least 1 and --seed at least 0")
    if options.train and options.checkpoint is not None:
        raise InputError("--train begins from nothing: leave out --checkpoint, or --train")
    with whole_folder(options.out, replaces=RESULTS) as folder:
        (_train if options.train else _show)(options, folder)
    print(options.out / PAGE)


def _show(options: argparse.Namespace, folder: Path) -> None:
    """What the shipped model, or that of a checkpoint, answers."""
    predictor = _load(options.checkpoint)
    scenes = choose(Shapes(split="test"), options.scenes, seed=options.seed, fewest=FEWEST_THINGS)
    begin = time.perf_counter()
    replies = answer_all(predictor, scenes)
    seconds = time.perf_counter() - begin
    _print(scenes, replies)
    summary = summarise(reply for own in replies for reply in own)
    print(_sentence(summary))
    count = _parameters(predictor)
    page = write_page(
        "PixelLM answers in words and masks",
        f"A model of {count / 1e6:.1f} million parameters, which began from nothing and has seen "
        f"only drawn scenes, answers {summary.questions} questions about {len(scenes)} scenes that "
        "are not among those it was trained on. Every number in a text is a mask, in its colour.",
        _tiles(summary),
        zip(scenes, replies, strict=True),
        foot=f"The scenes were chosen by their kinds of questions, before they were answered, with "
        f"seed {options.seed}. Answers and masks took {seconds:.0f} s, compilation included.",
    )
    _write(folder, page, summary, scenes, replies, {})


def _train(options: argparse.Namespace, folder: Path) -> None:
    """What a model answers that is trained now, and how it learned."""
    shapes = Shapes(split="test", level=shapes_training.LEVEL, questions=shapes_training.QUESTIONS)
    scenes = choose(shapes, max(options.scenes, HELD_OUT), seed=options.seed, fewest=2)
    trained = shapes_training.train(folder / MODEL, seed=options.seed)
    steps, gious = trained.steps, trained.gious
    print(f"{steps} steps in {trained.seconds:.0f} s, from nothing; gIoU on held-out scenes:")
    print(f"  {gious[0][1]:.3f}  the untrained model")
    print(f"  {trained.constant:.3f}  the best constant mask")
    print(f"  {gious[-1][1]:.3f}  the trained model, its words given")
    predictor = Predictor.load(folder / MODEL, max_new_tokens=LONGEST_ANSWER)
    replies = answer_all(predictor, scenes)
    summary = summarise(reply for own in replies for reply in own)
    print(f"  {summary.scores.giou:.3f}  the trained model, in its own words\n")
    shown = slice(options.scenes)
    _print(scenes[shown], replies[shown])
    print(_sentence(summary))
    page = write_page(
        f"PixelLM, trained in {trained.seconds / 60:.1f} minutes",
        f"A model of {_parameters(predictor) / 1e6:.1f} million parameters began from nothing and "
        f"saw {steps * shapes_training.DATA.batch} drawn scenes, then answered {summary.questions} "
        f"questions about {len(scenes)} others; {len(scenes[shown])} of those are below.",
        [
            *_tiles(summary)[:3],
            Tile(f"{gious[0][1]:.3f}", "gIoU of the untrained model"),
            Tile(f"{trained.constant:.3f}", "gIoU of the best constant mask"),
        ],
        zip(scenes[shown], replies[shown], strict=True),
        plots=[
            render_curves("loss", [Curve(trained.losses, "var(--line)")], x_label="step"),
            render_curves(
                "gIoU on held-out scenes",
                [Curve(gious, "var(--line)", markers=True)],
                x_label="step",
                reference_lines=[ReferenceLine(trained.constant, "best constant mask")],
                y_max=1.0,
            ),
        ],
        foot="The curve of gIoU is measured with the words of the answers given; the number at the "
        "top is measured on other scenes, with the model's own words.",
    )
    curves = {"losses": trained.losses, "gious": gious, "constant": trained.constant}
    more = {"training": {**curves, "seconds": trained.seconds}}
    _write(folder, page, summary, scenes, replies, more)


def _load(checkpoint: Path | None) -> Predictor:
    if checkpoint is None and not SHAPES_MODEL.is_dir():
        raise InputError(
            f"{SHAPES_MODEL}: the shipped model is not there; install the package again, train a "
            "model with `pixellm demo --train`, or name one with --checkpoint"
        )
    return Predictor.load(checkpoint or SHAPES_MODEL, max_new_tokens=LONGEST_ANSWER)


def _parameters(predictor: Predictor) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(predictor.model)))


def _print(scenes: Sequence[Scene], replies: Sequence[Sequence[Reply]]) -> None:
    for scene, own in zip(scenes, replies, strict=True):
        print(f"Scene {scene.number}")
        for reply in own:
            print(f"  Q  {reply.question.question}")
            print(f"  A  {_numbered(reply) or '(no words)'}")
            print(f"     {_judged(reply)}")
        print()


def _numbered(reply: Reply) -> str:
    """The answer with the numbers of its targets: "The red cross [1]."."""
    texts = number_markers(reply.text, reply.answer.markers.tolist())
    return texts[0] + "".join(f"[{i + 1}]{text}" for i, text in enumerate(texts[1:]))


def _judged(reply: Reply) -> str:
    """IoU of the answer and of its targets, in words."""
    if not reply.marks:
        return "right: there is none"
    return f"IoU {reply.giou:.2f}  ({', '.join(mark.note for mark in reply.marks)})"


def _sentence(summary: Summary) -> str:
    return (
        f"{summary.questions} questions: gIoU {summary.scores.giou:.3f}, "
        f"cIoU {summary.scores.ciou:.3f}; {summary.right_number} answers with the right number of "
        f"targets, {summary.absent_right} of {summary.absent} right where there is none"
    )


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


def _write(
    folder: Path,
    page: str,
    summary: Summary,
    scenes: Iterable[Scene],
    replies: Iterable[Sequence[Reply]],
    more: dict[str, Any],
) -> None:
    record = {
        "giou": summary.scores.giou,
        "ciou": summary.scores.ciou,
        **summary._asdict(),
        **more,
        "replies": [
            {
                "scene": scene.number,
                "kind": reply.question.kind,
                "question": reply.question.question,
                "answer": reply.text,
                "right_answer": reply.expected,
                "iou": [mark.iou for mark in reply.marks],
            }
            for scene, own in zip(scenes, replies, strict=True)
            for reply in own
        ],
    }
    del record["scores"]
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page, encoding="utf-8")
