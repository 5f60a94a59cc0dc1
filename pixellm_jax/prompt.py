"""Conversation -> token ids, loss mask and codebook positions; and generated ids -> answer text.

Ids are those of the written conversation as a whole, but what is supervised, and what belongs to
an answer, comes from the messages and never from searching the text: a user may type `</s>` or
`ASSISTANT:`. Every non-empty answer is supervised together with its `</s>`, nothing else is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from pixellm_jax.vocabulary import IM_END, IM_START, Vocabulary

IMAGE_TOKEN = -200
"""Stands for an image in ids; in packed sequences it is repeated at every image position."""

MARKER = "[SEG]"
"""Stands for a target in the text of an answer."""

_IMAGE = "<image>"


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is written.

    A turn is the user's label, his question, the assistant's label and the answer. A message is
    put between the two strings of `first_question`, `question` or `answer`; an empty one leaves
    them out too, so that a prompt ends in the assistant's label.
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
r"""`... USER: <image>\nWhere? ASSISTANT: There.</s>USER: ...`, the template of the released models.

Source: `llava_v1` of LLaVA, system text included.
"""

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
r"""`[INST] <<SYS>>...<</SYS>>\n\n<image>\nWhere? [/INST] There. </s><s>[INST] ...`.

Source: `llava_llama_2` of LLaVA, system text included.
"""

TEMPLATES = {"llava_v1": LLAVA_V1, "llava_llama_2": LLAVA_LLAMA_2}


class Conversation(NamedTuple):
    """A conversation in ids, with one `IMAGE_TOKEN` per image.

    loss_mask: the token is supervised.
    codebook: index in `ids` of each codebook token of each target. A target is a complete group in
        the right order inside an answer; other codebook tokens are ordinary text.
    """

    ids: Int32[np.ndarray, "t"]
    loss_mask: Bool[np.ndarray, "t"]
    codebook: Int32[np.ndarray, "m s k"]


class Packed(NamedTuple):
    """The conversations of one image in one sequence: the shared prefix, then one after the other.

    tokens: `IMAGE_TOKEN` at every image position; 0 in the padding, which `segment` tells apart.
    segment: 0 prefix, 1.. conversation, -1 padding. A token sees the prefix and its own segment.
    position: counts through the prefix; each conversation continues from its end. 0 in padding.
    loss_mask: the token is supervised, by the state before it: that of the last prefix position
        for the first token of a conversation.
    codebook_index: index in the sequence of the state *before* each codebook token.
    target_conversation: segment of the target's answer; 0 in an empty slot.
    target_valid: the slot holds a target.
    kept: which conversations are in the sequence; segment i + 1 is number `kept[i]` of the input.
    dropped: how many conversations were over budget.
    """

    tokens: Int32[np.ndarray, "t"]
    segment: Int32[np.ndarray, "t"]
    position: Int32[np.ndarray, "t"]
    loss_mask: Bool[np.ndarray, "t"]
    codebook_index: Int32[np.ndarray, "m s k"]
    target_conversation: Int32[np.ndarray, "m"]
    target_valid: Bool[np.ndarray, "m"]
    kept: tuple[int, ...]
    dropped: int


class AnswerText(NamedTuple):
    """A generated answer as text.

    text: each target is written `MARKER`. The same letters may also be ordinary text: only
        `markers` tells where targets stand.
    codebook_index: index in the generated ids of each codebook token of each target.
    markers: first and last + 1 character of each target's marker.
    phrases: first and last + 1 character of the words that name the target, at best; empty, and
        at the marker, where nothing names it.
    """

    text: str
    codebook_index: Int32[np.ndarray, "m s k"]
    markers: Int32[np.ndarray, "m 2"]
    phrases: Int32[np.ndarray, "m 2"]


class _Part(NamedTuple):
    text: str
    supervised: bool


def encode_conversation(
    vocabulary: Vocabulary, template: Template, messages: Sequence[str]
) -> Conversation:
    r"""Encodes questions and answers in turn, a question first.

    Every `<image>` in a question stands for an image, and gets `<im_start>` and `<im_end>` around
    it. An answer "" is left open: a prompt, of which nothing is supervised.

        ["<image>\nWhere is the cup?", "It is [SEG0] [SEG1]."]
        ->  <s> ... "▁USER" ":" <im_start> -200 <im_end> "▁Where" ... "▁ASSISTANT" ":"
            "▁It" "▁is" [SEG0] [SEG1] "▁" "." </s>        (the second line is supervised)

    Raises:
        ValueError: the messages do not come in pairs.
    """
    return _encode(vocabulary, template, messages, one_image=False)


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
    first question as `<image>` and a line break; an `<image>` that the user typed is text.

    Raises:
        ValueError: the history does not come in pairs.
    """
    first, *others = *history, question, ""
    messages = [f"{_IMAGE}\n{first}", *others]
    return _expand(_encode(vocabulary, template, messages, one_image=True).ids, image_tokens)


def pack(
    conversations: Sequence[Conversation],
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
        ValueError: no conversation; one with several images, or with an answer before its image;
            prefixes that differ; or a budget that is shorter than the prefix.
    """
    prefix = _shared_prefix(conversations)
    head = _expand(prefix, image_tokens)
    if length is not None and length < len(head):
        raise ValueError(f"a budget of {length} positions: the prefix alone takes {len(head)}")
    kept, used, filled = [], len(head), 0
    for number, conversation in enumerate(conversations):
        size, count = len(conversation.ids) - len(prefix), len(conversation.codebook)
        fits = length is None or used + size <= length
        if fits and (targets is None or filled + count <= targets):
            kept.append(number)
            used, filled = used + size, filled + count

    segments = [np.zeros(len(head), np.int32)]
    positions = [np.arange(len(head), dtype=np.int32)]
    tokens, masks = [head], [np.zeros(len(head), bool)]
    indices, owners = [conversations[0].codebook[:0]], [np.zeros(0, np.int32)]
    start = len(head)
    for segment, number in enumerate(kept, 1):
        ids, loss_mask, codebook = conversations[number]
        own = np.arange(len(ids) - len(prefix), dtype=np.int32)
        tokens.append(ids[len(prefix) :])
        masks.append(loss_mask[len(prefix) :])
        segments.append(np.full_like(own, segment))
        positions.append(own + len(head))
        local = codebook - len(prefix)
        indices.append(np.where(local > 0, start + local - 1, len(head) - 1).astype(np.int32))
        owners.append(np.full(len(codebook), segment, np.int32))
        start += len(own)
    return Packed(
        tokens=_pad(tokens, length, 0),
        segment=_pad(segments, length, -1),
        position=_pad(positions, length, 0),
        loss_mask=_pad(masks, length, False),
        codebook_index=_pad(indices, targets, 0),
        target_conversation=_pad(owners, targets, 0),
        target_valid=_pad([np.ones(filled, bool)], targets, False),
        kept=tuple(kept),
        dropped=len(conversations) - len(kept),
    )


def read_answer(vocabulary: Vocabulary, ids: Sequence[int] | Int[np.ndarray, "t"]) -> AnswerText:
    """Reads generated ids, prompt not included, up to the first `</s>`.

    Each complete group of codebook tokens in the right order is a target. Codebook tokens outside
    such groups, and other special and added tokens, are left out of the text and cost nothing else.

        "▁The" "▁cup" "▁is" [SEG0] [SEG1] "▁" "." </s>     (a codebook of two tokens)
        ->  text "The cup is [SEG].", codebook_index [[[3], [4]]], markers [[11, 16]],
            phrases [[0, 7]]
    """
    ids = np.asarray(ids, np.int32)
    ids = ids[: next(iter(np.flatnonzero(ids == vocabulary.eos)), len(ids))]
    codebook = _groups(vocabulary, ids)
    in_group = np.zeros(len(ids), int)  # number of the target, from 1
    for number, group in enumerate(codebook, 1):
        in_group[group] = number
    is_mark = np.isin(ids, list(vocabulary.marks))

    text, markers = "", []
    for (target, mark), run in itertools.groupby(
        range(len(ids)), key=lambda i: (in_group[i], is_mark[i])
    ):
        if mark and not target:
            continue
        addition = MARKER if target else vocabulary.decode(ids[list(run)].tolist())
        if not text:
            addition = addition.lstrip()
        elif not (_NO_GAP_AFTER.search(text) or _NO_GAP_BEFORE.match(addition)):
            text += " "
        text += addition
        if target:
            markers.append((len(text) - len(MARKER), len(text)))
    return AnswerText(
        text=text.rstrip(),
        codebook_index=codebook,
        markers=np.asarray(markers, np.int32).reshape(-1, 2),
        phrases=np.asarray(_phrases(text, markers), np.int32).reshape(-1, 2),
    )


def _encode(
    vocabulary: Vocabulary, template: Template, messages: Sequence[str], *, one_image: bool
) -> Conversation:
    """`one_image`: the first `<image>` of the first question is the only one that is no text."""
    if len(messages) % 2 or not messages:
        raise ValueError(f"found {len(messages)} messages, expected questions and answers in pairs")
    ids, supervised = [vocabulary.bos], [False]
    for number, parts in enumerate(_stretches(template, messages, one_image)):
        found, owners = vocabulary.encode_parts([part.text for part in parts])
        image = [IMAGE_TOKEN] if number else []
        ids += image + found
        supervised += [False] * len(image) + [parts[owner].supervised for owner in owners]
    array, loss_mask = np.asarray(ids, np.int32), np.asarray(supervised, bool)
    codebook = _groups(vocabulary, array)
    return Conversation(array, loss_mask, codebook[loss_mask[codebook].all(axis=(1, 2))])


def _stretches(
    template: Template, messages: Sequence[str], one_image: bool
) -> Iterator[list[_Part]]:
    """The parts of the written conversation, cut where an image stands."""
    parts = [_Part(template.opening, False)]
    for turn, (question, answer) in enumerate(zip(messages[::2], messages[1::2], strict=True)):
        parts.append(_Part(template.user, False))
        if question:
            before, after = template.question if turn else template.first_question
            most = -1 if not one_image else 0 if turn else 1
            first, *others = question.split(_IMAGE, most)
            parts.append(_Part(before + first, False))
            for text in others:
                yield [*parts, _Part(IM_START, False)]
                parts = [_Part(IM_END + text, False)]
            parts.append(_Part(after, False))
        parts.append(_Part(template.assistant, False))
        if answer:
            before, after = template.answer
            parts.append(_Part(before + answer + after, True))
    yield parts


def _groups(vocabulary: Vocabulary, ids: Int32[np.ndarray, "t"]) -> Int32[np.ndarray, "m s k"]:
    """Indices of the complete, ordered groups of codebook tokens."""
    group = np.asarray(vocabulary.group)
    starts = np.zeros(0, np.int32)
    if len(ids) >= len(group):
        windows = np.lib.stride_tricks.sliding_window_view(ids, len(group))
        starts = np.flatnonzero((windows == group).all(axis=1))
    indices = starts[:, None] + np.arange(len(group))
    shape = len(starts), vocabulary.scales, vocabulary.tokens_per_scale
    return indices.reshape(shape).astype(np.int32)


def _expand(ids: Int32[np.ndarray, "t"], image_tokens: int) -> Int32[np.ndarray, "u"]:
    return np.repeat(ids, np.where(ids == IMAGE_TOKEN, image_tokens, 1))


def _pad(arrays: Sequence[np.ndarray], size: int | None, fill: int) -> np.ndarray:
    whole = np.concatenate(arrays)
    rest = 0 if size is None else size - len(whole)
    return np.pad(whole, [(0, rest)] + [(0, 0)] * (whole.ndim - 1), constant_values=fill)


def _shared_prefix(conversations: Sequence[Conversation]) -> Int32[np.ndarray, "t"]:
    if not conversations:
        raise ValueError("found no conversation to pack, expected at least one")
    prefixes = []
    for number, conversation in enumerate(conversations):
        images = np.flatnonzero(conversation.ids == IMAGE_TOKEN)
        if len(images) > 1:
            raise ValueError(f"conversation {number} has {len(images)} images, expected one")
        prefix = conversation.ids[: images[0] + 2 if len(images) else 1]
        if conversation.loss_mask[: len(prefix)].any():
            raise ValueError(f"conversation {number} has an answer before its image")
        prefixes.append(prefix)
        if not np.array_equal(prefix, prefixes[0]):
            raise ValueError(
                f"conversations 0 and {number} begin differently, so they cannot share a sequence; "
                "give them the same template and put <image> in front of the question"
            )
    return prefixes[0]


_NO_GAP_AFTER = re.compile(r"[\s(\[{«“‘（「『]$")
_NO_GAP_BEFORE = re.compile(r"[\s.,;:!?)\]}»”’。，、；：！？）」』]|'s\b")
_JOINT = re.compile(r"\s*(?:[,;&]|,?\s*(?:and|or)\b)?\s*")
_SENTENCE_END = re.compile(r"[.!?;:]\s|\n")
_IS = re.compile(r"\s*\b(?:is|are|was|were)\s*:?$")
_LEAD_IN = re.compile(
    r"(?:[\s,;.)]+|(?:sure|yes|okay|and|or|but|while|whereas)\b"
    r"|(?:the\s|a\s)?segmentation\s(?:results?|masks?)\s(?:of|for)\b)*",
    re.IGNORECASE,
)
_NAMELESS = re.compile(
    r"|it|they|them|this|that|these|those|he|she|here|there|(?:the\s)?(?:answer|target|one)s?"
    r"|(?:the\s|a\s)?segmentation(?:\s(?:results?|masks?))?",
    re.IGNORECASE,
)
_BEFORE_NAME = re.compile(
    r".*(?:(?<!that )(?<!which )(?<!who )\b(?:is|are|was|were|be|sees?|shows?|has|have|contains?)\s"
    r"|,\s(?!which\b|that\b|who\b|whose\b|where\b)"
    r"|\band\s(?=(?:the|an?|another|its|his|her|their|one|two|three)\s))"
)
_PREPOSITION = re.compile(
    r"(?:(?:next\sto|in\sfront\sof|together\swith|with|near|beside|behind|under|above|below|on|in"
    r"|by|to|at|of|from|as|for|into|over)\s+)*",
    re.IGNORECASE,
)
_BETWEEN_NAMES = (
    re.compile(r",\s*(?:and\s+)?"),
    re.compile(r",\s*(?:and\s+)?|\s+and\s+(?!.*\sand\s)"),
    re.compile(r",\s*(?:and\s+)?|\s+and\s+"),
)


def _phrases(text: str, markers: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The words that name each target, from the answer templates and the habits of free text.

    "cup and saucer are [SEG] and [SEG]"   ->   "cup", "saucer"
    "I see the red cup [SEG] [SEG]"        ->   "the red cup", "the red cup"
    """
    phrases: list[tuple[int, int]] = []
    last = 0
    while len(phrases) < len(markers):
        run = [markers[len(phrases)]]
        for marker in markers[len(phrases) + 1 :]:
            if not _JOINT.fullmatch(text, run[-1][1], marker[0]):
                break
            run.append(marker)
        begin, end, is_subject = _naming(text, last, run[0][0])
        names = _split_names(text, begin, end, len(run)) if is_subject else None
        shared = (begin, end) if begin < end else None
        phrases += names or [shared or (marker[0], marker[0]) for marker in run]
        last = run[-1][1]
    return phrases


def _naming(text: str, begin: int, end: int) -> tuple[int, int, bool]:
    """The naming words between two markers, empty if none; True if a verb binds them: "X is"."""
    after_marker = begin > 0
    begin = max([begin, *(match.end() for match in _SENTENCE_END.finditer(text, begin, end))])
    verb = _IS.search(text[begin:end].rstrip())
    end = begin + (verb.start() if verb else len(text[begin:end].rstrip(" ,:;(\"'-—")))
    lead_in = _LEAD_IN.match(text, begin, end).end()
    linked = bool(text[begin:lead_in].strip()) or not after_marker
    begin = lead_in + len(text[lead_in:end]) - len(text[lead_in:end].lstrip())
    if not (verb and linked):
        if before := _BEFORE_NAME.match(text, begin, end):
            begin = before.end()
        begin = _PREPOSITION.match(text, begin, end).end()
    if _NAMELESS.fullmatch(text, begin, end):
        begin = end
    return begin, end, verb is not None


def _split_names(text: str, begin: int, end: int, count: int) -> list[tuple[int, int]] | None:
    """Splits "a, b and c" into `count` names; None where that cannot be."""
    for separator in _BETWEEN_NAMES:
        cuts = [match.span() for match in separator.finditer(text, begin, end)]
        names = list(zip([begin, *(b for _, b in cuts)], [*(a for a, _ in cuts), end], strict=True))
        if len(names) == count and all(a < b for a, b in names):
            return names
    return None
