"""An epoch of each dataset of the paper's mixture contains every example and target once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from data_pipeline.config import PAPER_MIXTURE, DataConfig, FamilyConfig
from data_pipeline.errors import DamagedError
from data_pipeline.loader import Loader
from data_pipeline.sources import SOURCES
from data_pipeline.transforms import ComposeSettings
from pixellm_jax.batch import check

NAMES = [name for family in PAPER_MIXTURE for name in family.datasets]


@pytest.fixture(scope="module")
def model_and_vocabulary(maker, tmp_path_factory):
    config = maker.tiny()
    vocabulary = maker.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), config)
    language = replace(config.language, vocabulary=vocabulary.size)
    return replace(config, language=language), vocabulary


def read_all(name, root):
    dataset, split = name.split("/")
    source = SOURCES[dataset].source
    examples = []
    for entry in source.entries(root, split):
        try:
            examples.append(source.read(entry).example)
        except DamagedError:
            continue
    return examples


@pytest.mark.parametrize("name", NAMES)
def test_epoch_contains_every_example_and_target(name, data_root, model_and_vocabulary):
    examples = read_all(name, data_root)
    # Budgets and limits above those that any image needs, so that nothing is dropped.
    data = DataConfig(
        families=(FamilyConfig(weight=1.0, datasets=(name,)),),
        batch=1,
        length=6000,
        targets=64,
        masks=16,
        compose=ComposeSettings(num_classes_per_sample=64, num_classes_per_question=64),
    )
    loader = Loader(data, *model_and_vocabulary, {name: examples})
    seen = Counter()
    totals = Counter()
    for _ in examples:
        batch = next(loader)
        check(batch, model_and_vocabulary[0])
        seen[loader.keys[0]] += 1
        totals["targets"] += int(batch.target_valid.sum())
        totals["conversations"] += int(batch.segment.max())
    loader.close()
    assert sorted(seen.values()) == [1] * len(examples)
    assert loader.counts["conversations over budget"] == loader.counts["damaged examples"] == 0
    assert totals["targets"] == sum(len(example.targets) for example in examples)
    if examples[0].conversations:
        assert totals["conversations"] == sum(len(example.conversations) for example in examples)
