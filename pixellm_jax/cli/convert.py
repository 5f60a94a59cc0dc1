"""`pixellm convert`: PyTorch weights -> an Orbax checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pixellm_jax.cli.console import byte_bar
from pixellm_jax.config import POSITION_RESIZES, CodebookConfig, VisionConfig
from pixellm_jax.errors import InputError
from pixellm_jax.text.prompt import TEMPLATES
from pixellm_jax.weights.convert import convert
from pixellm_jax.weights.convert_llava import Start, start_from_llava

EXAMPLES = """examples:
  pixellm convert --hf PixelLM-7B/hf_model --vision clip-vit-large-patch14-336 --out pixellm-7b
  pixellm convert --hf LLaVA-Lightning-7B-v1-1 --vision clip-vit-large-patch14-336 \\
      --from-llava --out llava_start
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser.description = (
        "Reads a PixelLM folder (merged, or with LoRA tensors), or with --from-llava a "
        "LLaVA folder, and a CLIP folder; writes an Orbax checkpoint with its config and "
        "tokenizer."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="PixelLM or LLaVA")
    parser.add_argument("--vision", type=Path, required=True, metavar="DIR", help="CLIP ViT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--template",
        choices=sorted(TEMPLATES),
        help="conversation template the model is trained with (default: the one recorded in an "
        "exported folder, else llava_v1)",
    )
    parser.add_argument(
        "--position-resize",
        choices=POSITION_RESIZES,
        help="how CLIP's position table is resized to the canvas (default: released for PixelLM, "
        "whose weights need it; correct for LLaVA)",
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="scale of LoRA tensors (default: adapter_config.json, else 16)",
    )
    start = parser.add_argument_group("initial weights for training")
    start.add_argument(
        "--from-llava",
        action="store_true",
        help="--hf is a LLaVA folder: extend its tokenizer and embeddings by the codebook, and "
        "initialise projectors and pixel decoder at random",
    )
    default = CodebookConfig()
    for option, metavar, text in (
        ("--tokens-per-scale", "N", f"codebook tokens ({default.tokens_per_scale})"),
        ("--scales", "L", f"feature scales ({default.scales})"),
        ("--canvas", "PIXELS", f"side of the canvas ({VisionConfig.canvas})"),
        ("--seed", "S", "seed of the random weights (0)"),
    ):
        start.add_argument(option, type=int, metavar=metavar, help=text)


def run(options: argparse.Namespace) -> None:
    """Convert with a progress bar and print what the checkpoint holds."""
    sizes = _given(options, "tokens_per_scale", "scales")
    others = _given(options, "canvas", "seed")
    if not options.from_llava and (unused := [*sizes, *others]):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise InputError(f"{names}: only with --from-llava; PixelLM's own weights determine it")
    common = {
        **_given(options, "template", "position_resize", "lora_alpha"),
        "model": options.hf,
        "vision": options.vision,
        "out": options.out,
    }
    started = None
    with byte_bar("converting") as progress:
        if options.from_llava:
            codebook = CodebookConfig(**sizes)
            started = start_from_llava(**common, **others, codebook=codebook, progress=progress)
            config = started.config
        else:
            config = convert(**common, progress=progress)
    language, codebook = config.language, config.codebook
    print(
        f"{options.out}: {language.layers} layers of width {language.width}, "
        f"{language.vocabulary} ids, {codebook.tokens_per_scale} codebook tokens at "
        f"{codebook.scales} scales, pictures of {config.vision.canvas} pixels, {config.dtype}, "
        f"template {config.template}, position table {config.vision.position_resize}"
    )
    if started:
        _print_differences(started, options.hf)


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _print_differences(start: Start, folder: Path) -> None:
    """Print how the checkpoint differs from the LLaVA folder."""
    before, after = start.rows
    print(
        f"drawn at random: {', '.join(start.initialised)}; {max(after - before, 0)} new rows of ids"
    )
    if before > after:
        print(f"cut: {before - after} rows of the embeddings that have no id")
    modules = sorted({".".join(name.split(".")[:2]) for name in start.discarded})
    if modules:
        print(f"left out: {', '.join(modules)} of {folder}, which PixelLM replaces")
