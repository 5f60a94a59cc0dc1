"""Streaming JSON reader: the same items as `json.load`, each with its byte range."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DamagedError
from data_pipeline.formats import json_items
from data_pipeline.formats.json_items import Item, Span, fetch, items
from pixellm_jax.errors import InputError
from tests.support.mutation import mutate_bytes

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
DOCUMENTS = st.lists(VALUES, max_size=6) | st.dictionaries(st.text(), VALUES, max_size=5)


def expected(document) -> list[tuple]:
    if isinstance(document, list):
        return [("", value) for value in document]
    return [
        (key, part)
        for key, value in document.items()
        for part in (value if isinstance(value, list) else [value])
    ]


@given(DOCUMENTS, st.booleans(), st.sampled_from([None, 1]), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_items_equal_those_of_json_load(tmp_path_factory, document, ascii_only, indent, chunk):
    path = tmp_path_factory.mktemp("json") / "x.json"
    text = json.dumps(document, ensure_ascii=ascii_only, indent=indent)
    path.write_bytes(text.encode("utf-8", "replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_items, "_CHUNK", chunk)
        actual = list(items(path))
    assert [(item.key, item.value) for item in actual] == expected(json.loads(path.read_bytes()))
    for item in actual:
        assert fetch(path, item.span) == item.value


def test_byte_ranges(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"é": [1, {"a": 2}], "b": {}}', encoding="utf-8")
    assert list(items(path)) == [
        Item("é", 1, Span(8, 1)),
        Item("é", {"a": 2}, Span(11, 8)),
        Item("b", {}, Span(27, 2)),
    ]


DAMAGED = {
    "empty": b"",
    "blank": b" \n",
    "a number": b"3",
    "text": b"hello",
    "cut off": b'[{"a": 1}, {"b": ',
    "no end": b"[1, 2",
    "no comma": b"[1 2]",
    "a comma too many": b"[1, 2,]",
    "no colon": b'{"a" 1}',
    "a key that is a number": b"{1: 2}",
    "no end of an object": b'{"a": [1]',
    "more after the end": b"[1] [2]",
    "wrong end": b"[1}",
    "Latin-1": b'["\xe9"]',
    "a cut character": '["é'.encode()[:-1],
    "too deep": b"[" * 100_000,
    "too many digits": b"[" + b"9" * 5000 + b"]",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(InputError, match="x.json' near byte"):
        list(items(path))


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        list(items(tmp_path / "x.json"))


def test_item_limit(tmp_path, monkeypatch):
    """A damaged item is an error at the limit; the rest of the file is not read into memory."""
    monkeypatch.setattr(json_items, "ITEM_LIMIT", 100)
    monkeypatch.setattr(json_items, "_CHUNK", 16)
    path = tmp_path / "x.json"
    path.write_bytes(b'[1, "' + b"a" * 10_000 + b'"]')
    iterator = items(path)
    assert next(iterator).value == 1
    with pytest.raises(InputError, match="near byte 4: "):
        next(iterator)


def test_file_that_changed(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'["abcdef"]')
    (item,) = items(path)
    path.write_bytes(b'["abc"]')
    with pytest.raises(DamagedError, match="item at byte 1"):
        fetch(path, item.span)
    path.unlink()
    with pytest.raises(DamagedError, match="item at byte 1"):
        fetch(path, item.span)


def test_fuzz(tmp_path):
    """300 mutated files give items or `InputError`."""
    rng = random.Random(0)
    text = json.dumps({"images": [{"id": 1, "é": [1.5]}], "x": None}, ensure_ascii=False).encode()
    path = tmp_path / "x.json"
    for _ in range(300):
        path.write_bytes(mutate_bytes(text, rng))
        try:
            for item in items(path):
                fetch(path, item.span)
        except InputError as error:
            assert "\n" not in str(error)
