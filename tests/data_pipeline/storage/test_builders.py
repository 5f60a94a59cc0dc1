"""Preparation of splits: atomic, deterministic, resumable, and nothing is lost silently."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipeline.errors import AbsentError, DamagedError
from data_pipeline.reading import Reading
from data_pipeline.sources import SOURCES
from data_pipeline.sources.jsonl import Jsonl
from data_pipeline.storage import builders, shards
from data_pipeline.storage.builders import Prepared, prepare
from data_pipeline.storage.stored import INFO, SKIPPED, UNFINISHED, StoredSplit, find_splits
from pixellm_jax.errors import InputError

ROOT = Path(__file__).parents[3]
SHARD_SIZE = 5
SOURCE = Jsonl()


def write_photos(folder: Path, count: int, damage: dict[int, dict] | None = None) -> Path:
    """Write a JSONL file of `count` lines with one image each; `damage` replaces fields."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "data.jsonl").open("w") as file:
        for number in range(count):
            pixels = np.full((7, 11, 3), number % 251, np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            line = {
                "key": f"photo {number}",
                "image": f"{number}.png",
                "targets": [{"phrase": f"thing {number}", "mask": [[0, 0, 5, 0, 5, 3, 0, 3]]}],
            }
            file.write(json.dumps(line | (damage or {}).get(number, {})) + "\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 23)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredSplit:
    """Prepare `photos` in one process: the reference for all other ways."""
    return prepare(
        SOURCE, "train", photos, tmp_path_factory.mktemp("whole"), shard_size=SHARD_SIZE
    ).stored


class All(NamedTuple):
    folder: Path
    splits: dict[tuple[str, str], Prepared]


@pytest.fixture(scope="module")
def everything(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> All:
    folder = tmp_path_factory.mktemp("everything")
    splits = {}
    for name, (source, names) in SOURCES.items():
        for split in names:
            try:
                splits[name, split] = prepare(source, split, data_root, folder)
            except AbsentError as error:
                assert "found no" in str(error)
    return All(folder, splits)


def test_stored_examples_equal_those_of_the_readers(everything, data_root):
    assert everything.splits
    for (name, split), prepared in everything.splits.items():
        source = SOURCES[name].source
        stored = prepared.stored
        read = []
        skipped = [skip.key for skip in prepared.skips if skip.whole]
        for entry in source.entries(data_root, split):
            try:
                read.append(source.read(entry).example)
            except DamagedError:
                assert skipped.pop(0) == entry.key
        assert list(stored) == read
        assert not skipped
        assert len({example.key for example in read}) == len(read)
        assert (stored.dataset, stored.split) == (name, split)
        assert stored.metadata["targets"] == sum(len(example.targets) for example in read)


@pytest.fixture(scope="module")
def counts(data_root: Path) -> dict[str, dict]:
    return json.loads((data_root / "COUNTS.json").read_text())["datasets"]


@pytest.mark.parametrize("split", SOURCES["muse"].splits)
def test_counts_of_muse(split, everything, counts, data_root):
    expected = counts[f"muse_{split}"]
    stored, skips, _ = everything.splits["muse", split]
    assert expected["questions_by_target_count"]
    items = json.loads((data_root / "muse" / f"muse_{split}.json").read_text())
    parts = [skip for skip in skips if not skip.whole]
    lost = [
        len(items[int(skip.key.rpartition("/")[2])]["answers"][int(skip.reason.split()[1][:-1])])
        for skip in parts
    ]
    assert len(parts) == expected.get("images_with_placeholder_mismatch", 0)
    assert len(skips) - len(parts) == expected.get("images_with_empty_ann_list", 0)
    assert len(stored) + len(skips) - len(parts) == expected["images"]
    assert stored.metadata["turns"] + len(parts) == expected["questions"]
    assert stored.metadata["targets"] + sum(lost) == expected["targets"]


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog", "refclef", "grefcoco"])
def test_counts_of_refer(name, everything, counts):
    expected = counts[name]
    sentences = 0
    images = set()
    refs = {}
    for split in SOURCES[name].splits:
        stored = everything.splits[name, split].stored
        ids = [target.ids for example in stored for target in example.targets]
        sentences += len(ids)
        refs[split] = len({ref_id for ref_id, *_ in ids})
        images |= {example.key.partition("/")[2] for example in stored}
    assert refs == expected["refs_by_split"]
    assert sentences == expected["sentences"]
    assert len(images) == expected["images"]


def test_counts_of_other_datasets(everything, counts):
    def stored(name: str, split: str = "train") -> StoredSplit:
        return everything.splits[name, split].stored

    for name in ("ade20k", "cocostuff", "mapillary"):
        assert len(stored(name)) == counts[name]["label_maps"]
    for name in ("paco_lvis", "pascal_part"):
        assert stored(name).metadata["skipped"] == counts[name]["images_without_annotation"]
        assert stored(name).metadata["entries"] == counts[name]["images"]
        assert stored(name).metadata["targets"] == counts[name]["annotations"]
    assert len(stored("llava_instruct")) == counts["llava_instruct_150k"]["conversations"]
    reason = {split: stored("ReasonSeg", split) for split in ("train", "val", "test")}
    expected = counts["ReasonSeg"]
    sizes = {split: len(examples) for split, examples in reason.items()}
    assert sizes == {split: expected[split] for split in reason}
    examples = [example for stored_split in reason.values() for example in stored_split]
    assert sum(example.kind == "long" for example in examples) == expected["is_sentence_true"]
    assert sum(example.kind == "short" for example in examples) == expected["is_sentence_false"]
    explained = [e for e in examples if e.conversations[0][0].answer is not None]
    assert len(explained) == expected["explanations"]


def test_tfds_reads_a_prepared_split(everything):
    stored = everything.splits["refcoco+", "testA"].stored
    source = tfds.data_source("refcoco_plus/testA", split="testA", data_dir=everything.folder)
    assert len(source) == len(stored)
    record, example = source[1], stored[1]
    assert record["key"].decode() == example.key
    assert record["image"].shape == (*example.hw, 3)
    assert json.loads(record["record"])["dataset"] == "refcoco+"


def test_builders_do_not_import_tensorflow():
    program = "import data_pipeline.storage.builders, sys; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(workers, whole, photos, tmp_path):
    done = []
    stored, skips, existed = prepare(
        SOURCE,
        "train",
        photos,
        tmp_path / "out",
        shard_size=SHARD_SIZE,
        workers=workers,
        progress=lambda new, total: done.append((new, total)),
    )
    assert len(stored.shards) == 5
    assert contents(stored.folder) == contents(whole.folder)
    assert done == [(5, 23)] * 4 + [(3, 23)]
    assert (skips, existed) == ((), False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["jsonl"]


def test_finished_splits_are_not_prepared_again(photos, tmp_path):
    source = shutil.copytree(photos, tmp_path / "photos")
    first = prepare(SOURCE, "train", source, tmp_path / "out")
    shutil.rmtree(source)
    again = prepare(SOURCE, "train", source, tmp_path / "out")
    assert (first.existed, again.existed) == (False, True)
    assert list(again.stored) == list(first.stored)


DAMAGE = {
    1: {"image": "nowhere.png"},
    8: {"targets": [{"phrase": "thing", "mask": {"size": [3, 3], "counts": [9]}}]},
    9: {"targets": []},
    11: {
        "conversations": [
            [{"question": "Where?", "answer": "{seg} and {seg}.", "targets": [0]}],
            [{"question": "Where?", "answer": "There: {seg}.", "targets": [0]}],
        ]
    },
}


def test_damaged_entries_are_listed(tmp_path):
    folder = write_photos(tmp_path / "photos", 20, DAMAGE)
    with (folder / "data.jsonl").open("a") as file:
        file.write('{"image": "3.png", \n')
    stored, skips, _ = prepare(SOURCE, "train", folder, tmp_path / "out", shard_size=SHARD_SIZE)
    assert [(skip.key, skip.whole) for skip in skips] == [
        ("photo 1", True),
        ("photo 8", True),
        ("photo 9", True),
        ("photo 11", False),
        ("line 21", True),
    ]
    for skip, word in zip(skips, ("nowhere.png", "size", "targets", "{seg}", "JSON"), strict=True):
        assert word in skip.reason
    lines = (stored.folder / SKIPPED).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [skip._asdict() for skip in skips]
    expected = {"entries": 21, "examples": 17, "turns": 1, "targets": 17}
    expected |= {"skipped": 4, "parts_left_out": 1}
    assert {name: stored.metadata[name] for name in expected} == expected
    kept = [f"photo {number}" for number in range(20) if number not in (1, 8, 9)]
    assert [example.key for example in stored] == kept


def test_empty_shards_are_dropped(tmp_path):
    damage = {number: {"image": "nowhere.png"} for number in range(5, 10)}
    folder = write_photos(tmp_path / "photos", 12, damage)
    stored, skips, _ = prepare(SOURCE, "train", folder, tmp_path / "out", shard_size=SHARD_SIZE)
    assert len(stored.shards) == 2
    assert [example.key for example in stored] == [f"photo {n}" for n in (0, 1, 2, 3, 4, 10, 11)]
    assert len(skips) == 5


def test_strict_rejects_damage(tmp_path, whole):
    folder = tmp_path / "photos"
    out = tmp_path / "out"
    write_photos(folder, 23, {12: {"image": "nowhere.png"}})
    for workers in (1, 1, 2):
        with pytest.raises(InputError, match=r"jsonl/train: 1 damaged, .* photo 12: no picture"):
            prepare(
                SOURCE, "train", folder, out, shard_size=SHARD_SIZE, strict=True, workers=workers
            )
        assert not list(out.rglob(INFO))
        with pytest.raises(InputError, match="holds no prepared data"):
            find_splits(out)
    assert len(prepare(SOURCE, "train", folder, out, shard_size=SHARD_SIZE).stored) == 22
    with pytest.raises(InputError, match="photo 12"):
        prepare(SOURCE, "train", folder, out, shard_size=SHARD_SIZE, strict=True)
    assert not (out / UNFINISHED).exists()


def test_shards_of_another_source_are_not_reused(tmp_path, whole):
    folder = tmp_path / "photos"
    out = tmp_path / "out"
    write_photos(folder, 23, {12: {"image": "nowhere.png"}})
    with pytest.raises(InputError):
        prepare(SOURCE, "train", folder, out, shard_size=SHARD_SIZE, strict=True)
    assert (out / UNFINISHED).exists()
    write_photos(folder, 23)
    repaired = prepare(SOURCE, "train", folder, out, shard_size=SHARD_SIZE, strict=True).stored
    assert contents(repaired.folder) == contents(whole.folder)


def test_split_without_usable_entries(tmp_path):
    folder = write_photos(tmp_path / "photos", 3, dict.fromkeys(range(3), {"image": "no.png"}))
    with pytest.raises(
        InputError, match=r"none of 3 entries can be used; the first, photo 0: no p"
    ):
        prepare(SOURCE, "train", folder, tmp_path / "out")
    assert not list((tmp_path / "out").rglob(INFO))
    with pytest.raises(AbsentError, match="has nothing in split val"):
        prepare(SOURCE, "val", folder, tmp_path / "other" / "out")
    assert not (tmp_path / "other").exists()


def test_only_one_process_prepares_a_split(photos, tmp_path):
    folder = tmp_path / UNFINISHED / "jsonl-train"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process prepares jsonl/train"):
            prepare(SOURCE, "train", photos, tmp_path)
    assert len(prepare(SOURCE, "train", photos, tmp_path).stored) == 23


def test_output_folder_cannot_be_written(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="writing failed"):
        prepare(SOURCE, "train", photos, tmp_path / "file")


def test_full_disk(photos, tmp_path, monkeypatch):
    class Full:
        def __init__(self, *arguments: object) -> None: ...

        def write(self, record: bytes) -> None:
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(InputError, match="No space left on device.*finished shards are kept"):
        prepare(SOURCE, "train", photos, tmp_path)
    assert not list(tmp_path.rglob(INFO))


PROGRAM = """
import sys
from pathlib import Path
from data_pipeline.storage.builders import prepare
from data_pipeline.sources.jsonl import Jsonl

if __name__ == "__main__":
    source, out, workers = sys.argv[1:]
    prepare(Jsonl(), "train", Path(source), Path(out), shard_size=5, workers=int(workers))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("many"), 2500)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_resumes(workers, many, tmp_path):
    out = tmp_path / "out"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    work = out / UNFINISHED / "jsonl-train"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, program, many, out, str(workers)]
    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 60
        while len(list(work.glob("*.json"))) < 20:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        workers_of_process = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers_of_process, timeout=20)
    assert not alive
    finished = {int(p.stem): p.with_suffix(".array_record") for p in work.glob("*.json")}
    kept = {number: path.stat().st_ino for number, path in finished.items()}
    assert 20 <= len(kept) < 500
    assert not list(out.rglob(INFO))
    with pytest.raises(InputError, match="holds no prepared data"):
        find_splits(out)

    resumed = prepare(SOURCE, "train", many, out, shard_size=SHARD_SIZE).stored
    inodes = [path.stat().st_ino for path in resumed.shards]
    assert all(inodes[number] == inode for number, inode in kept.items())
    assert [example.key for example in resumed] == [f"photo {n}" for n in range(2500)]
    assert sorted(p.name for p in out.iterdir()) == ["jsonl"]
    assert sorted(p.name for p in (out / "jsonl" / "train").iterdir()) == ["1.0.0"]


def test_killed_in_any_of_the_last_steps(photos, whole, tmp_path, monkeypatch):
    """After a kill at any step of the final move, the next call gives the same folder."""
    step = 0

    class Killed(BaseException): ...

    def kill_after_steps(function):
        def wrapped(*arguments, **options):
            nonlocal remaining_steps
            if not remaining_steps:
                raise Killed
            remaining_steps -= 1
            return function(*arguments, **options)

        return wrapped

    monkeypatch.setattr(builders, "os", SimpleNamespace(replace=kill_after_steps(os.replace)))
    monkeypatch.setattr(builders, "shutil", SimpleNamespace(rmtree=kill_after_steps(shutil.rmtree)))
    while True:
        remaining_steps = step
        out = tmp_path / str(step)
        try:
            prepare(SOURCE, "train", photos, out, shard_size=SHARD_SIZE)
            break
        except Killed:
            assert not list(out.rglob(INFO))
        remaining_steps = 1000
        stored = prepare(SOURCE, "train", photos, out, shard_size=SHARD_SIZE).stored
        assert contents(stored.folder) == contents(whole.folder)
        step += 1
    assert step > 5


def test_leftovers_of_a_kill_are_removed(photos, whole, tmp_path):
    leftover = tmp_path / "jsonl" / "train" / "incomplete.ABCDEF_1.0.0"
    shutil.copytree(whole.folder, leftover)
    with pytest.raises(InputError, match="holds no prepared data"):
        find_splits(tmp_path)
    stored = prepare(SOURCE, "train", photos, tmp_path, shard_size=SHARD_SIZE).stored
    assert contents(stored.folder) == contents(whole.folder)
    assert not leftover.exists()


class KeyEntry(NamedTuple):
    key: str


@dataclass(frozen=True)
class Deadly:
    """Source whose third entry kills the process that reads it, as the OOM killer does."""

    dataset: str = "deadly"
    splits: tuple[str, ...] = ("train",)

    def entries(self, root: Path, split: str) -> list[KeyEntry]:
        return [KeyEntry(key) for key in "abcd"]

    def read(self, entry: KeyEntry) -> Reading:
        if entry.key == "c":
            os.kill(os.getpid(), signal.SIGKILL)
        raise DamagedError("made up")


def test_killed_worker_is_reported(tmp_path):
    with pytest.raises(InputError, match="a worker process was killed.*run the command again"):
        prepare(Deadly(), "train", tmp_path, tmp_path / "out", shard_size=1, workers=2)


@pytest.mark.beam
def test_beam_writes_the_same_bytes(photos, whole, tmp_path):
    options = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    stored = prepare(
        SOURCE,
        "train",
        photos,
        tmp_path,
        shard_size=SHARD_SIZE,
        runner="DirectRunner",
        runner_options=options,
    ).stored
    assert contents(stored.folder) == contents(whole.folder)


def test_missing_beam_is_reported(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(InputError, match=r"pip install 'pixellm_jax\[beam\]'"):
        prepare(SOURCE, "train", photos, tmp_path, runner="DirectRunner")


def test_choose_shard_size():
    assert shards.choose_shard_size(1) == shards.choose_shard_size(256 * 4096) == 256
    assert shards.choose_shard_size(30_000_000) == 7325


def test_truncated_image_is_skipped(tmp_path):
    folder = write_photos(tmp_path / "photos", 3)
    noise = np.random.default_rng(0).integers(0, 256, (7, 11, 3), np.uint8)
    Image.fromarray(noise).save(folder / "1.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) * 2 // 3])  # its header is still good
    stored, skips, _ = prepare(SOURCE, "train", folder, tmp_path / "out")
    assert [example.key for example in stored] == ["photo 0", "photo 2"]
    assert [skip.key for skip in skips] == ["photo 1"] and "damaged" in skips[0].reason
