"""Safe pickle reader: plain data of every protocol is read as by Python; all else is rejected."""

from __future__ import annotations

import collections
import datetime
import decimal
import itertools
import os
import pickle
import pickletools
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.formats import pickle as restricted_pickle
from data_pipeline.formats.pickle import loads
from pixellm_jax.errors import InputError
from tests.support.mutation import mutate_bytes

PROTOCOLS = range(6)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
KEYS = SCALARS | st.tuples(SCALARS, SCALARS)
DATA = st.recursive(
    SCALARS | st.sets(SCALARS, max_size=3) | st.frozensets(SCALARS, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(KEYS, inner, max_size=5)
        | st.tuples()
        | st.tuples(inner)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner)
        | st.tuples(inner, inner, inner, inner)
    ),
    max_leaves=20,
)


@given(DATA, st.sampled_from(PROTOCOLS), st.booleans())
@settings(max_examples=400, deadline=None)
def test_reads_pickles_of_plain_data(data, protocol, optimize):
    written = pickle.dumps(data, protocol)
    read = loads(pickletools.optimize(written) if optimize else written)
    assert read == data
    assert repr(type(read)) == repr(type(data))


def test_reads_pickles_of_the_pure_python_pickler():
    """It writes other opcodes than the C implementation."""
    data = {"a": [1, 2.5, -70000, 2**40, "b\n'", None, True, {"c": ()}, (1, 2, 3, 4)]}
    for protocol in PROTOCOLS:
        assert loads(pickle._dumps(data, protocol)) == data


PYTHON_2 = {
    rb"(lp0" + b"\n" + rb"S'a\xc3\xa9'" + b"\np1\na.": ["aé"],  # protocol 0, UTF-8
    rb"(lp0" + b"\n" + rb"S'a\xe9'" + b"\np1\na.": ["aé"],  # protocol 0, Latin-1
    b"(dp0\nS\"it's\"\np1\nI01\nsS'n'\nL5L\ns.": {"it's": True, "n": 5},
    b"(I1\nI00\nF1.5\nVx\\u00e9\ntp0\n.": (1, False, 1.5, "xé"),
    b"\x80\x02]q\x00(U\x02\xc3\xa9T\x01\x00\x00\x00\xe9X\x01\x00\x00\x00be.": ["é", "é", "b"],
    b"\x80\x02c__builtin__\nset\nq\x00]q\x01(K\x01K\x02e\x85Rq\x02.": {1, 2},
    b"(dp0\nS'a'\n(lp1\nI1\naI2\nas.": {"a": [1, 2]},
}


@pytest.mark.parametrize("number", range(len(PYTHON_2)))
def test_reads_pickles_of_python_2(number):
    data, expected = list(PYTHON_2.items())[number]
    assert loads(data) == expected


def test_shared_containers():
    shared = ["a"]
    read = loads(pickle.dumps([shared, shared, {"k": shared}]))
    assert read == [["a"], ["a"], {"k": ["a"]}]
    assert read[0] is read[1]


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_executes_nothing(protocol, tmp_path):
    data = pickle.dumps([Runs(tmp_path / "ran")], protocol)
    with pytest.raises(InputError, match=r"names the global (posix|nt)\.mkdir"):
        loads(data)
    assert not (tmp_path / "ran").exists()


GLOBALS = {
    "collections.OrderedDict": collections.OrderedDict(a=1),
    "collections.deque": collections.deque([1]),
    "datetime.date": datetime.date(2024, 1, 2),
    "decimal.Decimal": decimal.Decimal(1),
    "numpy": np.float64(1.5),
    "numpy.": np.arange(3),
    "builtins.complex": 1j,
    "builtins.bytearray": bytearray(b"x"),
    "range": range(3),
    "pathlib": Path("x"),
    "print": print,
}


@pytest.mark.parametrize(("name", "protocol"), itertools.product(GLOBALS, (0, 2, 4)))
def test_rejects_globals_by_name(name, protocol):
    data = pickle.dumps({"k": GLOBALS[name]}, protocol)
    with pytest.raises(InputError) as error:
        loads(data)
    message = str(error.value).replace("__builtin__", "builtins").replace("copy_reg", "copyreg")
    assert message.startswith("names the global ")
    assert name in message or "copyreg._reconstructor" in message


INSTRUCTIONS = {
    "eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "getattr": b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
    "inst": b"(S'echo'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'echo'\no.",
    "obj of a set": b"(cbuiltins\nset\no.",
    "build": b"]}b.",
    "newobj": b"\x80\x02cbuiltins\nset\n)\x81.",
    "newobj_ex": b"\x80\x04cbuiltins\nset\n)}\x92.",
    "extension": b"\x80\x02\x82\x01.",
    "extension 2": b"\x80\x02\x83\x01\x00.",
    "extension 4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "persistent": b"Pid\n.",
    "binary persistent": b"NQ.",
    "bytearray": b"\x96" + struct.pack("<Q", 2**40) + b".",
    "buffer": b"\x97.",
    "control characters": b"c\x1b[2J\nx\n.",
}


@pytest.mark.parametrize("case", INSTRUCTIONS)
def test_rejects_opcodes_that_build_objects(case):
    with pytest.raises(InputError, match="names .*, which could run a program") as error:
        loads(INSTRUCTIONS[case])
    assert str(error.value).isprintable()


DAMAGED = {
    "empty": b"",
    "text": b"hello",
    "an image": b"\xff\xd8\xff\xe0",
    "no end": pickle.dumps([1, 2])[:-1],
    "nothing on the stack": b".",
    "a mark alone": b"(.",
    "no mark": b"a.",
    "unknown memo": b"g7\n.",
    "append to a number": b"I1\nI2\na.",
    "append to text": b"S'a'\nI2\na.",
    "set item of a list": b"]I1\nI2\ns.",
    "a list as key": b"}]I1\ns.",
    "odd pairs": b"(I1\nd.",
    "no quotes": b"Sabc\n.",
    "not a number": b"Iabc\n.",
    "long text": b"X\xff\xff\xff\xffab.",
    "longer text": b"\x8d" + struct.pack("<Q", 2**62) + b"ab.",
    "half a number": b"J\x01\x02",
    "half a float": b"G\x01",
    "not UTF-8": b"X\x01\x00\x00\x00\xff.",
    "too large a number": b"\x8a\xff" + b"\x01" * 255 + b".",
    "many digits": b"I" + b"9" * 5000 + b"\n.",
    "set of bytes": b"cbuiltins\nset\n(S'ab'\ntR.",
    "call of a list": b"](tR.",
    "encode as a program": b"c_codecs\nencode\n(Vab\nVrot13\ntR.",
    "a short tuple": b"I1\n\x87.",
    "a deep key": b"}I1\n" + b"\x85" * 100_000 + b"I1\ns.",
    "itself in it": b"(lp0\ng0\na.",
    "itself in its dictionary": b"}p0\nI1\n(g0\nlsg0\n.",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_pickles(case):
    with pytest.raises(InputError, match="not a whole pickle|contains itself"):
        loads(DAMAGED[case])


def test_huge_memo_index_uses_no_memory():
    assert loads(b"I1\nr\xff\xff\xff\x7f.") == 1


def test_exponential_expansion_is_rejected():
    """Each list contains the previous list ten times: 400 bytes for 10**40 values."""
    data = [1] * 10
    for _ in range(40):
        data = [data] * 10
    with pytest.raises(InputError, match="repeats its parts"):
        loads(pickle.dumps(data))


@pytest.mark.parametrize(
    "amplified",
    [
        b"c__builtin__\nset\nq\x00](" + b"N" * 100 + b"e\x85q\x01" + b"0h\x00h\x01R" * 10,
        b"c_codecs\nencode\nq\x00X\x64\0\0\0" + b"x" * 100 + b"\x85q\x01" + b"0h\x00h\x01R" * 10,
        b"(" + b"N" * 100 + b"tq\x01}" + b"h\x01Ns" * 10,
    ],
    ids=["copied set", "copied text", "hashed tuple"],
)
def test_copies_count_towards_the_limit(monkeypatch, amplified):
    """An opcode that copies or hashes a value counts as many steps as the value is long."""
    monkeypatch.setattr(restricted_pickle, "STEP_LIMIT", 10_000)
    loads(amplified + b".")
    monkeypatch.setattr(restricted_pickle, "STEP_LIMIT", 500)
    with pytest.raises(InputError, match="more than 500 instructions"):
        loads(amplified + b".")


@pytest.mark.parametrize(
    "keys",
    [
        [k * (2**61 - 1) for k in range(1, 3000)],
        list(itertools.product((-1, -2), repeat=11)),
    ],
    ids=["long integers", "tuples"],
)
def test_rejects_colliding_keys(keys):
    """The hashes of these keys are equal: a dictionary of n keys takes n**2 steps."""
    assert len({hash(key) for key in keys}) == 1
    with pytest.raises(InputError, match="colliding hashes"):
        loads(pickle.dumps(dict.fromkeys(keys)))
    assert loads(pickle.dumps([set(keys[:100]), dict.fromkeys(keys[:900])]))


def test_deeply_nested_data_does_not_crash():
    data = loads(b"]" * 100_000 + b"a" * 99_999 + b".")
    assert isinstance(data, list)


def test_limit_of_opcodes(monkeypatch):
    monkeypatch.setattr(restricted_pickle, "STEP_LIMIT", 10)
    with pytest.raises(InputError, match="more than 10 instructions"):
        loads(b"N0" * 10 + b"N.")


def test_load_from_files(tmp_path, monkeypatch):
    path = tmp_path / "refs(unc).p"
    with pytest.raises(InputError, match="cannot be read"):
        restricted_pickle.load(path)
    path.write_bytes(pickle.dumps([{"a": 1}]))
    assert restricted_pickle.load(path) == [{"a": 1}]
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match=r"refs\(unc\)\.p' names the global"):
        restricted_pickle.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        restricted_pickle.load(tmp_path)
    monkeypatch.setattr(restricted_pickle, "SIZE_LIMIT", 4)
    with pytest.raises(InputError, match="more than 4 bytes"):
        restricted_pickle.load(path)


SEED = [{"ref_id": 1, "ann_id": [2, 3], "sentences": [{"sent": "a b", "x": (1.5, None)}]}, {b"k"}]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_fuzz(protocol):
    """6 x 500 mutated pickles give plain data or `InputError`."""
    rng = random.Random(protocol)
    written = pickle.dumps(SEED, protocol)
    for _ in range(500):
        try:
            assert_plain(loads(mutate_bytes(written, rng)))
        except InputError as error:
            assert len(str(error)) < 400 and "\n" not in str(error)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_fuzz_bytes(data):
    try:
        assert_plain(loads(data + b"."))
    except InputError:
        return


def assert_plain(value) -> None:
    """Assert that a value consists of containers and scalars only."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        for part in value:
            assert_plain(part)
    else:
        assert type(value) in (str, bytes, int, float, bool, type(None))
