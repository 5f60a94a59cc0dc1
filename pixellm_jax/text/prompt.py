"""Prompts: conversation templates, encoding to ids with a loss mask, and sequence packing.

A conversation is encoded as one text, but which tokens are supervised, and which belong to an
answer, follows from the messages and never from searching the text: a user may type `</s>` or
`ASSISTANT:`. Every non-empty answer is supervised together with its `</s>`, nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from pixellm_jax.batch import Packed
from pixellm_jax.benchmark_question import IMAGE
from pixellm_jax.text.vocabulary import IM_END, IM_START, Vocabulary

IMAGE_TOKEN = -200
"""Id that represents an image; in packed sequences it is repeated at every image position."""

_Part = tuple[str, bool]  # text; supervised


@dataclass(frozen=True, kw_only=True)
class Template:
    """Conversation template: an opening, then turns of user and assistant.

    An empty message is written without the strings around it, so that a prompt ends with the label
    of the assistant.
    """

    opening: str = ""
    """Text before the first turn."""
    user: str = ""
    """Label of a question."""
    assistant: str = ""
    """Label of an answer."""
    first_question: tuple[str, str]
    """Strings before and after the first question."""
    question: tuple[str, str]
    """Strings before and after any other question."""
    answer: tuple[str, str]
    """Strings before and after an answer."""


LLAVA_V1 = Template(
    opening=(
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. "
    ),
    user="USER:",
    assistant="ASSISTANT:",
    first_question=(" ", " "),
    question=(" ", " "),
    answer=(" ", "</s>"),
)
r"""Template of the released models: `... USER: <image>\nWhere? ASSISTANT: There.</s>USER: ...`."""

LLAVA_LLAMA_2 = Template(
    first_question=(
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety "
        "of tasks using natural language.\n<</SYS>>\n\n",
        " [/INST]",
    ),
    question=("<s>[INST] ", " [/INST]"),
    answer=(" ", " </s>"),
)
r"""LLaMA 2: `[INST] <<SYS>>...<</SYS>>\n\n<image>\nWhere? [/INST] There. </s><s>[INST] ...`."""

PLAIN = Template(
    user="USER:",
    assistant="ASSISTANT:",
    first_question=(" ", " "),
    question=(" ", " "),
    answer=(" ", "</s>"),
)
r"""`LLAVA_V1` without its opening, for small models: `USER: <image>\nWhere? ASSISTANT: ...</s>`."""

TEMPLATES = {"llava_v1": LLAVA_V1, "llava_llama_2": LLAVA_LLAMA_2, "plain": PLAIN}


class EncodedConversation(NamedTuple):
    """A conversation as ids, with one `IMAGE_TOKEN` per image.

    Attributes:
        ids: token ids.
        loss_mask: the token is supervised.
        codebook: index in `ids` of each codebook token of each target. A target is a complete,
            ordered group of codebook tokens inside an answer.
    """

    ids: Int32[np.ndarray, "t"]
    loss_mask: Bool[np.ndarray, "t"]
    codebook: Int32[np.ndarray, "m s k"]


def encode_conversation(
    vocabulary: Vocabulary, template: Template, messages: Sequence[str], *, images: int = -1
) -> EncodedConversation:
    r"""Encode alternating questions and answers.

    Every `<image>` in a question (or the first `images` of them, unless that is -1) represents an
    image and is enclosed in `<im_start>` and `<im_end>`. An empty answer makes the conversation a
    prompt; it is not supervised.

        ["<image>\nWhere is the cup?", "It is [SEG0] [SEG1]."]
        ->  <s> ... "▁USER" ":" <im_start> -200 <im_end> "▁Where" ... "▁ASSISTANT" ":"
            "▁It" "▁is" [SEG0] [SEG1] "▁" "." </s>        (the second line is supervised)

    Raises:
        ValueError: the messages do not come in pairs.
    """
    if len(messages) % 2 or not messages:
        raise ValueError(f"found {len(messages)} messages, expected questions and answers in pairs")
    ids = [vocabulary.bos]
    supervised = [False]
    for number, parts in enumerate(_stretches(template, messages, images)):
        stretch, owners = vocabulary.encode_parts([text for text, _ in parts])
        ids += [IMAGE_TOKEN] * bool(number) + stretch
        supervised += [False] * bool(number) + [parts[owner][1] for owner in owners]
    array, loss_mask = np.asarray(ids, np.int32), np.asarray(supervised, bool)
    codebook = vocabulary.find_groups(array)
    return EncodedConversation(array, loss_mask, codebook[loss_mask[codebook].all(axis=(1, 2))])


def question_ids(
    vocabulary: Vocabulary,
    template: Template,
    question: str,
    *,
    image_tokens: int,
    history: Sequence[str] = (),
) -> Int32[np.ndarray, "t"]:
    """Return the ids of a prompt about one image, which takes `image_tokens` positions.

    The image comes before the first question; an `<image>` typed by the user is text. `history`:
    earlier questions and answers, alternating.

    Raises:
        ValueError: `history` does not consist of pairs.
    """
    first, *others = *history, question, ""
    ids = encode_conversation(vocabulary, template, [f"{IMAGE}\n{first}", *others], images=1).ids
    return expand_images(ids, image_tokens)


def follow_up_ids(
    vocabulary: Vocabulary, template: Template, question: str
) -> Int32[np.ndarray, "t"]:
    """Return the ids that follow the `</s>` of an answer: the next question and its answer's label.

    They do not depend on the earlier turns, because `</s>` splits the text for the tokenizer.
    """
    messages = [f"{IMAGE}\n?", "!", question, ""]
    ids, loss_mask, _ = encode_conversation(vocabulary, template, messages, images=1)
    return ids[1 + int(np.flatnonzero(loss_mask)[-1]) :]


def prefix_length(ids: Int32[np.ndarray, "t"]) -> int:
    """Return the length of the prefix that all conversations about an image share.

    The prefix ends with the `<im_end>` after the image, which may be expanded. Without an image, it
    is the start token alone.
    """
    images = np.flatnonzero(ids == IMAGE_TOKEN)
    return int(images[-1]) + 2 if len(images) else 1


def expand_images(ids: Int32[np.ndarray, "t"], image_tokens: int) -> Int32[np.ndarray, "..."]:
    """Repeat every `IMAGE_TOKEN` for the `image_tokens` positions that an image takes."""
    return np.repeat(ids, np.where(ids == IMAGE_TOKEN, image_tokens, 1))


def pack(
    conversations: Sequence[EncodedConversation],
    *,
    image_tokens: int,
    length: int | None = None,
    targets: int | None = None,
) -> Packed:
    """Pack the conversations of one image into one sequence that holds their prefix only once.

    The prefix ends with the `<im_end>` after the image (conversations without an image share the
    start token). With a budget of positions (`length`) or of `targets`, the arrays are padded to
    it, and a conversation that exceeds it is dropped as a whole, with its targets.

        prefix P of 3, conversations A of 2 and B of 4, length 10
        ->  tokens    P P P A A B B B B 0
            segment   0 0 0 1 1 2 2 2 2 -1
            position  0 1 2 3 4 3 4 5 6 0

    Raises:
        ValueError: no conversation, more than one image, an image after an answer, prefixes that
            differ, or a budget shorter than the prefix.
    """
    prefix, *others = map(_prefix, conversations)
    skip = len(prefix)
    if not all(np.array_equal(prefix, other) for other in others):
        raise ValueError("conversations with different prefixes cannot share a sequence")
    head = expand_images(prefix, image_tokens)
    if length is not None and length < len(head):
        raise ValueError(f"a budget of {length} positions: the prefix alone takes {len(head)}")
    parts = [(head, np.zeros_like(head), np.arange(len(head)), np.zeros(len(head), bool))]
    indices = [conversations[0].codebook[:0]]
    owners: list[int] = []
    kept: list[int] = []
    start = len(head)
    for number, (ids, loss_mask, codebook) in enumerate(conversations):
        offsets = np.arange(len(ids) - skip)
        fits = length is None or start + len(offsets) <= length
        if not fits or (targets is not None and len(owners) + len(codebook) > targets):
            continue
        kept.append(number)
        segment = np.full_like(offsets, len(kept))
        parts.append((ids[skip:], segment, offsets + len(head), loss_mask[skip:]))
        before = start + codebook - skip - 1
        indices.append(np.where(before < start, len(head) - 1, before))
        owners += [len(kept)] * len(codebook)
        start += len(offsets)
    tokens, segments, positions, masks = map(np.concatenate, zip(*parts, strict=True))
    return Packed(
        tokens=_pad(tokens, length, 0),
        segment=_pad(segments, length, -1),
        position=_pad(positions, length, 0),
        loss_mask=_pad(masks, length, 0).astype(bool),
        codebook_index=_pad(np.concatenate(indices), targets, 0),
        target_conversation=_pad(np.asarray(owners), targets, 0),
        target_valid=_pad(np.ones(len(owners)), targets, 0).astype(bool),
        kept=tuple(kept),
        dropped=len(conversations) - len(kept),
    )


def _stretches(template: Template, messages: Sequence[str], images: int) -> Iterator[list[_Part]]:
    """Yield the text of a conversation, split at the images."""
    parts = [(template.opening, False)]
    for turn, (question, answer) in enumerate(zip(messages[::2], messages[1::2], strict=True)):
        before, after = template.question if turn else template.first_question
        first, *others = question.split(IMAGE, images)
        images -= len(others) if images > 0 else 0
        parts.append((template.user + (before + first if question else ""), False))
        for text in others:
            yield [*parts, (IM_START, False)]
            parts = [(IM_END + text, False)]
        parts.append(((after if question else "") + template.assistant, False))
        if answer:
            parts.append((template.answer[0] + answer + template.answer[1], True))
    yield parts


def _pad(array: np.ndarray, size: int | None, fill: int) -> np.ndarray:
    pads = [(0, 0 if size is None else size - len(array))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, pads, constant_values=fill).astype(np.int32)


def _prefix(conversation: EncodedConversation) -> Int32[np.ndarray, "t"]:
    images = np.flatnonzero(conversation.ids == IMAGE_TOKEN)
    prefix = conversation.ids[: prefix_length(conversation.ids)]
    if len(images) > 1 or conversation.loss_mask[: len(prefix)].any():
        raise ValueError(f"{len(images)} images: expected at most one, before the first answer")
    return prefix
