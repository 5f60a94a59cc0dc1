"""`pixellm prepare`: its summary, and one line per error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources import SOURCES
from data_pipeline.storage.stored import INFO, UNFINISHED, find_splits
from pixellm_jax.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(capsys):
    """Run the command; return its exit code and the lines of standard output and error."""

    def run(*arguments: object) -> tuple[int, list[str], list[str]]:
        code = main(["prepare", *map(str, arguments), "--workers", "1"])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


@pytest.fixture
def refuse(run):
    def refuse(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out, len(err)) == (2, [], 1)
        assert err[0].startswith("pixellm prepare: ")
        return err[0]

    return refuse


def rows(lines: list[str]) -> dict[tuple[str, str], dict[str, int]]:
    """Parse the table: (dataset, split) -> counts."""
    head = lines[0].replace("parts left out", "parts_left_out").split()
    assert head == ["dataset", "split", "examples", "questions", "targets", "skipped", head[-1]]
    end = next(i for i, line in enumerate(lines) if line.startswith("all "))
    counts = {}
    for line in lines[1:end]:
        dataset, split, *numbers = line.split()
        counts[dataset, split] = dict(zip(head[2:], map(int, numbers), strict=True))
    sums = [sum(row[name] for row in counts.values()) for name in head[2:]]
    assert lines[end].split() == ["all", *map(str, sums)]
    return counts


def test_prepares_all_datasets(data_root, tmp_path, run):
    code, out, err = run("--dataset", "all", "--source", data_root, "--out", tmp_path)
    assert (code, err) == (0, [])
    table = rows(out)
    for stored in find_splits(tmp_path):
        row = table.pop((stored.dataset, stored.split))
        assert row["examples"] == len(stored)
        assert row["targets"] == sum(len(example.targets) for example in stored)
        assert row["questions"] == sum(len(c) for e in stored for c in e.conversations)
    assert table == {}
    notes = [line for line in out if ": " in line]
    absent = [note.split()[2] for note in notes if note.startswith("not prepared: ")]
    there = {stored.dataset for stored in find_splits(tmp_path)}
    assert there | set(absent) == set(SOURCES)
    skipped = [line for line in notes if not line.startswith("not prepared: ")]
    assert len(skipped) == sum(row["skipped"] + row["parts_left_out"] for row in rows(out).values())
    assert any("skipped" in line for line in skipped)
    assert any("{seg}" in line for line in skipped)


def test_second_run_finds_prepared_split(data_root, tmp_path, run):
    arguments = ("--dataset", "muse", "--split", "val", "--source", data_root, "--out", tmp_path)
    first = run(*arguments)
    assert list(rows(first[1])) == [("muse", "val")]
    again = run(*arguments)
    assert again[0] == 0
    assert again[1][:-1] == first[1]
    assert again[1][-1].startswith("muse/val: was prepared before, in ")


def write_lines(folder: Path, *names: str) -> Path:
    folder.mkdir()
    file = folder / "birds.jsonl"
    for name in names:
        Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(folder / "bird.png")
        line = {"image": name, "targets": [{"phrase": "bird", "mask": [[0, 0, 3, 0, 3, 3]]}]}
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
    return file


def test_jsonl_data_of_a_user(tmp_path, run):
    file = write_lines(tmp_path / "birds", *["bird.png"] * 3, *["lost.png"] * 5)
    out = tmp_path / "out"
    options = ("--dataset", "birds", "--format", "jsonl", "--out", out)
    _, lines, _ = run(*options, "--source", file)
    assert rows(lines)["birds", "train"]["examples"] == 3
    notes = [line for line in lines if line.startswith("birds/train: ")]
    assert notes[0].startswith("birds/train: skipped line 4: no picture ")
    assert notes[3].startswith("birds/train: 2 more in ") and notes[3].endswith("/skipped.jsonl")
    assert lines[-1].startswith("not prepared: birds (val, test): ")
    shutil.rmtree(out)
    assert rows(run(*options, "--source", file.rename(file.parent / "data.jsonl").parent)[1])


def test_coco_file_of_a_user(tmp_path, run):
    write_lines(tmp_path / "birds", "bird.png")
    (tmp_path / "birds" / "train.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "bird.png", "height": 5, "width": 7}],
                "categories": [{"id": 4, "name": "bird"}],
                "annotations": [
                    {"id": 2, "image_id": 1, "category_id": 4, "segmentation": [[0, 0, 3, 0, 3, 3]]}
                ],
            }
        )
    )
    options = ("--dataset", "birds", "--format", "coco", "--split", "train")
    _, lines, _ = run(*options, "--source", tmp_path / "birds", "--out", tmp_path / "out")
    assert rows(lines)["birds", "train"]["targets"] == 1


BAD_ARGUMENTS = [
    (["--dataset", "refcoc"], "no dataset 'refcoc': did you mean refcoco?"),
    (["--dataset", "reasonseg"], "did you mean ReasonSeg?"),
    (["--dataset", "zzzz"], "use one of muse, refcoco"),
    (["--dataset", "muse", "--split", "vall"], "muse has no split 'vall': use one of train, val"),
    (["--dataset", "coco", "--split", "train2017"], "found none of "),
    (["--dataset", "coco"], "nothing of coco in "),
    (["--dataset", "my birds", "--format", "jsonl"], "dataset name 'my birds': expected letters"),
    (["--dataset", "../up", "--format", "coco"], "dataset name '../up': expected letters"),
    (["--dataset", "birds", "--format", "jsonl"], "found none of "),
    (["--dataset", "muse", "--strict"], "muse/train: 2 damaged, the first is train/6: question 0"),
    (["--dataset", "muse", "--runner", "DirectRunner"], "pip install 'pixellm_jax[beam]'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_ARGUMENTS, ids=[" ".join(bad) for bad, _ in BAD_ARGUMENTS]
)
def test_rejects_bad_arguments(arguments, message, data_root, tmp_path, refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert message in refuse(*arguments, "--source", data_root, "--out", tmp_path / "out")
    assert not list(tmp_path.rglob(INFO))
    if "--strict" not in arguments and "--runner" not in arguments:
        assert list(tmp_path.iterdir()) == []


def test_rejects_bad_paths(data_root, tmp_path, refuse):
    (tmp_path / "file").write_text("")
    options = ("--dataset", "muse", "--out")
    assert "no folder" in refuse(*options, tmp_path, "--source", tmp_path / "nowhere")
    assert "no folder" in refuse(*options, tmp_path, "--source", tmp_path / "file")
    assert "writing failed" in refuse(*options, tmp_path / "file", "--source", data_root)
    assert main(["prepare", *options, "x", "--source", str(data_root), "--workers", "0"]) == 2


def test_interrupted_command_resumes(data_root, tmp_path):
    """After Ctrl-C, the same command resumes."""
    for number in range(1500):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / f"{number}.png")
    with (tmp_path / "data.jsonl").open("w") as lines:
        for number in range(1500):
            target = {"phrase": "bird", "mask": [[0, 0, 3, 0, 3, 3]]}
            lines.write(json.dumps({"image": f"{number}.png", "targets": [target]}) + "\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pixellm_jax", "prepare", "--dataset", "birds"]
    command += ["--format", "jsonl", "--source", tmp_path, "--out", out, "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        deadline = time.monotonic() + 60
        while not list((out / UNFINISHED / "birds-train").glob("*.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)
        printed = process.communicate(timeout=30)
    assert process.returncode == 130
    assert printed[0] == ""
    kept = "finished shards are kept, run it again to resume"
    assert printed[1] == f"pixellm prepare: interrupted; {kept}\n"
    assert not list(out.rglob(INFO))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert rows(done.stdout.splitlines())["birds", "train"]["examples"] == 1500
    assert done.stderr == ""
    assert not (out / UNFINISHED).exists()
