"""Conversation -> token ids, loss mask and codebook positions; and conversations -> one sequence.

Ids are those of the written conversation as a whole, but what is supervised, and what belongs to
an answer, comes from the messages and never from searching the text: a user may type `</s>` or
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
"""Stands for an image in ids; in packed sequences it is repeated at every image position."""

_Part = tuple[str, bool]  # text; supervised


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is written: `opening`, then turns of labelled user and assistant.

    A message stands between the two strings of `first_question`, `question` or `answer`; an empty
    one leaves them out too, so that a prompt ends in the assistant's label.
    """

    opening: str = ""
    user: str = ""
    assistant: str = ""
    first_question: tuple[str, str]
    question: tuple[str, str]
    answer: tuple[str, str]


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
r"""Of the released models: `... USER: <image>\nWhere? ASSISTANT: There.</s>USER: ...`."""

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
r"""`[INST] <<SYS>>...<</SYS>>\n\n<image>\nWhere? [/INST] There. </s><s>[INST] ...`."""

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
    """A conversation in ids, with one `IMAGE_TOKEN` per image.

    loss_mask: the token is supervised.
    codebook: index in `ids` of each codebook token of each target, that is of each complete,
        ordered group inside an answer.
    """

    ids: Int32[np.ndarray, "t"]
    loss_mask: Bool[np.ndarray, "t"]
    codebook: Int32[np.ndarray, "m s k"]


def encode_conversation(
    vocabulary: Vocabulary, template: Template, messages: Sequence[str], *, images: int = -1
) -> EncodedConversation:
    r"""Encodes questions and answers in turn, a question first.

    Every `<image>` in a question (from 0 on, only the first `images`) stands for an image and gets
    `<im_start>` and `<im_end>` around it. An answer "" is left open: a prompt, not supervised.

        ["<image>\nWhere is the cup?", "It is [SEG0] [SEG1]."]
        ->  <s> ... "▁USER" ":" <im_start> -200 <im_end> "▁Where" ... "▁ASSISTANT" ":"
            "▁It" "▁is" [SEG0] [SEG1] "▁" "." </s>        (the second line is supervised)

    Raises:
        ValueError: the messages do not come in pairs.
    """
    if len(messages) % 2 or not messages:
        raise ValueError(f"found {len(messages)} messages, expected questions and answers in pairs")
    ids, supervised = [vocabulary.bos], [False]
    for number, parts in enumerate(_stretches(template, messages, images)):
        found, owners = vocabulary.encode_parts([text for text, _ in parts])
        ids += [IMAGE_TOKEN] * bool(number) + found
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
    """Ids of a prompt about one image, which takes `image_tokens` positions.

    `history` holds the earlier questions and answers in turn. The image is put in front of the
    first question; an `<image>` that the user typed is text. Raises as `encode_conversation`.
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
    """Packs the conversations of one image, whose common beginning is kept only once.

    The prefix ends with the `<im_end>` after the image (text without an image shares the start
    token). Given a budget of positions (`length`) or of `targets`, the arrays are padded to it, and
    a conversation that does not fit any more is left out as a whole, targets included.

        prefix P of 3, conversations A of 2 and B of 4, length 10
        ->  tokens    P P P A A B B B B 0
            segment   0 0 0 1 1 2 2 2 2 -1
            position  0 1 2 3 4 3 4 5 6 0

    Raises:
        ValueError: no conversation, an image that is not the only one or comes after an answer,
            prefixes that differ, or a budget that is shorter than the prefix.
    """
    prefix, *others = map(_prefix, conversations)
    skip = len(prefix)
    if not all(np.array_equal(prefix, other) for other in others):
        raise ValueError("conversations that begin differently cannot share a sequence")
    head = expand_images(prefix, image_tokens)
    if length is not None and length < len(head):
        raise ValueError(f"a budget of {length} positions: the prefix alone takes {len(head)}")
    parts = [(head, np.zeros_like(head), np.arange(len(head)), np.zeros(len(head), bool))]
    indices, owners = [conversations[0].codebook[:0]], list[int]()
    kept, start = list[int](), len(head)
    for number, (ids, loss_mask, codebook) in enumerate(conversations):
        own = np.arange(len(ids) - skip)
        fits = length is None or start + len(own) <= length
        if not fits or (targets is not None and len(owners) + len(codebook) > targets):
            continue
        kept.append(number)
        parts.append((ids[skip:], 0 * own + len(kept), own + len(head), loss_mask[skip:]))
        before = start + codebook - skip - 1
        indices.append(np.where(before < start, len(head) - 1, before))
        owners += [len(kept)] * len(codebook)
        start += len(own)
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
    """The written conversation, cut where an image stands."""
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
