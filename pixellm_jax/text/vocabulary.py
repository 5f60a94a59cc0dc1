"""Tokenizer of the released models, with the segmentation codebook in its vocabulary.

The released models were trained on the ids of one tokenizer: the slow LLaMA tokenizer of
transformers 4.31. Later releases treat the blanks around added tokens differently and give other
ids, so the rule is implemented here: the text is split at special and added tokens; an added token
strips the white space on both sides, a registered special token (`<s>`, `</s>`, `<unk>`) keeps it;
each stretch of text between them is encoded separately, with a dummy blank in front.

    "It is [SEG0]  [SEG1]."   ->   "▁It" "▁is" [SEG0] [SEG1] "▁" "."
"""

from __future__ import annotations

import itertools
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from pixellm_jax.errors import InputError
from pixellm_jax.text.tokenizer import (
    JsonEncoder,
    SentencePieceEncoder,
    TokenizerFiles,
    read_tokenizer,
    write_tokenizer,
)

IM_START, IM_END = "<im_start>", "<im_end>"


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """Tokenizer and codebook of a model. No other module hard-codes an id.

    Example:
        vocabulary = Vocabulary.load(folder, scales=2)
        ids = vocabulary.encode("It is [SEG0] [SEG1].")
        vocabulary.find_groups(np.asarray(ids))  # i32[1 2 1]
    """

    folder: Path
    encoder: SentencePieceEncoder | JsonEncoder
    """Encoder of text without added tokens."""
    ids: Mapping[str, int]
    """Id of every token."""
    added: Mapping[str, int]
    """Id of every token that the folder adds to its base tokenizer."""
    special: tuple[str, str, str]
    """Start, end and unknown token."""
    keep_blanks: frozenset[str]
    """Special tokens that keep the white space around them."""
    bos: int
    eos: int
    unk: int
    im_start: int
    im_end: int
    codebook: tuple[tuple[int, ...], ...]
    """Ids [s][k]. The tokens are `[SEG0]`, `[SEG1]`, ..., scale by scale: with N tokens per scale,
    `[SEGi]` is token `i % N` of scale `i // N`. A codebook of one token is `[SEG]`."""
    group_text: str
    """Text of one target: all codebook tokens in order, joined by single spaces."""

    @classmethod
    def load(cls, folder: Path, *, scales: int) -> Vocabulary:
        """Load a tokenizer folder that holds the codebook, for `scales` feature scales.

        `tokenizer.model` (or else `tokenizer.json`) defines the base ids; added tokens may be
        in `added_tokens.json`, in `tokenizer_config.json` and in `tokenizer.json`.

        Raises:
            InputError: files or tokens are missing or contradict each other, or the number of
                codebook tokens is not a multiple of `scales`.
        """
        return cls._build(folder, scales, read_tokenizer(folder))

    @classmethod
    def with_codebook(cls, folder: Path, *, tokens_per_scale: int, scales: int) -> Vocabulary:
        """Load a LLaVA tokenizer folder and append the tokens of PixelLM, to start a training.

        Codebook tokens first, then `<im_start>` and `<im_end>`; existing tokens keep their ids.

            32000 ids, 3 tokens per scale, 2 scales
            ->  [SEG0]..[SEG5] 32000..32005, <im_start> 32006, <im_end> 32007

        Raises:
            InputError: as for `load`, or the folder has a codebook of another size.
        """
        base = read_tokenizer(folder)
        count = tokens_per_scale * scales
        wanted = ["[SEG]"] if count == 1 else [f"[SEG{i}]" for i in range(count)]
        for token in (*wanted, IM_START, IM_END):
            if token not in base.ids:
                base.ids[token] = base.added[token] = 1 + max(base.ids.values())
        vocabulary = cls._build(folder, scales, base)
        if vocabulary.group_text != " ".join(wanted):
            raise InputError(
                f"{folder}: found the codebook {vocabulary.group_text}, expected {count} tokens; "
                "choose this size, or start from a folder without a codebook"
            )
        return vocabulary

    @classmethod
    def _build(cls, folder: Path, scales: int, base: TokenizerFiles) -> Vocabulary:
        numbers = [token for token in base.ids if re.fullmatch(r"\[SEG\d+\]", token)]
        tokens = [f"[SEG{i}]" for i in range(len(numbers))] or ["[SEG]"]
        ids, needed = base.ids, (*base.special, IM_START, IM_END, *tokens)
        if missing := [token for token in needed if token not in ids]:
            raise InputError(
                f"{folder}: found no token {', '.join(missing)}; expected the tokenizer of a "
                "PixelLM model (Vocabulary.with_codebook adds what LLaVA's tokenizer lacks)"
            )
        if len({ids[token] for token in needed}) != len(needed):
            names = ", ".join(f"{token} {ids[token]}" for token in needed)
            raise InputError(f"{folder}: tokens share an id ({names}); copy the tokenizer again")
        per_scale, rest = divmod(len(tokens), scales)
        if rest:
            raise InputError(
                f"{folder}: found {len(tokens)} codebook tokens ({tokens[0]} to {tokens[-1]}), "
                f"expected a multiple of {scales} scales; correct the number of scales"
            )
        bos, eos, unk = map(ids.__getitem__, base.special)
        group = [ids[token] for token in tokens]
        return cls(
            folder=folder,
            **base._asdict(),
            bos=bos,
            eos=eos,
            unk=unk,
            im_start=ids[IM_START],
            im_end=ids[IM_END],
            codebook=tuple(tuple(group[s * per_scale :][:per_scale]) for s in range(scales)),
            group_text=" ".join(tokens),
        )

    @property
    def size(self) -> int:
        """Number of ids, including added tokens: rows of the embedding table."""
        return 1 + max(self.ids.values())

    @property
    def pad(self) -> int:
        """Id that pads a batch: `<unk>`, as in the released models."""
        return self.unk

    @property
    def scales(self) -> int:
        return len(self.codebook)

    @property
    def tokens_per_scale(self) -> int:
        return len(self.codebook[0])

    @property
    def group(self) -> tuple[int, ...]:
        """Ids of one target in order, scale by scale."""
        return tuple(itertools.chain.from_iterable(self.codebook))

    @cached_property
    def known(self) -> frozenset[int]:
        """All ids that have a token."""
        return frozenset(self.ids.values())

    @cached_property
    def marks(self) -> frozenset[int]:
        """Ids that are not text: special, added, image and codebook tokens."""
        tokens = (*self.special, *self.group_text.split(), IM_START, IM_END, *self.added)
        return frozenset(self.ids[token] for token in tokens)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Encode a text in linear time; `bos` puts the start token in front."""
        return [self.bos] * bos + self.encode_parts([text])[0]

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Encode the joined parts without start token; also return the part that each id is from.

        ["USER: hi ASSISTANT:", " It is</s>"]
        ->  "▁USER" ":" "▁hi" "▁ASSISTANT" ":" "▁It" "▁is" </s>
               0     0    0        0        0    1     1     1
        """
        text = "".join(parts)
        starts = list(itertools.accumulate(map(len, parts[:-1]), initial=0))
        ids: list[int] = []
        owners: list[int] = []
        for begin, end, token in self._split(text):
            owner = bisect_right(starts, begin) - 1
            stretch = [token] if token is not None else self._encode(text, begin, end)
            stretch_owners = [owner] * len(stretch)
            for later in range(owner + 1, bisect_right(starts, end - 1) if token is None else 0):
                before = self._encode(text, begin, starts[later])
                cut = len(os.path.commonprefix([before, stretch]))
                stretch_owners[cut:] = [later] * (len(stretch) - cut)
            ids += stretch
            owners += stretch_owners
        return ids, owners

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Decode ids to the text of transformers 4.31; `skip_special` omits special tokens.

            [▁It, ▁is, [SEG0], [SEG1], ▁, ., </s>]  ->  "It is [SEG0] [SEG1]  .</s>"

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = [int(index) for index in ids]
        if bad := [index for index in ids if not 0 <= index < self.size]:
            raise ValueError(f"ids {bad} are outside the vocabulary of {self.size}")
        if skip_special:
            ids = [index for index in ids if index not in (self.bos, self.eos, self.unk)]
        names = {index: token for token, index in self.added.items()}
        pieces: list[str] = []
        for name, run in itertools.groupby(ids, key=names.get):
            words = list(run)
            pieces += [name] * len(words) if name else [self._decode(words)]
        return " ".join(pieces)

    def save(self, folder: Path) -> None:
        """Write the files that `load` and transformers read."""
        write_tokenizer(self.folder, folder, self.added)

    @cached_property
    def _splitter(self) -> re.Pattern[str]:
        tokens = [token for token, index in self.ids.items() if index in self.marks]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def find_groups(self, ids: Int32[np.ndarray, "t"]) -> Int32[np.ndarray, "m s k"]:
        """Return the indices of complete, ordered codebook groups: one group per target."""
        group, values = list(self.group), ids.tolist()
        starts = [i for i in range(len(values)) if values[i : i + len(group)] == group]
        indices = np.reshape(starts, (-1, 1)) + np.arange(len(group))
        return indices.reshape(-1, self.scales, self.tokens_per_scale).astype(np.int32)

    def _split(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """Yield special tokens (begin, end, id) and stretches between them (begin, end, None)."""
        begin = 0
        strip = False
        for match in itertools.chain(self._splitter.finditer(text), [None]):
            end = match.start() if match else len(text)
            if strip:
                begin = end - len(text[begin:end].lstrip())
            strip = match is not None and match[0] not in self.keep_blanks
            if strip:
                end = begin + len(text[begin:end].rstrip())
            if begin < end:
                yield begin, end, None
            if match:
                yield *match.span(), self.ids[match[0]]
                begin = match.end()

    def _encode(self, text: str, begin: int, end: int) -> list[int]:
        return self.encoder.encode(text[begin:end], first=begin == 0)

    def _decode(self, ids: Iterable[int]) -> str:
        special = {self.ids[token]: token for token in self.special}
        text = ""
        words: list[int] = []
        for index in ids:
            if index in special:
                text += (" " + self.encoder.decode(words) if words else "") + special[index]
                words = []
            else:
                words.append(index)
        return text + self.encoder.decode(words)
