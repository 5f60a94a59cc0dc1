"""Detokenisation of answers: generated ids -> text, positions of targets and of their names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from pixellm_jax.text.vocabulary import Vocabulary

_Span = tuple[int, int]  # [begin, end) in characters

MARKER = "[SEG]"
"""Stands for a target in the text of an answer."""


class AnswerText(NamedTuple):
    """A generated answer as text, in which each target is written `MARKER`.

    Attributes:
        text: special tokens and incomplete targets are left out.
        codebook_index: index in the generated ids of each codebook token of each target.
        markers: [begin, end) in characters of each marker; the same letters elsewhere are text.
        phrases: [begin, end) in characters of the words that name the target, a heuristic; empty
            if nothing names it.
    """

    text: str
    codebook_index: Int32[np.ndarray, "m s k"]
    markers: Int32[np.ndarray, "m 2"]
    phrases: Int32[np.ndarray, "m 2"]


def read_answer(
    vocabulary: Vocabulary,
    ids: Sequence[int] | Int[np.ndarray, "t"],
    codebook_index: Int32[np.ndarray, "m s k"] | None = None,
) -> AnswerText:
    """Read generated ids, without the prompt, up to the first `</s>`.

    Each complete, ordered group of codebook tokens is a target. Codebook tokens outside such
    groups, and other special and added tokens, are left out of the text; the rest is unaffected.
    With a `codebook_index`, only the groups in it are targets.

        "▁The" "▁cup" "▁is" [SEG0] [SEG1] "▁" "." </s>     (a codebook of two tokens)
        ->  "The cup is [SEG].", codebook_index [[[3], [4]]], markers [[11, 16]], phrases [[0, 7]]
    """
    ids = np.asarray(ids, np.int32)
    ids = ids[: next(iter(np.flatnonzero(ids == vocabulary.eos)), len(ids))]
    codebook = vocabulary.find_groups(ids) if codebook_index is None else codebook_index
    codebook = codebook[codebook[:, -1, -1] < len(ids)]
    in_group = np.zeros(len(ids), int)  # number of the target, from 1
    in_group[codebook] = np.arange(1, len(codebook) + 1)[:, None, None]
    # The embeddings may have more rows than there are tokens: such an id is not text.
    text_ids = vocabulary.known - vocabulary.marks
    is_mark = ~np.isin(ids, list(text_ids))

    text = ""
    markers: list[_Span] = []
    kinds = zip(in_group, is_mark, strict=True)
    for (target, mark), run in itertools.groupby(enumerate(kinds), key=lambda kind: kind[1]):
        if mark and not target:
            continue
        addition = MARKER if target else vocabulary.decode([int(ids[i]) for i, _ in run])
        addition = addition.lstrip(" " if text else None)
        if text and not (text.endswith(_NO_GAP_AFTER) or _NO_GAP_BEFORE.match(addition)):
            text += " "
        text += addition
        if target:
            markers.append((len(text) - len(MARKER), len(text)))
    phrases = find_phrases(text, markers)
    spans = [np.asarray(part, np.int32).reshape(-1, 2) for part in (markers, phrases)]
    return AnswerText(text.rstrip(), codebook, *spans)


_NO_GAP_AFTER = tuple(" \t\n([{«“‘（「『")
_NO_GAP_BEFORE = re.compile(r"[\s.,;:!?)\]}»”’。，、；：！？）」』]|'s\b")
_JOINT = re.compile(r"\s*(?:[,;&]|,?\s*(?:and|or)\b)?\s*")
_IS = re.compile(r"\s*\b(?:is|are|was|were)\s*:?$")
_SENTENCES = re.compile(r"^(?s:.*)(?:[.!?;:](?:\s|$)|\n)")
_RESULT = r"(?:the\s|a\s)?segmentation(?:\s(?:results?|masks?))?"
_LINK = re.compile(rf"^(?i:[\s,;.)]+|(?:sure|yes|and|or|but|while)\b|{_RESULT}\s(?:of|for)\b)*")
_CLAUSE = re.compile(
    r"^.*(?:(?<!that )(?<!which )(?<!who )\b(?:is|are|was|were|be|sees?|shows?|has|have)\s"
    r"|,\s(?!(?:which|that|who|whose|where)\b)|\band\s(?=(?:the|an?|another|its|one|two|three)\s))"
)
_PLACE = re.compile(
    r"^(?i:(?:next to|near|beside|behind|under|above|on|in|by|with|to|of|from)\s+)*"
)
_NAMELESS = re.compile(rf"(?i:|it|they|them|this|that|these|those|he|she|here|there|{_RESULT})")
_COMMA, _AND = r",(?!\s*which\b)\s*(?:and\s+)?", r"\s+and\s+"


def find_phrases(text: str, markers: Sequence[_Span]) -> list[_Span]:
    """Find the words that name each target, by patterns of answer templates and of free text."""
    runs: list[list[_Span]] = []  # markers separated by commas and "and" only
    for marker in markers:
        if runs and _JOINT.fullmatch(text, runs[-1][-1][1], marker[0]):
            runs[-1].append(marker)
        else:
            runs.append([marker])
    phrases: list[_Span] = []
    last = 0
    for run in runs:
        begin, end, names = _naming(text, last, run[0][0], len(run))
        phrases += names or [(begin, end) if begin < end else marker[:1] * 2 for marker in run]
        last = run[-1][1]
    return phrases


def _naming(text: str, begin: int, end: int, count: int) -> tuple[int, int, list[_Span] | None]:
    """Return the words that name targets before a marker; "a, b and c are" has `count` names."""
    lead = text[begin:end].rstrip()
    subject = _IS.sub("", lead)
    bound = subject != lead
    end = begin + len(subject.rstrip(" ,;(\"'-—"))
    sentence = _SENTENCES.sub("", text[begin:end])
    name = _LINK.sub("", sentence)
    if not bound or (begin and name == sentence):
        name = _PLACE.sub("", _CLAUSE.sub("", name))
    begin = end if _NAMELESS.fullmatch(name) else end - len(name)
    for separator in (_COMMA, rf"{_COMMA}|{_AND}(?!.*{_AND})", f"{_COMMA}|{_AND}") if bound else ():
        cuts = [match.span() for match in re.compile(separator).finditer(text, begin, end)]
        names = list(zip([begin, *(b for _, b in cuts)], [*(a for a, _ in cuts), end], strict=True))
        if len(names) == count and all(a < b for a, b in names):
            return begin, end, names
    return begin, end, None
