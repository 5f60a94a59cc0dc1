"""`pixellm segment`: questions about photos -> text, masks and pictures of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from pixellm_jax.config import DTYPES, MeshConfig
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.settings import check_settings, describe_model
from pixellm_jax.files import whole_folder, write_whole
from pixellm_jax.images.overlay import draw_overlay
from pixellm_jax.images.read import read_image
from pixellm_jax.inference.answer import Answer
from pixellm_jax.inference.answer_files import (
    AnswerLog,
    Asked,
    answer_record,
    ask_about_folder,
    read_questions,
)
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.inference.prepare import WEIGHTS
from pixellm_jax.inference.request import check_question
from pixellm_jax.sharding import make_mesh

RESULTS = ("answer.json", "mask_*.png", "overlay.png")
"""What an answer's folder holds; a folder that holds anything else is never replaced."""

EXAMPLES = """examples:
  pixellm segment --checkpoint pixellm-7b --image desk.jpg --out answer \\
      --question "Which things on the desk could be used to write?"
  pixellm segment --checkpoint pixellm-7b --image photos --question "Where is the dog?" --out dogs
  pixellm segment --checkpoint pixellm-7b --questions asked.jsonl --out answers --batch 32

Of one photo the folder gets answer.json (text and, per target, phrase, score, box and COCO RLE),
mask_00.png, mask_01.png, ... (0 or 255, at the size of the upright photo) and overlay.png.

Of a folder of photos, or of lines {"image": "a.jpg", "question": "Where is the cat?"}, it gets
answers.jsonl, a line per answer as it comes, overlays/000000.png, ... numbered like the lines of
the questions, and settings.json. The same command goes on where it was stopped, and tries again
what had no answer.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the options."""
    parser = commands.add_parser(
        "segment",
        help="ask about photos: text and one mask per target",
        description="Answers questions about photos with text and one mask per target.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--image", type=Path, metavar="PATH", help="a photo or a folder of them")
    parser.add_argument("--question", metavar="TEXT", help="about --image")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="JSONL, instead of both")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="(512)")
    parser.add_argument(
        "--batch", type=int, default=16, metavar="N", help="questions answered at once (16)"
    )
    parser.add_argument(
        "--min-score", type=float, default=0.0, metavar="P", help="empty masks below this score (0)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="compute in it (that of the checkpoint)")
    parser.add_argument(
        "--weights", choices=list(WEIGHTS), help="fewer bits for the language model's weights"
    )
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="devices that share the weights (1)"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Answers one question, or many."""
    if options.questions is None and (options.image is None or options.question is None):
        raise InputError("name --image and --question, or --questions")
    if options.questions is not None and (options.image or options.question is not None):
        raise InputError("--questions names pictures and questions; leave --image and --question")
    for name in ("batch", "max_new_tokens", "tensor"):
        if (value := getattr(options, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not 0 <= options.min_score <= 1:
        raise InputError(f"--min-score {options.min_score}: expected a probability, from 0 to 1")
    if options.questions is not None:
        _answer_many(options, read_questions(options.questions))
        return
    check_question(options.question)
    if os.path.isdir(options.image):  # no error of a path that cannot be
        _answer_many(options, ask_about_folder(options.image, options.question))
    else:
        _answer_one(options)


def _answer_one(options: argparse.Namespace) -> None:
    picture = read_image(options.image)
    with whole_folder(options.out, replaces=RESULTS) as folder:
        answer = _load(options)(picture, options.question)
        targets = write_answer(folder, answer, picture, options.image, options.question)
    print(answer.text)
    for i, target in enumerate(targets):
        phrase = target["phrase"] or "(not named)"
        print(f"  {i}: {phrase}, score {target['score']:.2f}, {target['area']} pixels")
    if not answer.complete:
        print(f"  ({INCOMPLETE[answer.finish_reason]})")
    print(f"{options.out / 'overlay.png'}")


INCOMPLETE = {
    "length": "the answer was cut off at the limit of new tokens",
    "non_finite": "the answer ended at numbers that are not finite",
}


def _answer_many(options: argparse.Namespace, asked: list[Asked]) -> None:
    """Writes answers as they come; those of an earlier run are kept."""
    overlays = options.out / "overlays"
    settings = {
        **describe_model(options.checkpoint, options.dtype, options.weights),
        "max_new_tokens": options.max_new_tokens,
        "min_score": options.min_score,
    }
    try:
        overlays.mkdir(parents=True, exist_ok=True)
        path, answers = options.out / "settings.json", options.out / "answers.jsonl"
        none = answers.is_file() and answers.stat().st_size == 0  # so these may be other ones
        if none or not check_settings(path, settings, made="answers"):
            write_whole(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{options.out}: cannot write here ({error.strerror}); choose another place"
        ) from None
    options.when_interrupted = f"the same command goes on with {options.out}"
    log = AnswerLog(answers, asked)
    left = [number for number in range(len(asked)) if number not in log.done]
    failed = 0
    if left:
        predictor = _load(options)
        pairs = ((asked[number].image, asked[number].question) for number in left)
        with tqdm(total=len(asked), initial=len(log.done), disable=None, unit="question") as bar:
            for index, answer in predictor.each(pairs):
                number = left[index]
                name, question = asked[number].name, asked[number].question
                try:
                    record, drawn = _describe(answer, asked[number])
                except InputError as error:  # the next run tries again
                    failed += 1
                    record = {"image": name, "question": question, "error": str(error)}
                    tqdm.write(f"{name}: {error}", file=sys.stderr)
                else:
                    _save(drawn, overlays / f"{number:06d}.png")
                log.write(number, record)
                bar.update()
    log.close()
    print(f"{answers}: {len(asked)} questions, {failed} without an answer")


def _describe(answer: Answer | InputError, asked: Asked) -> tuple[dict[str, Any], Image.Image]:
    """The record and the overlay of an answer.

    Raises:
        InputError: there is none, or none that can be used.
    """
    if isinstance(answer, InputError):
        raise answer
    if answer.finish_reason == "non_finite":
        raise InputError(INCOMPLETE["non_finite"])
    picture = read_image(asked.image)
    record = answer_record(answer, asked.name, asked.question, picture.shape[:2])
    labels = [target["phrase"] or str(i) for i, target in enumerate(record["targets"])]
    return record, draw_overlay(picture, answer.masks, labels)


def _save(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path)
    except OSError as error:
        raise InputError(
            f"{path}: writing failed ({error.strerror or error}); free some space, then the same "
            "command goes on"
        ) from error


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


def write_answer(
    folder: Path, answer: Answer, picture: np.ndarray, image: Path, question: str
) -> list[dict[str, Any]]:
    """Writes answer.json, the masks and the overlay into `folder`; returns the targets' records."""
    record = answer_record(answer, str(image), question, picture.shape[:2])
    targets = record["targets"]
    for i, (target, mask) in enumerate(zip(targets, answer.masks, strict=True)):
        target["mask"] = f"mask_{i:02d}.png"
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / target["mask"])
    labels = [target["phrase"] or str(i) for i, target in enumerate(targets)]
    draw_overlay(picture, answer.masks, labels).save(folder / "overlay.png")
    (folder / "answer.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
        errors="replace",  # a file name may hold bytes that are no text
    )
    return targets
