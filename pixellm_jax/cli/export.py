"""`pixellm export`: a checkpoint -> PyTorch folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pixellm_jax.cli.progress import byte_bar
from pixellm_jax.export import VISION_FOLDER, export

EXAMPLES = """examples:
  pixellm export --checkpoint pixellm-7b --hf PixelLM-7B-again
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the options."""
    parser = commands.add_parser(
        "export",
        help="a checkpoint -> PyTorch weights in the released layout",
        description="Writes the released PyTorch layout as safetensors, and the CLIP folder beside "
        f"it as {VISION_FOLDER}/; `pixellm convert` reads both back, bit for bit.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--hf", type=Path, required=True, metavar="OUT", help="a new folder")
    return parser


def run(options: argparse.Namespace) -> None:
    """Exports with a progress bar."""
    with byte_bar("exporting") as progress:
        export(options.checkpoint, options.hf, progress=progress)
    print(f"{options.hf} and {options.hf / VISION_FOLDER}")
