"""A tokenizer folder on disk: its base encoder and its added tokens."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import tokenizers

from pixellm_jax.errors import InputError
from pixellm_jax.files import read_optional_json

_PIECES, _WHOLE, _ADDED = "tokenizer.model", "tokenizer.json", "added_tokens.json"
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True, kw_only=True, eq=False)
class SentencePieceChunks:
    """Encodes text without added tokens; not `legacy`: a dummy blank only for the `first`."""

    model: sentencepiece.SentencePieceProcessor
    legacy: bool

    def encode(self, text: str, *, first: bool) -> list[int]:
        if self.legacy:
            return self.model.encode(text)
        text = text.replace("▁", " ")
        ids = self.model.encode(text)
        head = self.model.id_to_piece(ids[0]) if ids else ""
        if first or text.startswith(" ") or not head.startswith("▁"):
            return ids
        return ([self.model.piece_to_id(head[1:])] if head != "▁" else []) + ids[1:]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class JsonChunks:
    """Does the same by `tokenizer.json`: exact ids for words, if not for stray blanks."""

    model: tokenizers.Tokenizer

    def encode(self, text: str, *, first: bool) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


class TokenizerFiles(NamedTuple):
    """What a folder says: base encoder, all tokens with ids, the added ones, the special ones.

    special: start, end and unknown token. keeping: those that keep the blanks around them.
    """

    chunks: SentencePieceChunks | JsonChunks
    ids: dict[str, int]
    added: dict[str, int]
    special: tuple[str, ...]
    keeping: frozenset[str]


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Reads a tokenizer folder.

    Raises:
        InputError: files are missing or damaged, or contradict each other.
    """
    try:
        return _read(folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{folder}: {_ADDED}, {_MAP}, {_CONFIG} or {_WHOLE} is damaged ({what}); copy it again"
        ) from None


def _read(folder: Path) -> TokenizerFiles:
    config, whole = read_optional_json(folder / _CONFIG), read_optional_json(folder / _WHOLE)
    chunks, base = _read_chunks(folder, legacy=config.get("legacy") is not False)
    records = [r | {"id": int(i)} for i, r in config.get("added_tokens_decoder", {}).items()]
    found: dict[str, int] = read_optional_json(folder / _ADDED)
    for record in records + whole.get("added_tokens", []):
        token, index = record["content"], record["id"]
        if found.setdefault(token, index) != index:
            clash = f"token {token} has the ids {found[token]} and {index}, expected one"
            raise InputError(f"{folder}: {clash}; copy the whole folder again")
    if bad := [token for token, index in found.items() if type(index) is not int or index < 0]:
        raise InputError(f"{folder}: tokens {bad} have no whole number as id; copy it again")
    from_map = read_optional_json(folder / _MAP)
    entries = [from_map.get(role) or config.get(role) or text for role, text in _SPECIAL.items()]
    special = tuple(entry if isinstance(entry, str) else entry["content"] for entry in entries)
    # A plain string in this one file is no registered token to transformers 4.31.
    keeping = frozenset(special) - {str(from_map.get(role)) for role in _SPECIAL}
    added = {token: i for token, i in found.items() if not (token in special and token in base)}
    added = dict(sorted(added.items(), key=lambda item: item[1]))
    return TokenizerFiles(chunks, base | added, added, special, keeping)


def write_tokenizer(source: Path, folder: Path, added: Mapping[str, int]) -> None:
    """Copies a tokenizer folder with other added tokens; transformers reads it too."""
    folder.mkdir(parents=True, exist_ok=True)
    config = read_optional_json(source / _CONFIG)
    config.pop("added_tokens_decoder", None)  # it would overrule added_tokens.json
    for name, value in {_ADDED: added, _CONFIG: config}.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    for name in (_PIECES, _MAP):
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
    if not (source / _PIECES).is_file():
        whole = tokenizers.Tokenizer.from_file(str(source / _WHOLE))
        whole.add_tokens(list(added))
        whole.save(str(folder / _WHOLE))


def _read_chunks(
    folder: Path, *, legacy: bool
) -> tuple[SentencePieceChunks | JsonChunks, dict[str, int]]:
    """The base tokenizer and its tokens with their ids."""
    pieces, whole = str(folder / _PIECES), str(folder / _WHOLE)
    try:
        if os.path.isfile(pieces):
            model = sentencepiece.SentencePieceProcessor(model_file=pieces)
            ids = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
            return SentencePieceChunks(model=model, legacy=legacy), ids
        if os.path.isfile(whole):
            chunks = JsonChunks(model=tokenizers.Tokenizer.from_file(whole))
            chunks.model.no_truncation()
            chunks.model.no_padding()
            return chunks, chunks.model.get_vocab(with_added_tokens=False)
    except Exception as error:  # neither library raises a narrower class
        message = f"{folder}: the tokenizer cannot be read ({error}); copy it again"
        raise InputError(message) from error
    found = f"found neither {_PIECES} nor {_WHOLE}"
    raise InputError(f"{folder}: {found}; expected a tokenizer folder (it may lie by the weights)")
