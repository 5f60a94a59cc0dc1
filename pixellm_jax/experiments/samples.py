"""Views of prepared examples as the model receives them in training or in evaluation."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipeline.collate import make_sample
from data_pipeline.config import DataConfig
from data_pipeline.errors import DamagedError
from data_pipeline.example import Example
from data_pipeline.formats.masks import decode
from data_pipeline.loader import sample_conversations
from data_pipeline.storage.stored import StoredSplit
from data_pipeline.transforms import Composed, compose_evaluation
from pixellm_jax.batch import Batch
from pixellm_jax.config import ModelConfig
from pixellm_jax.images.geometry import VOID, fit, mask_to_canvas
from pixellm_jax.images.read import read_image
from pixellm_jax.report.samples_page import ConversationView, MaskView, SampleView, TokenView
from pixellm_jax.text.answer import MARKER
from pixellm_jax.text.prompt import IMAGE_TOKEN, TEMPLATES, encode_conversation, pack
from pixellm_jax.text.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class SampleViewer:
    """Makes views of examples, for `report.samples_page.render_samples`.

        viewer = SampleViewer(data=DataConfig(seed=3))
        views = [viewer.view(e, i) for i, e in choose_examples(splits, count=12, seed=3)]
        page = render_samples("muse", "12 samples", views)

    Attributes:
        data: seed and budgets of the sequence.
        model: size of the canvas, and the prompt template.
        vocabulary: with it, views have the tokens of the packed sequence.
        evaluation: compose conversations as evaluation does instead of sampling them as training
            does.
    """

    data: DataConfig
    model: ModelConfig = ModelConfig()
    vocabulary: Vocabulary | None = None
    evaluation: bool = False

    @property
    def marker(self) -> str:
        """The text that stands for a target in answers."""
        return self.vocabulary.group_text if self.vocabulary else MARKER

    def view(self, example: Example, index: int) -> SampleView:
        """Return a view of an example; `index` is its position in the stream, a key of sampling.

        An example without usable conversations has a caption that says why.
        """
        title = f"{example.dataset}/{example.split}/{example.key}"
        caption = f"{example.hw[0]} × {example.hw[1]}, {example.kind}"
        composed: tuple[Composed, ...] = ()
        try:
            composed = self._compose(example, index)
            is_answered = all(all(one.messages) for one in composed)
            if self.vocabulary and composed and is_answered:
                return self._view_packed(example, composed, self.vocabulary, title, caption)
        except DamagedError as reason:
            composed = ()
            caption = f"{caption}, cannot be used: {reason}"
        return self._view_plain(example, composed, title, caption)

    def _compose(self, example: Example, index: int) -> tuple[Composed, ...]:
        if self.evaluation:
            return compose_evaluation(example, group_text=self.marker)
        return sample_conversations(example, index, self.data, self.marker)

    def _view_plain(
        self, example: Example, composed: Sequence[Composed], title: str, caption: str
    ) -> SampleView:
        """Return a view without the sequence, which is not known while answers are open."""
        canvas = self.model.vision.canvas
        image, hw = fit(read_image(Image.open(io.BytesIO(example.image)), upright=False), canvas)
        void = decode(example.void) > 0 if example.void else np.zeros(example.hw, bool)
        targets = _targets(composed)
        pixels = []
        for index, _ in targets:
            mask = np.where(void, VOID, decode(example.masks[index])).astype(np.uint8)
            pixels.append(mask_to_canvas(mask[None], canvas)[0])
        masks, numbers = _merge_masks(targets, pixels)
        return SampleView(
            title=title,
            caption=caption,
            image=image,
            hw=hw,
            masks=masks,
            conversations=tuple(_view_conversations(composed, range(len(composed)), numbers)),
            marker=self.marker,
        )

    def _view_packed(
        self,
        example: Example,
        composed: Sequence[Composed],
        vocabulary: Vocabulary,
        title: str,
        caption: str,
    ) -> SampleView:
        """Return a view of the very row that a batch would hold."""
        row = make_sample(example, composed, vocabulary, self.data, self.model).row
        template = TEMPLATES[self.model.template]
        encoded = [
            encode_conversation(vocabulary, template, c.messages, images=1) for c in composed
        ]
        kept = pack(
            encoded,
            image_tokens=self.model.image_tokens,
            length=self.data.length,
            targets=self.data.targets,
        ).kept
        masks, numbers = _merge_masks(_targets([composed[i] for i in kept]), list(row.masks))
        return SampleView(
            title=title,
            caption=caption,
            image=row.image,
            hw=(int(row.image_hw[0]), int(row.image_hw[1])),
            masks=masks,
            conversations=tuple(_view_conversations(composed, kept, numbers)),
            marker=self.marker,
            tokens=tuple(_view_tokens(row, vocabulary, numbers)),
            length=f"{int((row.segment >= 0).sum())} of {self.data.length} positions",
        )


def choose_examples(
    splits: Sequence[StoredSplit], *, count: int, seed: int
) -> Iterator[tuple[int, Example]]:
    """Yield different random examples, each with its index in the concatenated splits."""
    ends = np.cumsum([len(stored) for stored in splits])
    order = np.random.default_rng(seed).permutation(int(ends[-1]))[:count]
    for index in map(int, order):
        number = int(np.searchsorted(ends, index, side="right"))
        yield index, splits[number][index - int(ends[number]) + len(splits[number])]


def _targets(composed: Sequence[Composed]) -> list[tuple[int, str]]:
    """Return the mask index and the phrase of every target, in the order of the answers."""
    return [pair for one in composed for pair in zip(one.masks, one.phrases, strict=True)]


def _merge_masks(
    targets: Sequence[tuple[int, str]], pixels: Sequence[np.ndarray]
) -> tuple[tuple[MaskView, ...], list[int]]:
    """Return each mask once, with all of its phrases, and the number of each target's mask."""
    order = list(dict.fromkeys(mask for mask, _ in targets))
    masks = []
    for mask in order:
        places = [place for place, (other, _) in enumerate(targets) if other == mask]
        phrases = dict.fromkeys(targets[place][1] for place in places)
        masks.append(MaskView(tuple(phrases), pixels[places[0]]))
    return tuple(masks), [order.index(mask) for mask, _ in targets]


def _view_conversations(
    composed: Sequence[Composed], kept: Sequence[int], numbers: Sequence[int]
) -> Iterator[ConversationView]:
    start = 0
    for i, conversation in enumerate(composed):
        end = start + len(conversation.masks) * (i in kept)
        yield ConversationView(conversation.messages, tuple(numbers[start:end]), i in kept)
        start = end


def _view_tokens(row: Batch, vocabulary: Vocabulary, numbers: Sequence[int]) -> Iterator[TokenView]:
    """Yield the tokens up to the padding; all positions of the image are one token."""
    texts = {index: token for token, index in vocabulary.ids.items()}
    groups = [g for g in vocabulary.find_groups(row.tokens) if row.loss_mask[g].all()]
    targets = {
        int(position): number
        for group, number in zip(groups, numbers, strict=False)  # none in an open answer
        for position in group.flat
    }
    image_tokens = int((row.tokens == IMAGE_TOKEN).sum())
    for i in range(int((row.segment >= 0).sum())):
        index = int(row.tokens[i])
        segment = int(row.segment[i])
        where = f"conversation {segment}" if segment else "prefix"
        tooltip = f"id {index}, position {int(row.position[i])}, {where}"
        if index != IMAGE_TOKEN:
            text = texts[index].replace("▁", " ")
            yield TokenView(text, tooltip, bool(row.loss_mask[i]), targets.get(i))
        elif int(row.tokens[i - 1]) != IMAGE_TOKEN:
            yield TokenView(f"image, {image_tokens} positions", tooltip)
