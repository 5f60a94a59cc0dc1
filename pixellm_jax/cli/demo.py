"""`pixellm demo`: a shipped model answers questions about scenes it has never seen."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pixellm_jax.errors import InputError
from pixellm_jax.experiments import shapes_demo
from pixellm_jax.experiments.shapes_quiz import (
    Reply,
    Scene,
    Summary,
    run_quiz,
    split_at_markers,
)
from pixellm_jax.experiments.shapes_recipe import demo_recipe
from pixellm_jax.experiments.shapes_training import train
from pixellm_jax.files import whole_folder
from pixellm_jax.training.memory import keep_freed_memory_on_cpu

EXAMPLES = """examples:
  pixellm demo
  pixellm demo --scenes 20 --seed 3 --out more
  pixellm demo --train

Nothing is downloaded. The folder gets index.html, which any browser opens offline, and demo.json,
the same results in numbers; with --train also model/, a checkpoint that --checkpoint takes.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser.description = (
        "Asks the shipped model about rendered scenes that it has never seen, prints "
        "the answers and writes a page with images, masks and scores."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("pixellm_demo"),
        metavar="DIR",
        help="folder of the page (pixellm_demo)",
    )
    parser.add_argument("--scenes", type=int, default=8, metavar="N", help="number of scenes (8)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of scenes and training (0)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="another shapes model (the shipped one)"
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="first train a smaller model on simpler scenes, from scratch: about 3 minutes",
    )


def run(options: argparse.Namespace) -> None:
    """Ask, print the answers and write the page."""
    if options.scenes < 1 or options.seed < 0:
        raise InputError("--scenes must be at least 1 and --seed at least 0")
    if options.train and options.checkpoint is not None:
        raise InputError("--train starts from scratch: leave out --checkpoint, or --train")
    with whole_folder(options.out, replaces=shapes_demo.RESULTS) as folder:
        if options.train:
            _train_and_show(options, folder)
        else:
            _show(options, folder)
    print(options.out / shapes_demo.PAGE)


def _show(options: argparse.Namespace, folder: Path) -> None:
    """Let the shipped model, or a checkpoint, answer."""
    predictor = shapes_demo.load_predictor(options.checkpoint)
    scenes = shapes_demo.select_full_scenes(options.scenes, seed=options.seed)
    quiz = run_quiz(predictor, scenes)
    _print_replies(quiz.scenes, quiz.replies)
    print(_format_summary(quiz.summary))
    parameters = shapes_demo.count_parameters(predictor)
    page = shapes_demo.answers_page(quiz, parameters=parameters, seed=options.seed)
    shapes_demo.write_results(folder, page, quiz)


def _train_and_show(options: argparse.Namespace, folder: Path) -> None:
    """Train a model, then let it answer."""
    keep_freed_memory_on_cpu()
    scenes = shapes_demo.select_simple_scenes(options.scenes, seed=options.seed)
    recipe = demo_recipe(seed=options.seed)
    trained = train(recipe, folder / shapes_demo.MODEL)
    print(
        f"{trained.steps} steps in {trained.seconds:.0f} s, from nothing; gIoU on held-out scenes:"
    )
    print(f"  {trained.gious[0][1]:.3f}  the untrained model")
    print(f"  {trained.constant:.3f}  the best constant mask")
    print(f"  {trained.gious[-1][1]:.3f}  the trained model, its words given")
    predictor = shapes_demo.load_predictor(folder / shapes_demo.MODEL)
    quiz = run_quiz(predictor, scenes)
    print(f"  {quiz.summary.scores.giou:.3f}  the trained model, in its own words\n")
    _print_replies(quiz.scenes[: options.scenes], quiz.replies[: options.scenes])
    print(_format_summary(quiz.summary))
    parameters = shapes_demo.count_parameters(predictor)
    page = shapes_demo.training_page(
        quiz, trained, recipe, parameters=parameters, shown=options.scenes
    )
    shapes_demo.write_results(folder, page, quiz, trained)


def _print_replies(scenes: Sequence[Scene], replies: Sequence[Sequence[Reply]]) -> None:
    for scene, scene_replies in zip(scenes, replies, strict=True):
        print(f"Scene {scene.number}")
        for reply in scene_replies:
            print(f"  Q  {reply.question.question}")
            print(f"  A  {_format_answer(reply) or '(no words)'}")
            print(f"     {_format_scores(reply)}")
        print()


def _format_answer(reply: Reply) -> str:
    """Return the answer with the numbers of its targets: "The red cross [1]."."""
    first, *others = split_at_markers(reply.text, reply.answer.markers.tolist())
    return first + "".join(f"[{number}]{text}" for number, text in enumerate(others, start=1))


def _format_scores(reply: Reply) -> str:
    """Return the IoU of the answer and of its targets."""
    if not reply.sums:
        return "right: there is none"
    return f"IoU {reply.giou:.2f}  ({', '.join(target.note for target in reply.target_scores)})"


def _format_summary(summary: Summary) -> str:
    return (
        f"{summary.questions} questions: gIoU {summary.scores.giou:.3f}, "
        f"cIoU {summary.scores.ciou:.3f}; {summary.right_number} answers with the right number of "
        f"targets, {summary.absent_right} of {summary.absent} right where there is none"
    )
