"""What is asked in evaluation, and the texts of LLaVA-Instruct, against `data/decode.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.example import Example
from data_pipeline.formats.masks import decode_many
from data_pipeline.reading import Source
from data_pipeline.sources.instruct import LlavaInstruct
from data_pipeline.sources.muse import Muse
from data_pipeline.sources.reason import ReasonSeg
from data_pipeline.sources.refer import Refer
from data_pipeline.templates import LONG_QUESTIONS, fill_question
from data_pipeline.transforms import compose_evaluation
from pixellm_jax.benchmark_question import Rle
from pixellm_jax.text.prompt import LLAVA_V1
from pixellm_jax.text.vocabulary import Vocabulary

GROUP = (6, 5, 4)
"""How many sentences the sets named "multi..." ask for at once."""


@pytest.fixture(scope="module")
def decoded(goldens: Path) -> dict:
    text = (goldens / "data/decode.json").read_text(encoding="utf-8")
    return json.loads(text)["datasets"]


@pytest.fixture(scope="module")
def group_text(goldens: Path) -> str:
    folder = goldens / "tokenizer"
    return Vocabulary.with_codebook(folder, tokens_per_scale=3, scales=2).group_text


def written(messages: Sequence[str]) -> str:
    """The whole prompt, before `<image>` is wrapped; it ends in the label of an open answer."""
    text, template = LLAVA_V1.opening, LLAVA_V1
    for number, (question, answer) in enumerate(zip(messages[::2], messages[1::2], strict=True)):
        asked = question.join(template.question if number else template.first_question)
        answered = answer.join(template.answer) if answer else ""
        text += template.user + asked + template.assistant + answered
    return text


def records(masks: Sequence[Rle], hw: Sequence[int]) -> list[dict]:
    rows = decode_many(masks) if masks else np.zeros((0, *hw), np.uint8)
    return [
        {
            "shape": list(mask.shape),
            "area": int(mask.sum()),
            "sha1": hashlib.sha1(np.packbits(mask.reshape(-1)).tobytes()).hexdigest(),
        }
        for mask in rows
    ]


def same(found: list[dict], expected: list[dict]) -> bool:
    return found == [{key: record[key] for key in ("shape", "area", "sha1")} for record in expected]


def examples(source: Source, root: Path, split: str) -> list[Example]:
    return [source.read(entry).example for entry in source.entries(root, split)]


def by_image(found: Sequence[Example], root: Path, image: str) -> Example:
    data = (root / image).read_bytes()
    (example,) = [example for example in found if example.image == data]
    return example


def test_referring_sets(decoded, group_text, data_root):
    names = [name for name in decoded if name.startswith("val:") and "ReasonSeg" not in name]
    assert names
    for name in names:
        dataset, split_by, split = name.removeprefix("val:").split("|")
        group = GROUP if dataset.startswith("multi") else None
        source = Refer(dataset.removeprefix("multi"), split_by, (split,))
        found = examples(source, data_root, split)
        assert len(found) == len(decoded[name]["images"])
        for item in decoded[name]["images"]:
            example = by_image(found, data_root, item["image"])
            composed = compose_evaluation(example, group_text=group_text, group=group)
            assert [written(c.messages) for c in composed] == item["prompts"]
            masks = [example.masks[mask] for c in composed for mask in c.masks]
            assert same(records(masks, item["size_hw"]), item["masks"])


def test_reasonseg(decoded, group_text, data_root):
    names = [name for name in decoded if name.startswith("val:ReasonSeg")]
    assert names
    for name in names:
        found = examples(ReasonSeg(), data_root, name.rpartition("|")[2])
        assert len(found) == len(decoded[name]["images"])
        for item in decoded[name]["images"]:
            example = by_image(found, data_root, item["image"])
            composed = compose_evaluation(example, group_text=group_text)
            assert [written(c.messages) for c in composed] == item["prompts"]
            assert [c.masks for c in composed] == [(0,)]


@pytest.mark.parametrize("split", ["val", "test_less", "test_many"])
def test_muse(split, decoded, group_text, data_root):
    """The reference draws one of two templates; ours is the first."""
    found = examples(Muse(), data_root, split)
    for example, item in zip(found, decoded[f"muse_{split}"]["items"], strict=True):
        composed = compose_evaluation(example, group_text=group_text)
        asked = zip(
            item["questions"], item["question_template_index"], item["prompts"], strict=True
        )
        for conversation, (question, drawn, prompt) in zip(composed, asked, strict=True):
            theirs, ours = (fill_question(LONG_QUESTIONS[i], question) for i in (drawn, 0))
            assert written(conversation.messages) == prompt.replace(theirs, ours)
        assert [len(c.masks) for c in composed] == item["targets_per_question"]
        masks = [example.masks[mask] for c in composed for mask in c.masks]
        assert same(records(masks, item["size_hw"]), item["masks"])
        names = [list(c.phrases) for c in composed]
        expected = [[name[1:].rsplit(" [", 1)[0] for name in row] for row in item["target_names"]]
        assert names == expected


def test_llava_instruct(decoded, group_text, data_root):
    found = examples(LlavaInstruct(), data_root, "train")
    for example, item in zip(found, decoded["llava_instruct_150k"]["items"], strict=True):
        composed = compose_evaluation(example, group_text=group_text)
        assert [written(c.messages) for c in composed] == [item["prompt"]]
        assert composed[0].masks == ()
