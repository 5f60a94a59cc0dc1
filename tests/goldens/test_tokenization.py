"""Tokenization, decoding, prompts and labels against `data/tokenization.json`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pixellm_jax.text.prompt import (
    IMAGE_TOKEN,
    LLAVA_V1,
    TEMPLATES,
    encode_conversation,
    pack,
    question_ids,
)
from pixellm_jax.text.vocabulary import Vocabulary

LONGEST = 257  # columns that the reference keeps in training; the models here have their own budget


@pytest.fixture(scope="module")
def golden(goldens: Path) -> SimpleNamespace:
    table = json.loads((goldens / "data/tokenization.json").read_text(encoding="utf-8"))
    vocabularies = {
        count: Vocabulary.with_codebook(
            goldens / "tokenizer", tokens_per_scale=int(count) // scales, scales=scales
        )
        for count, scales in ((m, 1 + (int(m) % 2 == 0)) for m in table["added_tokens"])
    }
    return SimpleNamespace(table=table, vocabularies=vocabularies)


def test_ids(golden):
    for count, vocabulary in golden.vocabularies.items():
        assert dict(vocabulary.added) == golden.table["added_tokens"][count]
        assert vocabulary.size == golden.table["vocab_size_with_added"][count]
        special = {name: getattr(vocabulary, name) for name in golden.table["special_ids"]}
        assert special == golden.table["special_ids"]
    assert golden.table["image_placeholder_id"] == IMAGE_TOKEN


def test_strings(golden):
    wrong = []
    for row in golden.table["strings"]:
        for count, vocabulary in golden.vocabularies.items():
            found = vocabulary.encode(row["text"]), vocabulary.encode(row["text"], bos=False)
            wanted = row["ids"][count], row["ids_without_bos"][count]
            wrong += [(row["text"], found, wanted)] if found != wanted else []
    assert wrong == []


def test_decode(golden):
    wrong = []
    for row in golden.table["decode"]:
        vocabulary = golden.vocabularies[str(row["m"])]
        text = vocabulary.decode(row["ids"])
        skipped = vocabulary.decode(row["ids"], skip_special=True)
        chat = text.replace("\n", "").replace("  ", " ")
        found, wanted = (text, skipped, chat), (
            row["text"], row["text_skip_special"], row["chat_text"],
        )  # fmt: skip
        wrong += [(found, wanted)] if found != wanted else []
    assert wrong == []


def test_chat_prompts(golden):
    for row in golden.table["chat_prompts"]:
        for count, vocabulary in golden.vocabularies.items():
            ids = question_ids(vocabulary, LLAVA_V1, row["user"], image_tokens=1)
            assert ids.tolist() == row["ids"][count], row["user"]


def test_other_templates(golden):
    for row in golden.table["other_templates"]:
        template = TEMPLATES[row["template"]]
        found = encode_conversation(golden.vocabularies["6"], template, row["messages"])
        assert found.ids.tolist() == row["ids_m6"], row["prompt"]


def correct(batch: dict) -> tuple[list[list[int]], list[list[int]]]:
    kind = "" if batch["reference_is_correct"] else "correct_"
    return batch[f"{kind}input_ids"], batch[f"{kind}labels"]


def test_batches(golden):
    ignore = golden.table["ignore_label"]
    for batch in golden.table["batches"]:
        vocabulary = golden.vocabularies[str(batch["m"])]
        rows = zip(batch["messages"], *correct(batch), strict=True)
        for messages, input_ids, labels in rows:
            ids, loss_mask, _ = encode_conversation(vocabulary, LLAVA_V1, messages)
            end = None if batch["inference"] else LONGEST
            assert ids[:end].tolist() == input_ids, batch["note"]
            assert np.where(loss_mask, ids, ignore)[:end].tolist() == labels, batch["note"]


def test_packed_batches(golden):
    """The rows of one picture in one sequence, and read back segment by segment."""
    for batch in golden.table["batches"]:
        vocabulary = golden.vocabularies[str(batch["m"])]
        first = 0
        for count in batch["rows_per_image"]:
            messages = batch["messages"][first : first + count]
            first += count
            rows = [encode_conversation(vocabulary, LLAVA_V1, row) for row in messages]
            packed = pack(rows, image_tokens=1)
            for segment, row in enumerate(rows, 1):
                own = np.isin(packed.segment, (0, segment))
                assert packed.tokens[own].tolist() == row.ids.tolist()
                assert packed.loss_mask[own].tolist() == row.loss_mask.tolist()
            assert len(packed.codebook_index) == sum(len(row.codebook) for row in rows)
