"""Text <-> token ids, and the segmentation codebook inside the vocabulary.

The released models were trained on the ids of one tokenizer: the slow LLaMA tokenizer of
transformers 4.31. Later releases treat the blanks around added tokens differently and give other
ids, so the rule lives here: the text is split at the special and added tokens; an added token
swallows the white space on both sides, a registered special token (`<s>`, `</s>`, `<unk>`) keeps
it; what is left between them is encoded stretch by stretch, each with a dummy blank in front.

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
    JsonChunks,
    SentencePieceChunks,
    TokenizerFiles,
    read_tokenizer,
    write_tokenizer,
)

IM_START, IM_END = "<im_start>", "<im_end>"


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """Every id of a model, looked up by its string; nothing else in the project knows ids.

    ids: token -> id, everything; added: only what the folder adds to its base tokenizer.
    special: the strings of start, end and unknown; those in `keeping` keep white space.
    bos, eos, unk, im_start, im_end: ids.
    codebook: ids [s][k]. The tokens are `[SEG0]`, `[SEG1]`, ..., scale by scale: with N tokens per
        scale, `[SEGi]` is token `i % N` of scale `i // N`. A codebook of one token is `[SEG]`.
    group_text: the string of one target: all codebook tokens in order, joined by single spaces.
    """

    folder: Path
    chunks: SentencePieceChunks | JsonChunks
    ids: Mapping[str, int]
    added: Mapping[str, int]
    special: tuple[str, str, str]
    keeping: frozenset[str]
    bos: int
    eos: int
    unk: int
    im_start: int
    im_end: int
    codebook: tuple[tuple[int, ...], ...]
    group_text: str

    @classmethod
    def load(cls, folder: Path, *, scales: int) -> Vocabulary:
        """Reads a tokenizer folder that holds the codebook, for `scales` feature scales.

        `tokenizer.model` (without it, `tokenizer.json`) gives the base ids; added tokens may stand
        in `added_tokens.json`, in `tokenizer_config.json` and in `tokenizer.json`.

        Raises:
            InputError: files or tokens are missing or contradict each other, or the codebook
                tokens are no multiple of `scales`.
        """
        return cls._build(folder, scales, read_tokenizer(folder))

    @classmethod
    def with_codebook(cls, folder: Path, *, tokens_per_scale: int, scales: int) -> Vocabulary:
        """Reads a LLaVA tokenizer folder and appends what PixelLM needs: the start of a training.

        Codebook tokens first, then `<im_start>` and `<im_end>`; those that exist keep their ids.

            32000 ids, 3 tokens per scale, 2 scales
            ->  [SEG0]..[SEG5] 32000..32005, <im_start> 32006, <im_end> 32007

        Raises:
            InputError: as `load`, or the folder has a codebook of another size.
        """
        base, count = read_tokenizer(folder), tokens_per_scale * scales
        wanted = ["[SEG]"] if count == 1 else [f"[SEG{i}]" for i in range(count)]
        for token in (*wanted, IM_START, IM_END):
            if token not in base.ids:
                base.ids[token] = base.added[token] = 1 + max(base.ids.values())
        vocabulary = cls._build(folder, scales, base)
        if vocabulary.group_text != " ".join(wanted):
            raise InputError(
                f"{folder}: found the codebook {vocabulary.group_text}, expected {count} tokens; "
                "ask for this size, or start from a folder without a codebook"
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
                "PixelLM model (Vocabulary.with_codebook adds what that of LLaVA lacks)"
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
        """Number of ids, the added ones included: rows of the embedding table."""
        return 1 + max(self.ids.values())

    @property
    def pad(self) -> int:
        """Fills a batch: the id of `<unk>`, as in the released models."""
        return self.unk

    @property
    def scales(self) -> int:
        return len(self.codebook)

    @property
    def tokens_per_scale(self) -> int:
        return len(self.codebook[0])

    @property
    def group(self) -> tuple[int, ...]:
        """The ids of one target in order, scale by scale."""
        return tuple(itertools.chain.from_iterable(self.codebook))

    @cached_property
    def known(self) -> frozenset[int]:
        """Every id that has a token."""
        return frozenset(self.ids.values())

    @cached_property
    def marks(self) -> frozenset[int]:
        """Ids that are no text: special, added, image and codebook tokens."""
        tokens = (*self.special, *self.group_text.split(), IM_START, IM_END, *self.added)
        return frozenset(self.ids[token] for token in tokens)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of a text, in time linear in its length; `bos` puts the start token in front."""
        return [self.bos] * bos + self.encode_parts([text])[0]

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of the joined parts, as of one text without start token, and each id's part.

        ["USER: hi ASSISTANT:", " It is</s>"]
        ->  "▁USER" ":" "▁hi" "▁ASSISTANT" ":" "▁It" "▁is" </s>
               0     0    0        0        0    1     1     1
        """
        text = "".join(parts)
        starts = list(itertools.accumulate(map(len, parts[:-1]), initial=0))
        ids, owners = list[int](), list[int]()
        for begin, end, token in self._split(text):
            owner = bisect_right(starts, begin) - 1
            found = [token] if token is not None else self._encode(text, begin, end)
            own = [owner] * len(found)
            for later in range(owner + 1, bisect_right(starts, end - 1) if token is None else 0):
                before = self._encode(text, begin, starts[later])
                cut = len(os.path.commonprefix([before, found]))
                own[cut:] = [later] * (len(found) - cut)
            ids += found
            owners += own
        return ids, owners

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids, as transformers 4.31 writes it; `skip_special`: without special tokens.

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
        """Writes the files that `load`, and transformers, read back."""
        write_tokenizer(self.folder, folder, self.added)

    @cached_property
    def _splitter(self) -> re.Pattern[str]:
        tokens = [token for token, index in self.ids.items() if index in self.marks]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def find_groups(self, ids: Int32[np.ndarray, "t"]) -> Int32[np.ndarray, "m s k"]:
        """Indices of the complete, ordered groups of codebook tokens: one group per target."""
        group, values = list(self.group), ids.tolist()
        starts = [i for i in range(len(values)) if values[i : i + len(group)] == group]
        indices = np.reshape(starts, (-1, 1)) + np.arange(len(group))
        return indices.reshape(-1, self.scales, self.tokens_per_scale).astype(np.int32)

    def _split(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """Tokens (begin, end, id) and the stretches between them (begin, end, None), in order."""
        begin, swallow = 0, False
        for match in itertools.chain(self._splitter.finditer(text), [None]):
            end = match.start() if match else len(text)
            if swallow:
                begin = end - len(text[begin:end].lstrip())
            swallow = match is not None and match[0] not in self.keeping
            if swallow:
                end = begin + len(text[begin:end].rstrip())
            if begin < end:
                yield begin, end, None
            if match:
                yield *match.span(), self.ids[match[0]]
                begin = match.end()

    def _encode(self, text: str, begin: int, end: int) -> list[int]:
        return self.chunks.encode(text[begin:end], first=begin == 0)

    def _decode(self, ids: Iterable[int]) -> str:
        special = {self.ids[token]: token for token in self.special}
        text, words = "", list[int]()
        for index in ids:
            if index in special:
                text += (" " + self.chunks.decode(words) if words else "") + special[index]
                words = []
            else:
                words.append(index)
        return text + self.chunks.decode(words)
