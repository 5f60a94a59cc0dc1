"""Data loader: batches are a pure function of the config and the step."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from data_pipeline.config import DataConfig, FamilyConfig
from data_pipeline.example import Example, Target, Turn
from data_pipeline.formats.masks import encode
from data_pipeline.loader import Loader, stream
from pixellm_jax.batch import check
from pixellm_jax.errors import InputError

DATA = DataConfig(
    families=(
        FamilyConfig(weight=2.0, datasets=("a/train", "b/train")),
        FamilyConfig(weight=1.0, datasets=("c/train",)),
    ),
    batch=4,
    length=331,
    targets=7,
    masks=29,
    seed=3,
)


def png(seed, hw):
    pixels = np.random.default_rng(seed).integers(0, 256, (*hw, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def named(dataset, number, hw=(31, 47)):
    rng = np.random.default_rng(number)
    masks = tuple(encode(rng.random(hw) > 0.5) for _ in range(3))
    targets = tuple(Target((f"thing {i}",), i) for i in range(3))
    return Example(str(number), dataset, "train", "names", png(number, hw), hw, masks, targets)


def chat(number, answer="A picture."):
    hw = (23, 19)
    return Example(
        key=str(number),
        dataset="c",
        split="train",
        kind="instruct",
        image=png(number, hw),
        hw=hw,
        conversations=((Turn("What is it?", answer),),),
    )


DATASETS = {
    "a/train": [named("a", i) for i in range(5)],
    "b/train": [named("b", 10 + i, (53, 29)) for i in range(2)],
    "c/train": [chat(i) for i in range(3)],
}


@pytest.fixture(scope="module")
def model_and_vocabulary(maker, tmp_path_factory):
    config = maker.tiny()
    vocabulary = maker.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), config)
    language = replace(config.language, vocabulary=vocabulary.size)
    return replace(config, language=language), vocabulary


@pytest.fixture
def batches(model_and_vocabulary):
    def run(steps, data=DATA, datasets=DATASETS, **options):
        loader = Loader(data, *model_and_vocabulary, datasets, **options)
        try:
            return [next(loader) for _ in range(steps)]
        finally:
            loader.close()

    return run


def assert_same(actual, expected):
    for field, a, b in zip(expected._fields, actual, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=field)


def test_batches_satisfy_the_contract(batches, model_and_vocabulary):
    for batch in batches(5):
        check(batch, model_and_vocabulary[0])
        assert batch.masks[~batch.target_valid].min(initial=255) == 255
        assert batch.loss_mask.any()


@pytest.mark.parametrize("hosts", [2, 4])
def test_batches_of_hosts_join_to_the_global_batch(batches, hosts):
    whole = batches(3)
    parts = [batches(3, host=host, hosts=hosts) for host in range(hosts)]
    for step, expected in enumerate(whole):
        rows = zip(*(part[step] for part in parts), strict=True)
        assert_same(type(expected)(*map(np.concatenate, rows)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_do_not_depend_on_worker_processes(batches, workers):
    with_workers = batches(3, replace(DATA, workers=workers))
    for actual, expected in zip(with_workers, batches(3), strict=True):
        assert_same(actual, expected)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_workers_ignore_signals(model_and_vocabulary):
    loader = Loader(replace(DATA, workers=1), *model_and_vocabulary, DATASETS)
    try:
        next(loader)
        children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
        workers = [
            int(pid)
            for pid in children.split()
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        for _ in range(8):  # more than the capacity of any buffer
            next(loader)
    finally:
        loader.close()


@pytest.mark.slow
def test_resume_with_other_numbers_of_workers_and_hosts(batches, model_and_vocabulary, tmp_path):
    uninterrupted = batches(5)
    loader = Loader(DATA, *model_and_vocabulary, DATASETS)
    for _ in range(3):
        next(loader)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "state", args=ocp.args.JsonSave(loader.get_state()))
        state = checkpointer.restore(tmp_path / "state")
    loader.close()
    assert state["counts"]["examples"] == 12
    for workers, hosts in ((0, 1), (2, 2)):
        data = replace(DATA, workers=workers)
        parts = []
        for host in range(hosts):
            resumed = Loader(data, *model_and_vocabulary, DATASETS, host=host, hosts=hosts)
            resumed.set_state(state)
            parts.append(next(resumed))
            assert resumed.step == 4
            resumed.close()
        actual = type(uninterrupted[3])(*map(np.concatenate, zip(*parts, strict=True)))
        assert_same(actual, uninterrupted[3])


def test_conversations_differ_between_seeds_and_epochs(batches):
    first = batches(10)
    other = batches(10, replace(DATA, seed=4))
    assert any((a.tokens != b.tokens).any() for a, b in zip(first, other, strict=True))
    rows = [row.tobytes() for batch in first for row in batch.tokens]
    images = {row.tobytes() for batch in first for row in batch.image}
    assert len(images) == 10
    assert len(set(rows)) > 12  # forty rows of ten images; the rows of three images never change


def test_weights_of_families_and_datasets():
    names = [e.dataset for e in stream(DATA, DATASETS)[:600]]
    assert names.count("c") == 200
    assert names.count("a") == names.count("b") == 200


def test_every_epoch_contains_every_example_once():
    keys = [e.key for e in stream(DATA, DATASETS)[:90] if e.dataset == "a"]
    assert len(keys) == 30
    for epoch in range(6):
        assert sorted(keys[5 * epoch : 5 * epoch + 5]) == ["0", "1", "2", "3", "4"]


def test_conversations_over_budget_are_counted(batches, model_and_vocabulary):
    prefix = int((batches(1)[0].segment == 0).sum(axis=1).max())
    short = replace(DATA, length=prefix + 60)
    loader = Loader(short, *model_and_vocabulary, DATASETS)
    batch = next(loader)
    loader.close()
    assert loader.counts["conversations over budget"] > 0
    check(batch, model_and_vocabulary[0])


def test_damaged_example_gives_an_empty_row_and_is_counted(model_and_vocabulary, caplog):
    damaged = chat(0, answer="Here: {seg}.")._replace(kind="ready")  # it has no target
    datasets = DATASETS | {"c/train": [damaged]}
    loader = Loader(DATA, *model_and_vocabulary, datasets)
    batch = next(loader)
    rows = [i for i, key in enumerate(loader.keys) if key.startswith("c/")]
    loader.close()
    assert loader.counts["damaged examples"] == len(rows) > 0
    assert "c/train/0: left out" in caplog.text
    assert (batch.segment[rows] == -1).all() and not batch.target_valid[rows].any()
    check(batch, model_and_vocabulary[0])


def test_errors_name_the_cause(model_and_vocabulary):
    with pytest.raises(InputError, match="'c/train' is missing"):
        Loader(DATA, *model_and_vocabulary, {k: v for k, v in DATASETS.items() if k != "c/train"})
    with pytest.raises(InputError, match="'b/train' is empty"):
        Loader(DATA, *model_and_vocabulary, DATASETS | {"b/train": []})
    with pytest.raises(InputError, match="batch=4 cannot be divided among 3 hosts"):
        Loader(DATA, *model_and_vocabulary, DATASETS, hosts=3)
    for bad in ({"batch": 0}, {"length": 0}, {"families": ()}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            replace(DATA, **bad)
    with pytest.raises(InputError, match="weight"):
        DataConfig(families=(FamilyConfig(weight=0.0, datasets=("a/train",)),))


def test_state_is_small_json(model_and_vocabulary):
    loader = Loader(DATA, *model_and_vocabulary, DATASETS)
    assert json.loads(json.dumps(loader.get_state())) == {"step": 0, "counts": {}}
