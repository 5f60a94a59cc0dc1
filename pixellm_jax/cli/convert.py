"""`pixellm convert`: PyTorch folders -> a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pixellm_jax.cli.progress import byte_bar
from pixellm_jax.config import POSITION_RESIZES, CodebookConfig
from pixellm_jax.convert import convert
from pixellm_jax.prompt import TEMPLATES

EXAMPLES = """examples:
  pixellm convert --hf PixelLM-7B/hf_model --vision clip-vit-large-patch14-336 --out pixellm-7b
  pixellm convert --hf LLaVA-Lightning-7B-v1-1 --vision clip-vit-large-patch14-336 \\
      --tokens-per-scale 3 --scales 2 --out start
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the options."""
    parser = commands.add_parser(
        "convert",
        help="PyTorch weights of PixelLM (or LLaVA) and CLIP -> a checkpoint",
        description="Reads a PixelLM folder (merged, or with LoRA tensors) or a LLaVA folder, and "
        "a CLIP folder; writes an Orbax checkpoint with its config and tokenizer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="PixelLM or LLaVA")
    parser.add_argument("--vision", type=Path, required=True, metavar="DIR", help="CLIP ViT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--template",
        choices=sorted(TEMPLATES),
        help="conversation the model was trained with (default: what an exported folder says, "
        "else llava_v1)",
    )
    parser.add_argument(
        "--position-resize",
        choices=POSITION_RESIZES,
        help="how CLIP's position table is brought to the canvas (default: released for PixelLM, "
        "whose weights need it; correct for LLaVA)",
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="scale of LoRA tensors (default: adapter_config.json, else 16)",
    )
    start = parser.add_argument_group("to start a training from a LLaVA folder")
    start.add_argument("--tokens-per-scale", type=int, metavar="N", help="codebook tokens (3)")
    start.add_argument("--scales", type=int, metavar="L", help="feature scales (2)")
    start.add_argument("--seed", type=int, default=0, help="of what LLaVA does not have (0)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Converts with a progress bar and says what came out."""
    sizes = {"tokens_per_scale": options.tokens_per_scale, "scales": options.scales}
    given = {name: value for name, value in sizes.items() if value is not None}
    with byte_bar("converting") as progress:
        config = convert(
            options.hf,
            options.vision,
            options.out,
            codebook=CodebookConfig(**given) if given else None,
            template=options.template,
            position_resize=options.position_resize,
            lora_alpha=options.lora_alpha,
            seed=options.seed,
            progress=progress,
        )
    language, codebook = config.language, config.codebook
    print(
        f"{options.out}: {language.layers} layers of width {language.width}, "
        f"{language.vocabulary} ids, {codebook.tokens_per_scale} codebook tokens at "
        f"{codebook.scales} scales, pictures of {config.vision.canvas} pixels, {config.dtype}, "
        f"template {config.template}, position table {config.vision.position_resize}"
    )
