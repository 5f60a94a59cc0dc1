"""Replies are parsed strictly: without a valid score of every target, no target is scored."""

from __future__ import annotations

import json

import pytest

from pixellm_jax.evaluation.judge.client import ReplyCache
from pixellm_jax.evaluation.judge.prompt import (
    JudgeDownError,
    NotJudgedError,
    Reply,
    make_question,
    make_request,
    read_reply,
    read_scores,
)
from tests.support.judging import record


@pytest.mark.parametrize(
    "text",
    [
        '{"1": 7, "2": 3}',
        '{"2": 3, "1": 7}',
        ' {"1":7,\n"2":3}\n',
        '```json\n{"1": 7, "2": 3}\n```',
        '```\n{"1": 7,\n "2": 3}\n```\n',
    ],
)
def test_scores(text):
    assert read_scores(text, 2) == [7, 3]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "[7, 3]",
        "null",
        "7 and 3",
        'Sure: {"1": 7, "2": 3}',
        '{"1": 7, "2": 3} Good luck!',
        '```json\n{"1": 7, "2": 3}',
        '{"1": 7, "2": 3',
        '{"1": 7}',
        '{"1": 7, "2": 3, "3": 1}',
        '{"1": 7, "1": 3}',
        '{"1": 7, "2": 3, "2": 4}',
        '{"target 1": 7, "target 2": 3}',
        '{"1": 7, "2": 0}',
        '{"1": 7, "2": 11}',
        '{"1": 7, "2": -3}',
        '{"1": 7, "2": 3.0}',
        '{"1": 7, "2": 3.5}',
        '{"1": 7, "2": "3"}',
        '{"1": 7, "2": true}',
        '{"1": 7, "2": null}',
        '{"1": 7, "2": NaN}',
        '{"1": 7, "2": [3]}',
        "[" * 100_000,
        '{"1": 7, "2": ' + "9" * 5000 + "}",
    ],
)
def test_no_score_is_guessed(text):
    with pytest.raises(NotJudgedError):
        read_scores(text, 2)


def completion(**changes) -> bytes:
    choice = {"message": {"content": "hello"}, "finish_reason": "stop"} | changes
    return json.dumps({"choices": [choice], "model": "m"}).encode()


def test_reply():
    assert read_reply(completion()) == Reply("hello", "m", None)
    assert read_reply(completion(finish_reason=None)).text == "hello"
    value = json.loads(completion()) | {"usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    assert read_reply(json.dumps(value).encode()).tokens == (7, 2)
    value["usage"]["completion_tokens"] = "2"
    assert read_reply(json.dumps(value).encode()).tokens is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>502</html>",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [null]}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": {"message": {"content": "x"}}}',
        b"[" * 100_000,
        completion(message={"content": None}),
        completion(message={"content": ["x"]}),
        completion(finish_reason="length"),
        completion(finish_reason="content_filter"),
    ],
)
def test_no_reply_is_invented(body):
    with pytest.raises(NotJudgedError):
        read_reply(body)


def test_request():
    question = make_question(record(3, question="Wo? \ud800 图 3?"))
    request = make_request(question, model="m", temperature=0.0)
    assert request["model"] == "m" and request["temperature"] == 0.0
    said = json.loads(request["messages"][1]["content"])
    assert said["question"] == "Wo? ? 图 3?"
    assert said["answer"] == question.answer
    assert said["targets"] == {"1": "a round wooden table", "2": "a red cup"}
    assert "temperature" not in make_request(question, model="m", temperature=None)


def test_cache_is_keyed_by_the_whole_request(tmp_path):
    cache, reply = ReplyCache(tmp_path, "http://one/v1"), Reply("text \ud800", "m", (7, 2))
    request = {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0.0}
    assert cache.get(request) is None
    cache.put(request, reply)
    assert cache.get(dict(reversed(request.items()))) == reply
    assert cache.get(request | {"model": "n"}) is None
    assert cache.get(request | {"temperature": 0.1}) is None
    assert cache.get(request | {"messages": []}) is None
    assert ReplyCache(tmp_path, "http://two/v1").get(request) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"m2"', "7"),
        lambda text: text.replace("[7, 2]", "[7]"),
        lambda text: text.replace('"x"', '"y"'),  # the reply to another request
    ],
)
def test_a_damaged_entry_counts_as_absent(tmp_path, damage):
    cache, request = ReplyCache(tmp_path, "u"), {"model": "m", "messages": ["x"]}
    cache.put(request, Reply("text", "m2", (7, 2)))
    (path,) = tmp_path.rglob("*.json")
    path.write_text(damage(path.read_text()))
    assert cache.get(request) is None
    cache.put(request, Reply("text", "m2", None))
    assert cache.get(request) == Reply("text", "m2", None)
    assert list(tmp_path.rglob("*.*")) == [path]


def test_a_reply_that_cannot_be_cached_stops_the_judge(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JudgeDownError, match="cannot be cached"):
        ReplyCache(tmp_path / "file", "u").put({"model": "m"}, Reply("text", "m", None))
    assert (tmp_path / "file").read_text() == ""
