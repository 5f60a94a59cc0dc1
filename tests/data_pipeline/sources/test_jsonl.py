from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.example import Turn
from data_pipeline.sampling import PhiloxSampler
from data_pipeline.sources.jsonl import LINE_KEYS, Jsonl
from data_pipeline.transforms import ComposeSettings, compose
from pixellm_jax.errors import InputError
from tests.support.made_up import (
    HW,
    mutations,
    named,
    pixels,
    read_all,
    survives,
    write_labels,
    write_picture,
)

GUIDE = Path(__file__).parents[3] / "docs/data-format.md"
COLUMN = {"size": [5, 7], "counts": [0, 5, 30]}
CUP = {"phrase": "the cup", "mask": "masks/cup.png"}
TURN = {"question": "Where?", "answer": "Here: {seg}.", "targets": [0]}


def line(**changes):
    value = {"image": "a.jpg", "targets": [CUP], "conversations": [[TURN]]} | changes
    return {key: item for key, item in value.items() if item is not None}


def jsonl(root, *lines, text=None):
    write_picture(root / "a.jpg")
    write_labels(root / "masks/cup.png", np.eye(*HW) * 3)
    path = root / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) if text is None else text, encoding="utf-8")
    return path


def only(root, *lines):
    jsonl(root, *lines)
    readings, damaged = read_all(Jsonl(), root, "train")
    assert not damaged
    (reading,) = readings.values()
    return reading


def reason(root, **changes):
    """Return the reason why a file of one such line is damaged."""
    jsonl(root, line(**changes))
    readings, damaged = read_all(Jsonl(), root, "train")
    assert not readings
    ((_, message),) = damaged.items()
    return message


def test_ready_conversations(tmp_path):
    dog = {"phrase": "the dog", "mask": COLUMN}
    answer = {"question": "Both?", "answer": "{seg} and {seg}", "targets": [1, 0]}
    example, problems = only(
        tmp_path, line(targets=[CUP, dog], conversations=[[TURN, answer], [TURN]])
    )
    assert problems == ()
    assert (example.key, example.dataset, example.split) == ("line 1", "jsonl", "train")
    assert (example.kind, example.hw, example.void) == ("ready", HW, None)
    where = Turn("Where?", "Here: {seg}.", (0,))
    assert example.conversations == ((where, Turn("Both?", "{seg} and {seg}", (1, 0))), (where,))
    assert named(example) == [(("the cup",), ()), (("the dog",), ())]
    assert pixels(example.masks[0]) == np.eye(*HW, dtype=int).tolist()
    assert pixels(example.masks[1]) == [[1, 0, 0, 0, 0, 0, 0]] * 5


def test_line_with_targets_only(tmp_path):
    example, _ = only(tmp_path, line(conversations=None, void=[[0, 0, 7, 0, 7, 1, 0, 1]]))
    assert (example.kind, example.conversations) == ("names", ())
    assert pixels(example.void) == [[1] * 7] + [[0] * 7] * 4
    assert only(tmp_path, line(conversations=None, void=[])).example.void is None


def test_line_with_conversations_only(tmp_path):
    turn = {"question": "Raining?", "answer": "No."}
    example, _ = only(tmp_path, line(targets=None, conversations=[[turn]]))
    assert (example.kind, example.targets) == ("ready", ())
    assert example.conversations == ((Turn("Raining?", "No."),),)


def test_splits_keys_and_empty_lines(tmp_path):
    lines = [
        line(),
        line(split="val", key="b"),
        line(split="train", key="ü"),
        line(split="nowhere"),
    ]
    texts = [json.dumps(value, ensure_ascii=False) for value in lines]
    jsonl(tmp_path, text="\n\r\n".join([*texts, "{broken", "[1]", '{"key": 1}']))
    source = Jsonl()
    assert [entry.key for entry in source.entries(tmp_path, "val")] == ["b"]
    assert source.entries(tmp_path, "test") == []
    entries = source.entries(tmp_path, "train")
    assert pickle.loads(pickle.dumps(entries)) == entries
    readings, damaged = read_all(source, tmp_path, "train")
    assert list(readings) == ["line 1", "ü"]
    assert "split 'nowhere'" in damaged["line 7"]
    assert "not JSON" in damaged["line 9"]
    assert "is a list" in damaged["line 11"]
    assert "key of line 13 is 1" in damaged["line 13"]


def test_duplicate_key_is_damaged(tmp_path):
    jsonl(tmp_path, line(key="a"), line(key="a", split="val"), line(key="a"))
    readings, damaged = read_all(Jsonl(), tmp_path, "train")
    assert list(readings) == ["a"]
    assert damaged == {"line 3": "a second line of key 'a'"}
    assert read_all(Jsonl(), tmp_path, "val")[1] == {"line 2": "a second line of key 'a'"}


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        (TURN | {"answer": "Here."}, "an answer holds 0 {seg} for 1 targets"),
        (TURN | {"answer": "{seg} {seg}"}, "an answer holds 2 {seg} for 1 targets"),
        (TURN | {"targets": [1]}, "names target 1 of 1"),
        (TURN | {"targets": [True]}, "names target True"),
        (TURN | {"targets": 0}, "targets of conversation 1 is 0, expected a list"),
        (TURN | {"question": "{seg}?"}, "a question 1 for none"),
        (TURN | {"question": ""}, "a question of conversation 1"),
        (TURN | {"question": "<image>\nWhere?"}, "leave it out"),
        (TURN | {"answer": None}, "an answer of conversation 1"),
        (TURN | {"anwser": "x"}, "has the key 'anwser', known are answer, question, targets"),
        ("Where?", "a turn of conversation 1 is a str"),
    ],
)
def test_damaged_conversations_are_dropped_individually(tmp_path, turn, problem):
    example, problems = only(tmp_path, line(conversations=[[TURN], [TURN, turn]]))
    assert len(example.conversations) == 1
    (found,) = problems
    assert problem in found
    assert problem.replace("conversation 1", "conversation 0") in reason(
        tmp_path, conversations=[[turn]]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "expected the name of a picture"),
        ({"image": "b.jpg"}, "no picture"),
        ({"image": "../a.jpg"}, "leads out of"),
        ({"image": "/a.jpg"}, "leads out of"),
        ({"image": "masks"}, "cannot be read"),
        ({"image": "data.jsonl"}, "no readable header"),
        ({"picture": "a.jpg"}, "has the key 'picture', known are conversations, image"),
        ({"targets": [], "conversations": None}, "neither targets nor conversations"),
        ({"conversations": []}, "expected a list that is not empty"),
        ({"conversations": [[]]}, "expected a list that is not empty"),
        ({"targets": {}}, "targets is {}, expected a list"),
        ({"targets": ["x"]}, "target 0 is a str"),
        ({"targets": [CUP | {"phrase": " "}]}, "phrase of target 0 is ' '"),
        ({"targets": [CUP | {"mask": "masks/no.png"}]}, "mask of target 0: no label map"),
        ({"targets": [CUP | {"mask": "../cup.png"}]}, "mask of target 0: file name"),
        ({"targets": [CUP | {"mask": "a.jpg"}]}, "cannot be decoded"),
        ({"targets": [CUP | {"mask": {"size": [7, 5], "counts": [35]}}]}, "size 7 x 5"),
        ({"targets": [CUP | {"mask": [[1, 2, 3]]}]}, "mask of target 0"),
        ({"targets": [{"phrase": "the cup"}]}, "mask of target 0"),
        ({"void": "masks/no.png"}, "void: no label map"),
    ],
)
def test_damaged_lines(tmp_path, changes, message):
    assert message in reason(tmp_path, **changes)


def test_masks_of_wrong_size_or_mode(tmp_path):
    jsonl(tmp_path, line())
    write_labels(tmp_path / "masks/cup.png", np.eye(5, 5))
    assert "is 5 x 5, its picture 5 x 7" in read_all(Jsonl(), tmp_path, "train")[1]["line 1"]
    write_labels(tmp_path / "masks/cup.png", np.eye(*HW), "RGB")
    assert "mode RGB" in read_all(Jsonl(), tmp_path, "train")[1]["line 1"]
    write_labels(tmp_path / "masks/cup.png", np.eye(*HW) * 255, "1")
    (reading,) = read_all(Jsonl(), tmp_path, "train")[0].values()
    assert pixels(reading.example.masks[0]) == np.eye(*HW, dtype=int).tolist()


def test_missing_file_or_split_is_an_error(tmp_path):
    with pytest.raises(InputError, match="data.jsonl"):
        Jsonl().entries(tmp_path, "train")
    with pytest.raises(InputError, match="no split 'minival'"):
        Jsonl().entries(tmp_path, "minival")


def test_example_of_the_guide_works(tmp_path, monkeypatch):
    blocks = re.findall(r"```(\w*)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = (text for kind, text in blocks if kind == "jsonl")
    (program,) = (text for kind, text in blocks if kind == "python")
    printed = blocks[-1][1]
    root = tmp_path / "my_data"
    for value in map(json.loads, lines.splitlines()):
        write_picture(root / value["image"], (48, 64))
    write_labels(root / "masks/cup.png", np.eye(48, 64) * 255)
    (root / "data.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(program, GUIDE.name, "exec"), {})
    assert output.getvalue() == printed
    (reading,) = read_all(Jsonl(), root, "val")[0].values()
    assert reading.example.kind == "names"
    assert np.sum(pixels(reading.example.masks[0])) == 20
    assert np.sum(pixels(reading.example.void)) == 4 * 48
    for split in ("train", "val"):
        for example, problems in read_all(Jsonl(), root, split)[0].values():
            assert problems == ()
            draws = PhiloxSampler(seed=0, epoch=0, index=0)
            assert compose(example, draws, ComposeSettings(), group_text="[SEG]")


def test_guide_documents_every_key():
    text = GUIDE.read_text(encoding="utf-8")
    assert all(f"| `{key}` |" in text for key in LINE_KEYS)


def test_fuzz_lines(tmp_path):
    jsonl(tmp_path)
    single = tmp_path / "line.json"
    single.write_text(json.dumps(line(void=COLUMN)))
    for data in mutations(single, 200, seed=8):
        (tmp_path / "data.jsonl").write_bytes(json.dumps(line()).encode() + b"\n" + data)
        survives(Jsonl(), tmp_path, "train")
