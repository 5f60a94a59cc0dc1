"""Training texts under recorded decisions, against `data/draws.json`."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DamagedError
from data_pipeline.example import Example
from data_pipeline.formats.masks import decode_many
from data_pipeline.reading import Source
from data_pipeline.sources.muse import Muse
from data_pipeline.sources.parts import PacoLvis, PascalPart
from data_pipeline.sources.reason import ReasonSeg
from data_pipeline.sources.refer import GREFCOCO, REFCLEF, REFCOCO, REFCOCO_PLUS, REFCOCOG
from data_pipeline.sources.semantic import Ade20k, CocoStuff, Mapillary
from data_pipeline.transforms import ComposeSettings, compose
from pixellm_jax.text.prompt import IMAGE_TOKEN, LLAVA_V1, encode_conversation
from pixellm_jax.text.vocabulary import IM_END, IM_START, Vocabulary

SOURCES: dict[str, Source] = {
    "sem_seg:ade20k": Ade20k(),
    "sem_seg:cocostuff": CocoStuff(),
    "sem_seg:mapillary": Mapillary(void_is_target=True),  # docs/reference_notes.md D20
    "sem_seg:paco_lvis": PacoLvis(),
    "sem_seg:pascal_part": PascalPart(),
    "refer_seg:refclef": REFCLEF,
    "refer_seg:refcoco": REFCOCO,
    "refer_seg:refcoco+": REFCOCO_PLUS,
    "refer_seg:refcocog": REFCOCOG,
    "refer_seg:grefcoco": GREFCOCO,
    "reason_seg:ReasonSeg|train": ReasonSeg(),
    "multi_reason_seg:train": Muse(),
}


class Replay:
    """Gives recorded decisions back, and checks that they were about the same question."""

    def __init__(self, draws: list[list]) -> None:
        self.rest = list(draws)

    def index(self, n: int) -> int:
        match self.rest.pop(0):
            case ["choice", size, chosen] | ["np_choice", size, 1, [chosen]]:
                assert size == n
                return chosen
            case other:
                raise AssertionError(f"recorded {other}, asked for one of {n}")

    def coin(self) -> bool:
        *what, side = self.rest.pop(0)
        assert what == ["randint", 0, 1]
        return bool(side)

    def uniform(self) -> float:
        what, number = self.rest.pop(0)
        assert what == "random"
        return number

    def subset(self, n: int, size: int) -> list[int]:
        *what, positions = self.rest.pop(0)
        assert what == ["np_choice", n, size]
        return positions

    def permutation(self, n: int) -> list[int]:
        what, order = self.rest.pop(0)
        assert what == "np_shuffle" and len(order) == n
        return order


def opening(family: str, draws: list[list]) -> int:
    """How many draws choose the dataset and the picture; the last one chose the picture.

    Pictures that could not be used were drawn again. With MUSE that may come late, but only its
    pictures are followed by a draw of category ids, which decides nothing.
    """
    kinds = [draw[0] for draw in draws]
    if family == "multi_reason_seg":
        pairs = zip(kinds, kinds[1:], strict=False)
        return max(i for i, pair in enumerate(pairs) if pair == ("randint", "np_choice")) + 1
    if family == "reason_seg":
        return 1
    return next(i for i, kind in enumerate(kinds) if kind != "randint")


def written(messages: tuple[str, ...]) -> str:
    """The whole prompt of a conversation of one round, before `<image>` is wrapped."""
    (question, answer), template = messages, LLAVA_V1
    asked = question.join(template.first_question)
    answered = answer.join(template.answer)
    return template.opening + template.user + asked + template.assistant + answered


def ids_of(vocabulary: Vocabulary, prompt: str) -> list[int]:
    before, after = prompt.split("<image>")
    start = vocabulary.encode(before + IM_START)
    return [*start, IMAGE_TOKEN, *vocabulary.encode(IM_END + after, bos=False)]


def checksums(example: Example, masks: tuple[int, ...]) -> list[str]:
    pixels = decode_many([example.masks[mask] for mask in masks])
    return [hashlib.sha1(np.packbits(mask.reshape(-1)).tobytes()).hexdigest() for mask in pixels]


@pytest.fixture(scope="module")
def items(goldens: Path) -> list[dict]:
    return json.loads((goldens / "data/draws.json").read_text(encoding="utf-8"))["items"]


@pytest.fixture(scope="module")
def vocabularies(goldens: Path) -> dict[int, Vocabulary]:
    load = functools.partial(Vocabulary.with_codebook, goldens / "tokenizer")
    return {1: load(tokens_per_scale=1, scales=1), 6: load(tokens_per_scale=3, scales=2)}


def examples(source: Source, root: Path) -> list[Example | None]:
    """The training examples of a dataset in its order; None for those that cannot be used."""
    found: list[Example | None] = []
    for entry in source.entries(root, "train"):
        try:
            found.append(source.read(entry).example)
        except DamagedError:
            found.append(None)
    return found


def test_every_dataset_is_known(items):
    assert {item["dataset"] for item in items} <= set(SOURCES)


@pytest.mark.parametrize("dataset", SOURCES)
def test_recorded_decisions_give_the_recorded_texts(dataset, items, vocabularies, data_root):
    family, everything = dataset.partition(":")[0], examples(SOURCES[dataset], data_root)
    for item in items:
        if item["dataset"] != dataset:
            continue
        used = opening(family, item["draws"])
        image = (data_root / item["image"]).read_bytes()
        if family == "multi_reason_seg":
            example = everything[item["draws"][used - 1][3]]
            used += 1
        else:
            (example,) = [e for e in everything if e is not None and e.image == image]
        assert example.image == image
        replay, given = Replay(item["draws"][used:]), item["settings"]
        vocabulary = vocabularies[given["seg_token_num"]]
        settings = ComposeSettings(
            num_classes_per_sample=given["num_classes_per_sample"],
            num_classes_per_question=given["num_classes_per_question"],
            explanatory=given.get("explanatory"),
            expanded=given["use_expand_question_list"],
        )
        composed = compose(example, replay, settings, group_text=vocabulary.group_text)
        assert replay.rest == []
        assert [c.messages[0] for c in composed] == item["questions"]
        assert [written(c.messages) for c in composed] == item["prompts"]
        for conversation, prompt, names in zip(
            composed, item["prompts"], item["names"], strict=True
        ):
            ids, _, codebook = encode_conversation(vocabulary, LLAVA_V1, conversation.messages)
            assert ids.tolist() == ids_of(vocabulary, prompt)
            assert len(codebook) == len(conversation.masks)
            if isinstance(names, list):
                assert list(conversation.phrases) == names
            else:
                assert names.lower() in conversation.messages[0].lower()
        masks = tuple(mask for c in composed for mask in c.masks)
        assert checksums(example, masks) == item["mask_sha1"]
