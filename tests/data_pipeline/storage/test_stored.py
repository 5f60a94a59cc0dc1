"""Prepared splits: random access to examples, and one-line errors for damaged folders."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import pytest

from data_pipeline.example import Example, Target, Turn
from data_pipeline.formats.masks import to_rle
from data_pipeline.sources import SOURCES
from data_pipeline.storage.builders import prepare
from data_pipeline.storage.stored import (
    INFO,
    METADATA,
    StoredSplit,
    find_splits,
    from_record,
    to_record,
)
from pixellm_jax.errors import InputError

SHARD_SIZE = 5


@pytest.fixture(scope="module")
def prepared(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    for name, split in (("muse", "train"), ("muse", "val"), ("refcoco+", "testA")):
        prepare(SOURCES[name].source, split, data_root, out, shard_size=SHARD_SIZE)
    return out


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Callable[[], Path]:
    """Return a function that copies muse/train, so that a test can damage it."""
    return lambda: shutil.copytree(prepared / "muse" / "train" / "1.0.0", tmp_path / "copy")


EXAMPLE = Example(
    key="\ud800 \u00e9 \U0001f600",
    dataset="d",
    split="train",
    kind="ready",
    image=bytes(range(256)),
    hw=(3, 5),
    masks=(to_rle([[0, 0, 2, 0, 2, 2, 0, 2]], (3, 5)),),
    targets=(Target(("a cup", "cup"), 0, (7, -1)),),
    void=to_rle([], (3, 5)),
    conversations=((Turn("Where?\n", "There {seg}.", (0,)), Turn("So?")),),
)


def test_record_round_trip():
    assert from_record(to_record(EXAMPLE)) == EXAMPLE
    assert from_record(to_record(EXAMPLE._replace(void=None, masks=(), targets=()))).void is None


def test_random_access(prepared):
    stored = StoredSplit(prepared / "muse" / "train" / "1.0.0")
    assert len(stored.shards) > 3
    everything = list(stored)
    assert len(stored) == len(everything) == stored.metadata["examples"]
    assert stored[-1] == everything[-1] and stored[-len(stored)] == everything[0]
    assert stored[3:9:2] == everything[3:9:2] and stored[::-1] == everything[::-1]
    assert everything[7] in stored
    for index in (len(stored), -len(stored) - 1):
        with pytest.raises(IndexError, match="no example"):
            stored[index]


def test_pickling_threads_and_grain(prepared):
    stored = StoredSplit(prepared / "muse" / "train" / "1.0.0")
    unopened = pickle.dumps(stored)
    everything = list(stored)
    assert len(pickle.dumps(stored)) == len(unopened)
    assert list(pickle.loads(unopened)) == everything
    with ThreadPoolExecutor(4) as pool:
        order = [n * 7 % len(stored) for n in range(200)]
        assert list(pool.map(pickle.loads(unopened).__getitem__, order)) == [
            everything[n] for n in order
        ]
    dataset = grain.MapDataset.source(stored).seed(3).shuffle()
    assert {example.key for example in dataset} == {example.key for example in everything}


def test_find_splits(prepared):
    def names(*parts: str, **only: str) -> list[str]:
        splits = find_splits(prepared.joinpath(*parts), **only)
        return [f"{stored.dataset}/{stored.split}" for stored in splits]

    assert names() == ["muse/train", "muse/val", "refcoco+/testA"]
    assert names("muse") == ["muse/train", "muse/val"]
    assert names("muse", "val") == names("muse", "val", "1.0.0") == ["muse/val"]
    assert names(dataset="refcoco+") == ["refcoco+/testA"]
    assert names(split="train") == ["muse/train"]
    with pytest.raises(InputError, match=r"has no refcoco/\*, it has muse/train, muse/val, refco"):
        names(dataset="refcoco")
    with pytest.raises(InputError, match="no folder"):
        names("nothing")


def test_folder_without_prepared_data(tmp_path):
    with pytest.raises(InputError, match="holds no prepared data: name a folder that `pixellm pre"):
        find_splits(tmp_path)
    with pytest.raises(InputError, match=f"is not a prepared split, it has no {METADATA}"):
        StoredSplit(tmp_path)


def test_missing_shard(copied):
    folder = copied()
    shard = StoredSplit(folder).shards[2]
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks {shard.name}: copy or prepare it again"):
        StoredSplit(folder)


@pytest.mark.parametrize("keep", [0, 100, 70_000])
def test_truncated_shard(keep, copied):
    folder = copied()
    shard = StoredSplit(folder).shards[2]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(InputError, match="is damaged .*: copy or prepare it again"):
        list(StoredSplit(folder))


def test_swapped_shards(copied):
    folder = copied()
    last = StoredSplit(folder).shards[-1]
    shutil.copy(StoredSplit(folder).shards[0], last)
    with pytest.raises(InputError, match="records instead of"):
        StoredSplit(folder)[0]


@pytest.mark.parametrize("name", [INFO, METADATA])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"splits": [1, 2]}', '{"splits": [{}]}', "\udcff"]
)
def test_damaged_metadata(name, text, copied):
    folder = copied()
    (folder / name).write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match="is damaged .*: remove it and prepare it again"):
        StoredSplit(folder)


def test_other_version(copied):
    folder = copied()
    info = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps(info | {"version": "2.0.0"}))
    with pytest.raises(InputError, match="holds version 2.0.0 .* prepare the data again"):
        StoredSplit(folder)
    (folder / INFO).write_text(json.dumps(info | {"version": "1.3.0"}))
    assert len(StoredSplit(folder))
