"""Tokenizer folders on disk: SentencePiece or `tokenizer.json`, and the added tokens."""

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
class SentencePieceEncoder:
    """Encoder of `tokenizer.model` for text without added tokens.

    `legacy`: every stretch of text gets a dummy blank in front; otherwise only the first does.
    """

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
class JsonEncoder:
    """Encoder of `tokenizer.json`: the same ids for words, though not always for stray blanks."""

    model: tokenizers.Tokenizer

    def encode(self, text: str, *, first: bool) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


class TokenizerFiles(NamedTuple):
    """Contents of a tokenizer folder.

    Attributes:
        encoder: of text without added tokens.
        ids: id of every token.
        added: id of every added token.
        special: start, end and unknown token.
        keep_blanks: special tokens that keep the white space around them.
    """

    encoder: SentencePieceEncoder | JsonEncoder
    ids: dict[str, int]
    added: dict[str, int]
    special: tuple[str, ...]
    keep_blanks: frozenset[str]


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read a tokenizer folder.

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
    config = read_optional_json(folder / _CONFIG)
    whole = read_optional_json(folder / _WHOLE)
    encoder, base = _read_encoder(folder, legacy=config.get("legacy") is not False)
    records = [r | {"id": int(i)} for i, r in config.get("added_tokens_decoder", {}).items()]
    ids: dict[str, int] = read_optional_json(folder / _ADDED)
    for record in records + whole.get("added_tokens", []):
        token, index = record["content"], record["id"]
        if ids.setdefault(token, index) != index:
            clash = f"token {token} has the ids {ids[token]} and {index}, expected one"
            raise InputError(f"{folder}: {clash}; copy the whole folder again")
    if bad := [token for token, index in ids.items() if type(index) is not int or index < 0]:
        raise InputError(f"{folder}: tokens {bad} have no whole number as id; copy it again")
    from_map = read_optional_json(folder / _MAP)
    entries = [from_map.get(role) or config.get(role) or text for role, text in _SPECIAL.items()]
    special = tuple(entry if isinstance(entry, str) else entry["content"] for entry in entries)
    # transformers 4.31 does not register a token that is a plain string in this one file.
    keep_blanks = frozenset(special) - {str(from_map.get(role)) for role in _SPECIAL}
    added = {token: i for token, i in ids.items() if not (token in special and token in base)}
    added = dict(sorted(added.items(), key=lambda item: item[1]))
    return TokenizerFiles(encoder, base | added, added, special, keep_blanks)


def write_tokenizer(source: Path, folder: Path, added: Mapping[str, int]) -> None:
    """Copy a tokenizer folder with other added tokens; transformers can read it too."""
    folder.mkdir(parents=True, exist_ok=True)
    config = read_optional_json(source / _CONFIG)
    config.pop("added_tokens_decoder", None)  # it would override added_tokens.json
    for name, value in {_ADDED: added, _CONFIG: config}.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    for name in (_PIECES, _MAP):
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
    if not (source / _PIECES).is_file():
        whole = tokenizers.Tokenizer.from_file(str(source / _WHOLE))
        whole.add_tokens(list(added))
        whole.save(str(folder / _WHOLE))


def _read_encoder(
    folder: Path, *, legacy: bool
) -> tuple[SentencePieceEncoder | JsonEncoder, dict[str, int]]:
    """Return the base tokenizer, and its tokens with their ids."""
    pieces, whole = str(folder / _PIECES), str(folder / _WHOLE)
    try:
        if os.path.isfile(pieces):
            model = sentencepiece.SentencePieceProcessor(model_file=pieces)
            ids = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
            return SentencePieceEncoder(model=model, legacy=legacy), ids
        if os.path.isfile(whole):
            encoder = JsonEncoder(model=tokenizers.Tokenizer.from_file(whole))
            encoder.model.no_truncation()
            encoder.model.no_padding()
            return encoder, encoder.model.get_vocab(with_added_tokens=False)
    except Exception as error:  # neither library documents a narrower class
        message = f"{folder}: the tokenizer cannot be read ({error}); copy it again"
        raise InputError(message) from error
    found = f"found neither {_PIECES} nor {_WHOLE}"
    raise InputError(
        f"{folder}: {found}; expected a tokenizer folder (often the folder of the weights)"
    )
