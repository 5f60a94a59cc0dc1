"""`pixellm segment`: questions about images -> text, masks and overlays."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import jax
from tqdm import tqdm

from pixellm_jax.config import DTYPES, MeshConfig
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.run_folder import check_settings, describe_model
from pixellm_jax.files import whole_folder, write_whole
from pixellm_jax.images.read import read_image
from pixellm_jax.inference.answer_files import (
    ANSWER_FILES,
    INCOMPLETE,
    AnswerLog,
    ImageQuestion,
    answer_remaining,
    questions_about_folder,
    read_questions,
    write_answer,
)
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.inference.prepare import WEIGHTS
from pixellm_jax.inference.request import check_question
from pixellm_jax.sharding import make_mesh

EXAMPLES = """examples:
  pixellm segment --checkpoint pixellm-7b --image desk.jpg --out answer \\
      --question "Which things on the desk could be used to write?"
  pixellm segment --checkpoint pixellm-7b --image photos --question "Where is the dog?" --out dogs
  pixellm segment --checkpoint pixellm-7b --questions questions.jsonl --out answers --batch 32

For one image, --out receives answer.json (text and, per target, phrase, score, box and COCO RLE),
mask_00.png, mask_01.png, ... (0 or 255, at the size of the upright image) and overlay.png.

For a folder of images, or a file of lines {"image": "a.jpg", "question": "Where is the cat?"}, it
receives answers.jsonl, with one line per answer as it arrives, overlays/000000.png, ... numbered
like the questions, and settings.json. Run the same command again to resume after an interruption
and to retry questions without an answer.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = "Answer questions about images with text and one mask per target."
    parser.epilog = EXAMPLES
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--image", type=Path, metavar="PATH", help="an image or a folder of images")
    parser.add_argument("--question", metavar="TEXT", help="question about --image")
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help="JSONL file, instead of --image, --question"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="limit of an answer (512)"
    )
    parser.add_argument(
        "--batch", type=int, default=16, metavar="N", help="questions answered at once (16)"
    )
    parser.add_argument(
        "--min-score", type=float, default=0.0, metavar="P", help="empty masks below this score (0)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (the checkpoint's)")
    parser.add_argument(
        "--weights", choices=list(WEIGHTS), help="quantise the language model's weights"
    )
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="devices that share the weights (1)"
    )


def run(options: argparse.Namespace) -> None:
    """Answer one question, or many."""
    if options.questions is None and (options.image is None or options.question is None):
        raise InputError("name --image and --question, or --questions")
    if options.questions is not None and (options.image or options.question is not None):
        raise InputError("--questions names images and questions; leave --image and --question")
    for name in ("batch", "max_new_tokens", "tensor"):
        if (value := getattr(options, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not 0 <= options.min_score <= 1:
        raise InputError(f"--min-score {options.min_score}: expected a probability, from 0 to 1")
    if options.questions is not None:
        _answer_many(options, read_questions(options.questions))
        return
    check_question(options.question)
    if os.path.isdir(options.image):  # unlike Path.is_dir, no error for an impossible path
        _answer_many(options, questions_about_folder(options.image, options.question))
    else:
        _answer_one(options)


def _answer_one(options: argparse.Namespace) -> None:
    pixels = read_image(options.image)
    with whole_folder(options.out, replaces=ANSWER_FILES) as folder:
        answer = _load(options)(pixels, options.question)
        targets = write_answer(folder, answer, pixels, options.image, options.question)
    print(answer.text)
    for i, target in enumerate(targets):
        phrase = target["phrase"] or "(not named)"
        print(f"  {i}: {phrase}, score {target['score']:.2f}, {target['area']} pixels")
    if not answer.complete:
        print(f"  ({INCOMPLETE[answer.finish_reason]})")
    print(f"{options.out / 'overlay.png'}")


def _answer_many(options: argparse.Namespace, questions: list[ImageQuestion]) -> None:
    """Write answers as they arrive, and keep the answers of an earlier run."""
    overlays = options.out / "overlays"
    path = options.out / "answers.jsonl"
    try:
        overlays.mkdir(parents=True, exist_ok=True)
        _check_settings(options, path)
    except OSError as error:
        raise InputError(
            f"{options.out}: cannot write here ({error.strerror}); choose another place"
        ) from None
    options.when_interrupted = f"run the same command again to resume {options.out}"
    log = AnswerLog(path, questions)
    failed = 0
    if log.remaining:
        predictor = _load(options)
        total, done = len(questions), len(log.done)
        with tqdm(total=total, initial=done, disable=None, unit="question") as bar:
            for question, failure in answer_remaining(predictor, log, overlays):
                if failure is not None:
                    failed += 1
                    tqdm.write(f"{question.name}: {failure}", file=sys.stderr)
                bar.update()
    log.close()
    print(f"{path}: {len(questions)} questions, {failed} without an answer")


def _check_settings(options: argparse.Namespace, answers: Path) -> None:
    """Write settings.json, or check that an earlier run with answers had the same settings."""
    settings = {
        **describe_model(options.checkpoint, options.dtype, options.weights),
        "max_new_tokens": options.max_new_tokens,
        "min_score": options.min_score,
    }
    path = options.out / "settings.json"
    has_no_answers = answers.is_file() and answers.stat().st_size == 0
    if has_no_answers or not check_settings(path, settings, made="answers"):
        write_whole(path, json.dumps(settings, indent=2) + "\n")


def _load(options: argparse.Namespace) -> Predictor:
    devices, mesh = jax.devices()[: options.tensor], None
    if len(devices) < options.tensor:
        raise InputError(f"--tensor {options.tensor}: {len(devices)} devices are here")
    if options.tensor > 1:
        mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=options.tensor), devices)
    return Predictor.load(
        options.checkpoint,
        dtype=options.dtype,
        mesh=mesh,
        max_new_tokens=options.max_new_tokens,
        max_batch=options.batch,
        min_score=options.min_score,
        weights=options.weights,
    )
