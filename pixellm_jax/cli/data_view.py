"""`pixellm data-view`: a page of samples of prepared data, as the model will see them."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.collate import make_sample
from data_pipeline.config import DataConfig
from data_pipeline.damage import Damaged
from data_pipeline.example import Example
from data_pipeline.formats.masks import decode
from data_pipeline.loader import draw
from data_pipeline.storage.stored import StoredSplit, find_splits
from data_pipeline.transforms import Composed, compose_evaluation
from pixellm_jax.config import ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.images.geometry import VOID, fit, mask_to_canvas
from pixellm_jax.images.read import read_image
from pixellm_jax.report.samples_page import Conversation, Mask, Sample, Token, render_samples
from pixellm_jax.text.answer import MARKER
from pixellm_jax.text.prompt import IMAGE_TOKEN, TEMPLATES, encode_conversation, pack
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights import checkpoint

EXAMPLES = """examples:
  pixellm data-view --data prepared/muse/train --out muse.html
  pixellm data-view --data prepared --out all.html --count 40 --seed 3 --checkpoint pixellm-7b

Conversations are drawn as training draws them, with --evaluation they are those of the evaluation.
With a checkpoint the page shows its canvas, and the packed sequence token by token.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the options."""
    data = DataConfig()
    parser = commands.add_parser(
        "data-view",
        help="a page of samples as the model will see them",
        description="Writes an HTML page of samples with their conversations and masks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE", help="an .html file")
    parser.add_argument("--dataset", metavar="NAME", help="only this one")
    parser.add_argument("--split", metavar="S", help="only this one")
    parser.add_argument("--count", type=int, default=12, metavar="N", help="samples (12)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is drawn (0)")
    parser.add_argument("--evaluation", action="store_true", help="conversations of evaluation")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="its canvas and tokens")
    for name, what in (("length", "positions"), ("targets", "targets")):
        default = getattr(data, name)
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"budget of {what} ({default})",
        )
    return parser


def run(options: argparse.Namespace) -> None:
    """Draws samples and writes the page."""
    if options.count < 1 or options.seed < 0:
        raise InputError("--count must be at least 1 and --seed at least 0")
    data = DataConfig(length=options.length, targets=options.targets, seed=options.seed)
    splits = find_splits(options.data, dataset=options.dataset, split=options.split)
    config, vocabulary = ModelConfig(), None
    if options.checkpoint is not None:
        config = checkpoint.read_config(options.checkpoint)
        vocabulary = checkpoint.read_vocabulary(options.checkpoint, config)
    samples = [
        _sample(example, index, options.evaluation, data, config, vocabulary)
        for index, example in _chosen(splits, options.count, options.seed)
    ]
    names = sorted({stored.dataset for stored in splits})
    total = sum(map(len, splits))
    lead = f"{len(samples)} of {total} examples, seed {options.seed}"
    page = render_samples(", ".join(names), lead, samples)
    try:
        options.out.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise InputError(f"{options.out}: cannot write here ({error.strerror})") from None
    print(f"{options.out}: {lead}")


def _chosen(splits: Sequence[StoredSplit], count: int, seed: int) -> Iterator[tuple[int, Example]]:
    """Different examples, each with its place in the splits put one after the other."""
    ends = np.cumsum([len(stored) for stored in splits])
    order = np.random.default_rng(seed).permutation(int(ends[-1]))[:count]
    for index in map(int, order):
        number = int(np.searchsorted(ends, index, side="right"))
        yield index, splits[number][index - int(ends[number]) + len(splits[number])]


def _sample(
    example: Example,
    index: int,
    evaluation: bool,
    data: DataConfig,
    config: ModelConfig,
    vocabulary: Vocabulary | None,
) -> Sample:
    group = vocabulary.group_text if vocabulary else MARKER
    title = f"{example.dataset}/{example.split}/{example.key}"
    about = f"{example.hw[0]} × {example.hw[1]}, {example.kind}"
    composed: tuple[Composed, ...] = ()
    try:
        if evaluation:
            composed = compose_evaluation(example, group_text=group)
        else:
            composed = draw(example, index, data, group)
        answered = all(all(talk.messages) for talk in composed)
        if vocabulary and composed and answered:
            return _packed(example, composed, data, config, vocabulary, title, about)
    except Damaged as reason:
        composed, about = (), f"{about}, cannot be used: {reason}"
    return _plain(example, composed, config.vision.canvas, group, title, about)


def _plain(
    example: Example,
    composed: Sequence[Composed],
    canvas: int,
    group: str,
    title: str,
    about: str,
) -> Sample:
    """Without a vocabulary, or where the model is to answer: no sequence."""
    picture = read_image(Image.open(io.BytesIO(example.image)), upright=False)
    image, hw = fit(picture, canvas)
    void = decode(example.void) > 0 if example.void else np.zeros(example.hw, bool)
    pixels = []
    for mask, _ in _groups(composed):
        own = np.where(void, VOID, decode(example.masks[mask])).astype(np.uint8)
        pixels.append(mask_to_canvas(own[None], canvas)[0])
    masks, numbers = _different(_groups(composed), pixels)
    talks = _talks(composed, range(len(composed)), numbers)
    return Sample(title, about, image, hw, masks, tuple(talks), group)


def _packed(
    example: Example,
    composed: Sequence[Composed],
    data: DataConfig,
    config: ModelConfig,
    vocabulary: Vocabulary,
    title: str,
    about: str,
) -> Sample:
    """Everything from the very row that a batch would hold."""
    row = make_sample(example, composed, vocabulary, data, config).row
    template = TEMPLATES[config.template]
    encoded = [encode_conversation(vocabulary, template, c.messages, images=1) for c in composed]
    budget = {"length": data.length, "targets": data.targets}
    kept = pack(encoded, image_tokens=config.image_tokens, **budget).kept
    masks, numbers = _different(_groups([composed[number] for number in kept]), list(row.masks))
    return Sample(
        title,
        about,
        row.image,
        (int(row.image_hw[0]), int(row.image_hw[1])),
        masks,
        tuple(_talks(composed, kept, numbers)),
        vocabulary.group_text,
        tuple(_tokens(row, vocabulary, numbers)),
        f"{int((row.segment >= 0).sum())} of {data.length} positions",
    )


def _groups(composed: Sequence[Composed]) -> list[tuple[int, str]]:
    """Mask and phrase of every target that is asked for, in the order of the answers."""
    return [pair for talk in composed for pair in zip(talk.masks, talk.phrases, strict=True)]


def _different(
    groups: Sequence[tuple[int, str]], pixels: Sequence[np.ndarray]
) -> tuple[tuple[Mask, ...], list[int]]:
    """Each mask once, with all of its phrases; and the number of each target's mask."""
    order = list(dict.fromkeys(mask for mask, _ in groups))
    masks = []
    for mask in order:
        places = [place for place, (own, _) in enumerate(groups) if own == mask]
        phrases = dict.fromkeys(groups[place][1] for place in places)
        masks.append(Mask(tuple(phrases), pixels[places[0]]))
    return tuple(masks), [order.index(mask) for mask, _ in groups]


def _talks(
    composed: Sequence[Composed], kept: Sequence[int], numbers: Sequence[int]
) -> Iterator[Conversation]:
    start = 0
    for place, talk in enumerate(composed):
        end = start + len(talk.masks) * (place in kept)
        yield Conversation(talk.messages, tuple(numbers[start:end]), place in kept)
        start = end


def _tokens(row: Any, vocabulary: Vocabulary, numbers: Sequence[int]) -> Iterator[Token]:
    """The sequence up to the padding; the positions of the image are one token."""
    names = {index: token for token, index in vocabulary.ids.items()}
    groups = [g for g in vocabulary.find_groups(row.tokens) if row.loss_mask[g].all()]
    owners = {
        int(place): number
        for group, number in zip(groups, numbers, strict=False)  # none in an open answer
        for place in group.flat
    }
    images = int((row.tokens == IMAGE_TOKEN).sum())
    for place in range(int((row.segment >= 0).sum())):
        index, segment = int(row.tokens[place]), int(row.segment[place])
        about = f"id {index}, position {int(row.position[place])}, "
        about += f"conversation {segment}" if segment else "prefix"
        if index != IMAGE_TOKEN:
            text = names[index].replace("▁", " ")
            yield Token(text, about, bool(row.loss_mask[place]), owners.get(place))
        elif int(row.tokens[place - 1]) != IMAGE_TOKEN:
            yield Token(f"image, {images} positions", about)
