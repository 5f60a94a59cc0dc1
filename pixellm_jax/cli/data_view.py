"""`pixellm data-view`: write a page of samples of prepared data as the model receives them."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.storage.stored import find_splits
from pixellm_jax.config import ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.experiments.samples import SampleViewer, choose_examples
from pixellm_jax.report.samples_page import render_samples
from pixellm_jax.weights import checkpoint

EXAMPLES = """examples:
  pixellm data-view --data prepared/muse/train --out muse.html
  pixellm data-view --data prepared --out all.html --count 40 --seed 3 --checkpoint pixellm-7b

Conversations are sampled as in training; with --evaluation they are the ones of the evaluation.
With a checkpoint the page shows its canvas, and the packed sequence token by token.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command."""
    data = DataConfig()
    parser.description = "Write an HTML page of samples with their conversations and masks."
    parser.epilog = EXAMPLES
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE", help="an .html file")
    parser.add_argument("--dataset", metavar="NAME", help="only this dataset")
    parser.add_argument("--split", metavar="S", help="only this split")
    parser.add_argument("--count", type=int, default=12, metavar="N", help="samples (12)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (0)")
    parser.add_argument(
        "--evaluation", action="store_true", help="compose conversations as evaluation does"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="model whose canvas and tokens are shown"
    )
    for name, unit in (("length", "positions"), ("targets", "targets")):
        default = getattr(data, name)
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"budget of {unit} in a sequence ({default})",
        )


def run(options: argparse.Namespace) -> None:
    """Choose samples and write the page."""
    if options.count < 1 or options.seed < 0:
        raise InputError("--count must be at least 1 and --seed at least 0")
    data = DataConfig(length=options.length, targets=options.targets, seed=options.seed)
    splits = find_splits(options.data, dataset=options.dataset, split=options.split)
    model = ModelConfig()
    vocabulary = None
    if options.checkpoint is not None:
        model = checkpoint.read_config(options.checkpoint)
        vocabulary = checkpoint.read_vocabulary(options.checkpoint, model)
    viewer = SampleViewer(
        data=data, model=model, vocabulary=vocabulary, evaluation=options.evaluation
    )
    examples = choose_examples(splits, count=options.count, seed=options.seed)
    samples = [viewer.view(example, index) for index, example in examples]
    title = ", ".join(sorted({stored.dataset for stored in splits}))
    lead = f"{len(samples)} of {sum(map(len, splits))} examples, seed {options.seed}"
    page = render_samples(title, lead, samples)
    try:
        options.out.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise InputError(
            f"{options.out}: cannot write here ({error.strerror}); choose another file"
        ) from None
    print(f"{options.out}: {lead}")
