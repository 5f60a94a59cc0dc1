from __future__ import annotations

import pickle

import pytest

from data_pipeline.example import Turn
from data_pipeline.sources.instruct import LlavaInstruct
from pixellm_jax.errors import InputError
from tests.support.made_up import mutations, read_all, survives, write_json, write_picture


def llava(root, *conversations, image="1.jpg"):
    write_picture(root / "coco/train2017/1.jpg")
    rows = [
        {"id": "1", "image": image, "conversations": [{"from": f, "value": v} for f, v in messages]}
        for messages in conversations
    ]
    return write_json(root / "llava_dataset/llava_instruct_150k.json", rows)


ASK, ANSWER = ("human", "Where is it?\n<image>"), ("gpt", " Here. ")


def test_multi_turn_conversation(tmp_path):
    llava(tmp_path, [ASK, ANSWER, ("human", " And now? "), ("gpt", "There.")])
    (reading,) = read_all(LlavaInstruct(), tmp_path, "train")[0].values()
    example = reading.example
    assert reading.problems == ()
    assert example.conversations == (
        (Turn("Where is it?", " Here. "), Turn(" And now? ", "There.")),
    )
    assert (example.dataset, example.split, example.kind) == ("llava_instruct", "train", "instruct")
    assert (example.key, example.masks, example.targets, example.void) == ("0/1", (), (), None)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("What is it?\n<image>", "What is it?"),
        ("  <image>  What is it? ", "What is it?"),
        ("What <image> is it?", "What  is it?"),
        (" What is it? ", " What is it? "),
    ],
)
def test_image_marker_is_removed(tmp_path, question, expected):
    llava(tmp_path, [("human", question), ANSWER])
    (reading,) = read_all(LlavaInstruct(), tmp_path, "train")[0].values()
    assert reading.example.conversations[0][0].question == expected


def test_leading_answer_and_unanswered_question_are_dropped(tmp_path):
    llava(tmp_path, [("gpt", "Hello!"), ASK, ANSWER, ("human", "And?")])
    (reading,) = read_all(LlavaInstruct(), tmp_path, "train")[0].values()
    assert reading.example.conversations == ((Turn("Where is it?", " Here. "),),)
    assert reading.problems == ("the last question has no answer",)


def test_duplicate_ids_are_allowed(tmp_path):
    llava(tmp_path, [ASK, ANSWER], [ASK, ANSWER])
    entries = LlavaInstruct().entries(tmp_path, "train")
    assert [entry.key for entry in entries] == ["0/1", "1/1"]
    assert pickle.loads(pickle.dumps(entries)) == entries


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "without an answered question"),
        ([ASK], "without an answered question"),
        ([ANSWER], "without an answered question"),
        ([ASK, ASK, ANSWER], "message 1 is by the same speaker"),
        ([ANSWER, ANSWER, ASK], "message 1 is by the same speaker"),
        ([ASK, ("system", "x")], "message 1 is from 'system'"),
        ([ASK, ("gpt", 3)], "message 1 is 3, expected text"),
        ([ASK, ("gpt", "")], "message 1 is '', expected text"),
        ([ASK, ANSWER, ASK, ANSWER], "<image> in messages [0, 2]"),
        ([("human", "<image><image>"), ANSWER], "<image> in messages [0, 0]"),
        ([("human", "What?"), ("gpt", "<image>")], "<image> in messages [1]"),
        ([("human", "<image>"), ANSWER], "the first question is ''"),
    ],
)
def test_damaged_conversations(tmp_path, messages, reason):
    llava(tmp_path, messages)
    assert reason in read_all(LlavaInstruct(), tmp_path, "train")[1]["0/1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: row.pop("image"), "without a picture"),
        (lambda row: row.update(image="2.jpg"), "no picture"),
        (lambda row: row.update(image="../1.jpg"), "leads out"),
        (lambda row: row.update(image=None), "expected the name of a picture"),
        (lambda row: row.pop("conversations"), "expected a list"),
        (lambda row: row.update(conversations=["x"]), "message 0 is from None"),
    ],
)
def test_damaged_items(tmp_path, change, reason):
    good = {"id": "1", "image": "1.jpg", "conversations": [{"from": "human", "value": "a"}]}
    change(row := good | {"conversations": [{"from": f, "value": v} for f, v in (ASK, ANSWER)]})
    llava(tmp_path)
    write_json(tmp_path / "llava_dataset/llava_instruct_150k.json", [row, 3])
    readings, damaged = read_all(LlavaInstruct(), tmp_path, "train")
    assert not readings
    assert reason in damaged["0/1"]
    assert "a int, expected an object" in damaged["1"]


def test_index_must_be_a_list(tmp_path):
    llava(tmp_path)
    path = write_json(tmp_path / "llava_dataset/llava_instruct_150k.json", {"a": 1})
    with pytest.raises(InputError, match="expected a list"):
        LlavaInstruct().entries(tmp_path, "train")
    path.unlink()
    with pytest.raises(InputError, match="found none of"):
        LlavaInstruct().entries(tmp_path, "train")


def test_fuzz(tmp_path):
    index = llava(tmp_path, [ANSWER, ASK, ANSWER, ("human", "And?"), ("gpt", "No.")], [ASK, ANSWER])
    for _ in mutations(index, 200, seed=5):
        survives(LlavaInstruct(), tmp_path, "train")
