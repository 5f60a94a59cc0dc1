"""`pixellm export`: a checkpoint -> PyTorch weights, or StableHLO programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax

from pixellm_jax.cli.console import byte_bar
from pixellm_jax.config import DTYPES
from pixellm_jax.errors import InputError
from pixellm_jax.inference.stablehlo import PLATFORMS, RUN, Buckets, write_programs
from pixellm_jax.weights import checkpoint
from pixellm_jax.weights.export import VISION_FOLDER, export

EXAMPLES = """examples:
  pixellm export --checkpoint pixellm-7b --hf PixelLM-7B-again
  pixellm export --checkpoint pixellm-7b --stablehlo programs --batch 1 8 --question 64 256
  python programs/run.py desk.jpg "Which things could be used to write?"
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser.description = (
        "--hf writes the released PyTorch layout as safetensors, and the CLIP folder "
        f"next to it as {VISION_FOLDER}/; `pixellm convert` reads both back, bit for bit. "
        "--stablehlo writes compiled programs for fixed shapes, their weights, and a runner that "
        "does not need this package."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    out = parser.add_mutually_exclusive_group(required=True)
    out.add_argument("--hf", type=Path, metavar="OUT", help="a new folder")
    out.add_argument("--stablehlo", type=Path, metavar="OUT", help="a new folder")
    shapes = parser.add_argument_group("shapes of the StableHLO programs (several values: buckets)")
    for option, text in (
        ("--batch", "batch size: questions answered together (1)"),
        ("--question", "prompt tokens after the image (64)"),
        ("--targets", "masks decoded together (4)"),
    ):
        shapes.add_argument(option, type=int, nargs="+", metavar="N", help=text)
    shapes.add_argument(
        "--new-tokens", type=int, metavar="N", help="maximum answer length in tokens (256)"
    )
    shapes.add_argument("--platforms", nargs="+", choices=PLATFORMS, help="target platforms (all)")
    shapes.add_argument("--dtype", choices=DTYPES, help="compute dtype (the checkpoint's)")


def run(options: argparse.Namespace) -> None:
    """Export with a progress bar and print what was written."""
    names = ("batch", "question", "targets", "new_tokens", "platforms", "dtype")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.stablehlo is not None:
        _write_programs(options.checkpoint, options.stablehlo, given)
        return
    if given:
        option = next(iter(given)).replace("_", "-")
        raise InputError(f"--{option} goes with --stablehlo only; leave it out")
    with byte_bar("exporting") as progress:
        export(options.checkpoint, options.hf, progress=progress)
    print(f"{options.hf} and {options.hf / VISION_FOLDER}")


def _write_programs(folder: Path, out: Path, given: dict[str, Any]) -> None:
    jax.config.update("jax_platforms", "cpu")  # programs for every platform are lowered there
    dtype = given.pop("dtype", None)
    platforms = given.pop("platforms", PLATFORMS)
    sizes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    buckets = Buckets(**sizes)
    model = checkpoint.load_model(folder, dtype=dtype)
    vocabulary = checkpoint.read_vocabulary(folder, model.config)
    with byte_bar("exporting") as progress:
        names = write_programs(
            model,
            vocabulary,
            out,
            buckets=buckets,
            platforms=platforms,
            progress=progress,
            consume=True,
        )
    print(f'{out}: {len(names)} programs; python {out / RUN} IMAGE "QUESTION"')
