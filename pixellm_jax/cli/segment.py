"""`pixellm segment`: a question about a photo -> text, masks and a picture of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from pixellm_jax.folders import whole_folder
from pixellm_jax.image import read_image
from pixellm_jax.overlay import draw_overlay
from pixellm_jax.predictor import Answer, Predictor

RESULTS = ("answer.json", "mask_*.png", "overlay.png")
"""What an answer's folder holds; a folder that holds anything else is never replaced."""

EXAMPLES = """examples:
  pixellm segment --checkpoint pixellm-7b --image desk.jpg --out answer \\
      --question "Which things on the desk could be used to write?"

The folder gets answer.json (text and, per target, phrase, score, box and COCO RLE), mask_00.png,
mask_01.png, ... (0 or 255, at the size of the upright photo) and overlay.png.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the options."""
    parser = commands.add_parser(
        "segment",
        help="ask about a photo: text and one mask per target",
        description="Answers a question about a photo with text and one mask per target.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE")
    parser.add_argument("--question", required=True, metavar="TEXT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser


def run(options: argparse.Namespace) -> None:
    """Answers, writes the folder and prints the answer."""
    picture = read_image(options.image)
    with whole_folder(options.out, replaces=RESULTS) as folder:
        answer = Predictor.load(options.checkpoint)(picture, options.question)
        targets = write_answer(folder, answer, picture, options.image, options.question)
    print(answer.text)
    for i, target in enumerate(targets):
        phrase = target["phrase"] or "(not named)"
        print(f"  {i}: {phrase}, score {target['score']:.2f}, {target['area']} pixels")
    if not answer.complete:
        print("  (the answer was cut off at the limit of new tokens)")
    print(f"{options.out / 'overlay.png'}")


def write_answer(
    folder: Path, answer: Answer, picture: np.ndarray, image: Path, question: str
) -> list[dict[str, Any]]:
    """Writes answer.json, the masks and the overlay into `folder`; returns the targets' records.

    Box is [x, y, width, height] in pixels, None for an empty mask; spans count characters of text.
    """
    targets: list[dict[str, Any]] = []
    for i, mask in enumerate(answer.masks):
        start, stop = map(int, answer.spans[i])
        rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        area = int(mask.sum())
        file = f"mask_{i:02d}.png"
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / file)
        targets.append(
            {
                "phrase": answer.text[start:stop],
                "span": [start, stop],
                "marker": list(map(int, answer.markers[i])),
                "score": float(answer.scores[i]),
                "area": area,
                "box": [float(v) for v in coco.toBbox(rle)] if area else None,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "mask": file,
            }
        )
    labels = [target["phrase"] or str(i) for i, target in enumerate(targets)]
    draw_overlay(picture, answer.masks, labels).save(folder / "overlay.png")
    record = {
        "image": str(image),
        "size": [int(side) for side in picture.shape[:2]],
        "question": question,
        "text": answer.text,
        "complete": answer.complete,
        "targets": targets,
    }
    (folder / "answer.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
        errors="replace",  # a file name may hold bytes that are no text
    )
    return targets
