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
import json
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers

from pixellm_jax.errors import InputError

IM_START, IM_END = "<im_start>", "<im_end>"
_BLANK = "▁"
_PIECES, _WHOLE, _CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_ADDED, _MAP = "added_tokens.json", "special_tokens_map.json"
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True, kw_only=True, eq=False)
class SentencePieceChunks:
    """Encodes stretches of text without added tokens by a `tokenizer.model`.

    Not `legacy`: only a stretch that begins the text (`first`) gets a dummy blank.
    """

    model: sentencepiece.SentencePieceProcessor
    legacy: bool

    @property
    def size(self) -> int:
        return self.model.get_piece_size()

    def find(self, token: str) -> int | None:
        index = self.model.piece_to_id(token)
        return index if self.model.id_to_piece(index) == token else None

    def encode(self, text: str, *, first: bool) -> list[int]:
        if self.legacy:
            return self.model.encode(text)
        text = text.replace(_BLANK, " ")
        ids = self.model.encode(text)
        head = self.model.id_to_piece(ids[0]) if ids else ""
        if first or text.startswith(" ") or not head.startswith(_BLANK):
            return ids
        return ([self.model.piece_to_id(head[1:])] if head != _BLANK else []) + ids[1:]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class JsonChunks:
    """Does the same by the `tokenizer.json` of a folder that has no `tokenizer.model`."""

    model: tokenizers.Tokenizer

    @property
    def size(self) -> int:
        return self.model.get_vocab_size(with_added_tokens=False)

    def find(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def encode(self, text: str, *, first: bool) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """Every id of a model, looked up by its string; nothing else in the project knows ids.

    added: token -> id of what the folder adds to its base tokenizer, in order of ids.
    special: the registered special tokens; whether they swallow white space.
    bos, eos, unk, im_start, im_end: ids.
    codebook: ids [s][k]. The tokens are `[SEG0]`, `[SEG1]`, ..., scale by scale: with N tokens per
        scale, `[SEGi]` is token `i % N` of scale `i // N`. A codebook of one token is `[SEG]`.
    group_text: the string of one target: all codebook tokens in order, joined by single spaces.
    """

    folder: Path
    chunks: SentencePieceChunks | JsonChunks
    added: Mapping[str, int]
    special: Mapping[str, bool]
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

        `tokenizer.model` (or, in its absence, `tokenizer.json`) gives the base ids. Added tokens
        are taken from `added_tokens.json`, from `added_tokens_decoder` of `tokenizer_config.json`
        and from `added_tokens` of `tokenizer.json`.

        Raises:
            InputError: files or tokens are missing, or contradict each other, or the number of
                codebook tokens is not a multiple of `scales`.
        """
        return cls._build(folder, scales, _read(folder))

    @classmethod
    def with_codebook(cls, folder: Path, *, tokens_per_scale: int, scales: int) -> Vocabulary:
        """Reads a LLaVA tokenizer folder and appends what PixelLM needs: the start of a training.

        Codebook tokens first, then `<im_start>` and `<im_end>`; those that exist keep their ids.

            32000 ids, 3 tokens per scale, 2 scales
            ->  [SEG0]..[SEG5] 32000..32005, <im_start> 32006, <im_end> 32007

        Raises:
            InputError: as `load`, or the folder has a codebook of another size.
        """
        base, count = _read(folder), tokens_per_scale * scales
        wanted = ["[SEG]"] if count == 1 else [f"[SEG{i}]" for i in range(count)]
        for token in (*wanted, IM_START, IM_END):
            if base.find(token) is None:
                base.added[token] = base.size
        vocabulary = cls._build(folder, scales, base)
        if vocabulary.group_text != " ".join(wanted):
            raise InputError(
                f"{folder}: found the codebook {vocabulary.group_text}, expected {count} tokens; "
                "ask for the size it has, or start from a folder without a codebook"
            )
        return vocabulary

    @classmethod
    def _build(cls, folder: Path, scales: int, base: _Base) -> Vocabulary:
        count = next(i for i in itertools.count() if base.find(f"[SEG{i}]") is None)
        gap = any(re.fullmatch(r"\[SEG\d+\]", t) and int(t[4:-1]) > count for t in base.added)
        tokens = [f"[SEG{i}]" for i in range(count + gap)] or ["[SEG]"]
        found = {token: base.find(token) for token in (*base.special, IM_START, IM_END, *tokens)}
        ids = {token: index for token, index in found.items() if index is not None}
        if missing := [token for token in found if token not in ids]:
            raise InputError(
                f"{folder}: found no token {', '.join(missing)}; expected the tokenizer of a "
                "PixelLM model (Vocabulary.with_codebook adds what that of LLaVA lacks)"
            )
        per_scale, rest = divmod(len(tokens), scales)
        if rest:
            raise InputError(
                f"{folder}: found {len(tokens)} codebook tokens ({tokens[0]} to {tokens[-1]}), "
                f"expected a multiple of {scales} scales; correct the number of scales"
            )
        bos, eos, unk = (ids[token] for token in base.special)
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
        return max(self.chunks.size, 1 + max(self.added.values(), default=-1))

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
    def marks(self) -> frozenset[int]:
        """Ids that are no text: special, added, image and codebook tokens."""
        return frozenset(self._ids.values())

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of a text, in time linear in its length; `bos` puts the start token in front."""
        ids, _ = self.encode_parts([text])
        return [self.bos, *ids] if bos else ids

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of the joined parts, without a start token, and for each the part it begins in.

        The ids are those of the whole text: cutting it into parts never changes them.

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
            last = bisect_right(starts, end - 1)
            found = [token] if token is not None else self._encode(text, begin, end)
            own = [owner] * len(found)
            for start in starts[owner + 1 : last] if token is None else ():
                cut = len(os.path.commonprefix([self._encode(text, begin, start), found]))
                own[cut:] = [bisect_right(starts, start) - 1] * (len(found) - cut)
            ids += found
            owners += own
        return ids, owners

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids: blanks around every added token, as transformers 4.31 writes it.

        `skip_special` leaves the registered special tokens out.

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
        for added, run in itertools.groupby(ids, key=names.__contains__):
            if added:
                pieces += [names[index] for index in run]
            else:
                pieces.append(self._decode(run))
        return " ".join(pieces)

    def save(self, folder: Path) -> None:
        """Writes the files that `load`, and transformers, read back."""
        folder.mkdir(parents=True, exist_ok=True)
        added = {token: index for token, index in self.added.items() if index >= self.chunks.size}
        config = _read_json(self.folder / _CONFIG)
        config.pop("added_tokens_decoder", None)  # transformers would believe it, not the next file
        for name, value in {_ADDED: added, _CONFIG: config}.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        for name in (_PIECES, _MAP):
            source, copy = self.folder / name, folder / name
            if source.is_file() and source.resolve() != copy.resolve():
                shutil.copyfile(source, copy)
        if isinstance(self.chunks, JsonChunks):
            whole = tokenizers.Tokenizer.from_file(str(self.folder / _WHOLE))
            whole.add_tokens(list(added))
            whole.save(str(folder / _WHOLE))

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Id of every token at which text is split."""
        im = {IM_START: self.im_start, IM_END: self.im_end}
        special = dict(zip(self.special, (self.bos, self.eos, self.unk), strict=True))
        codebook = dict(zip(self.group_text.split(), self.group, strict=True))
        return {**special, **im, **codebook, **self.added}

    @cached_property
    def _splitter(self) -> re.Pattern[str]:
        longest_first = sorted(self._ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    def _split(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """Tokens (begin, end, id) and the stretches between them (begin, end, None), in order."""
        begin, swallow = 0, False
        for match in itertools.chain(self._splitter.finditer(text), [None]):
            end = match.start() if match else len(text)
            if swallow:
                begin = end - len(text[begin:end].lstrip())
            swallow = match is not None and self.special.get(match[0], True)
            if swallow:
                end = begin + len(text[begin:end].rstrip())
            if begin < end:
                yield begin, end, None
            if match:
                yield *match.span(), self._ids[match[0]]
                begin = match.end()

    def _encode(self, text: str, begin: int, end: int) -> list[int]:
        return self.chunks.encode(text[begin:end], first=begin == 0)

    def _decode(self, ids: Iterable[int]) -> str:
        special = {self._ids[token]: token for token in self.special}
        text, words = "", list[int]()
        for index in ids:
            if index in special:
                text += (" " + self.chunks.decode(words) if words else "") + special[index]
                words = []
            else:
                words.append(index)
        return text + self.chunks.decode(words)


class _Base(NamedTuple):
    """What the files of a folder say."""

    chunks: SentencePieceChunks | JsonChunks
    added: dict[str, int]
    special: dict[str, bool]

    @property
    def size(self) -> int:
        return max(self.chunks.size, 1 + max(self.added.values(), default=-1))

    def find(self, token: str) -> int | None:
        return self.added[token] if token in self.added else self.chunks.find(token)


def _read(folder: Path) -> _Base:
    config, whole = _read_json(folder / _CONFIG), _read_json(folder / _WHOLE)
    chunks = _read_chunks(folder, legacy=config.get("legacy") is not False)
    records = [r | {"id": int(i)} for i, r in config.get("added_tokens_decoder", {}).items()]
    found: dict[str, int] = _read_json(folder / _ADDED)
    for record in records + whole.get("added_tokens", []):
        token, index = record["content"], record["id"]
        if found.setdefault(token, index) != index:
            raise InputError(
                f"{folder}: token {token} has the ids {found[token]} and {index} in different "
                "files, expected one; copy the whole folder again"
            )
    special: dict[str, bool] = {}
    from_map = _read_json(folder / _MAP)
    for role, default in _SPECIAL.items():
        entry = from_map.get(role) or config.get(role) or default
        # To transformers 4.31, a plain string in this one file is not a registered token.
        if isinstance(entry, str):
            special[entry] = role in from_map
        else:
            special[entry["content"]] = False
    ordered = sorted(found.items(), key=lambda item: item[1])
    added = {token: i for token, i in ordered if not (token in special and i < chunks.size)}
    return _Base(chunks, added, special)


def _read_chunks(folder: Path, *, legacy: bool) -> SentencePieceChunks | JsonChunks:
    pieces, whole = str(folder / _PIECES), str(folder / _WHOLE)
    try:
        if os.path.isfile(pieces):
            model = sentencepiece.SentencePieceProcessor(model_file=pieces)
            return SentencePieceChunks(model=model, legacy=legacy)
        if os.path.isfile(whole):
            return JsonChunks(model=tokenizers.Tokenizer.from_file(whole))
    except Exception as error:  # neither library raises a narrower class
        raise InputError(f"{folder}: the tokenizer cannot be read ({error}); copy it again") from (
            error
        )
    raise InputError(
        f"{folder}: found no {_PIECES} and no {_WHOLE}; expected a tokenizer folder (a released "
        "model keeps these files beside its weights)"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: found a {type(value).__name__}, expected a JSON object")
    return value
