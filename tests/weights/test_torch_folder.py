"""Weights on disk: exact values, and one clear line for whatever is wrong with a file.

The `.bin` archives are made by hand here, byte by byte; tests/parity/test_torch_archive.py compares
with files of PyTorch itself.
"""

from __future__ import annotations

import json
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pixellm_jax.errors import InputError
from pixellm_jax.weights import safetensors_file, torch_file, torch_folder
from pixellm_jax.weights.torch_folder import open_file, open_folder, write_safetensors

ORDERED = b"ccollections\nOrderedDict\n)R"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    content = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values) -> bytes:
    return group(*map(number, values))


def storage(key: str, numel: int, kind: str = "FloatStorage") -> bytes:
    parts = text("storage"), b"ctorch\n" + kind.encode() + b"\n", text(key), text("cpu")
    return group(*parts, number(numel)) + b"Q"


def tensor(stored: bytes, shape=(2, 3), strides=(3, 1), offset=0, tail: bytes = b"") -> bytes:
    parts = stored, number(offset), numbers(shape), numbers(strides), b"\x89", ORDERED, tail
    return REBUILD + group(*parts) + b"R"


def dictionary(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


def archive(folder: Path, value: bytes, compression=zipfile.ZIP_STORED, **members: bytes) -> Path:
    """Write `folder/pytorch_model.bin` with the pickle `value` and storage "0" of 0. 1. ... 5."""
    file = folder / "pytorch_model.bin"
    members = {"data/0": np.arange(6, dtype="<f4").tobytes(), "byteorder": b"little", **members}
    with zipfile.ZipFile(file, "w", compression) as out:
        out.writestr("top/data.pkl", b"\x80\x02" + value + b".")
        for name, content in members.items():
            out.writestr(f"top/{name}", content)
    return file


GOOD = dictionary(w=tensor(storage("0", 6)), v=tensor(storage("0", 6), (2,), (3,), 1), n=number(3))


def header_file(file: Path, header, data: bytes = b"") -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return file


def entry(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def message(function, *arguments) -> str:
    """Return the one line of the `InputError` that the call must raise."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    line = str(caught.value)
    assert "\n" not in line and ";" in line, line
    return line


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.tobytes() == right.tobytes()
        and left.flags.c_contiguous
        and left.flags.writeable
    )


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    kinds = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8"]
    found = {kind: (rng.normal(size=(2, 3, 5)) * 50).astype(kind) for kind in kinds}
    return found | {
        "bfloat16": rng.normal(size=(7, 3)).astype(ml_dtypes.bfloat16),
        "bool": rng.normal(size=11) > 0,
        "zero-d": np.array(2.5, np.float32),
        "empty": np.zeros((0, 5), np.float16),
        "transposed": np.arange(35, dtype=np.int32).reshape(5, 7).T,
        "strided": np.arange(22, dtype=np.float32)[::2],
    }


def split(folder: Path, shards: dict[str, list[str]], index: dict | None = None) -> None:
    """Write safetensors shards with small tensors, and an index if there is one."""
    for shard, names in shards.items():
        write_safetensors(folder / shard, {name: np.full(3, 1.0, np.float32) for name in names})
    if index is not None:
        content = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(content)


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# safetensors


def test_safetensors_round_trip(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", values())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    opened = open_folder(tmp_path)
    assert opened.keys() == values().keys()
    for name, value in values().items():
        assert opened[name].shape == value.shape and opened[name].dtype == value.dtype
        assert same(opened[name].read(), value.copy(order="C")), name


def test_safetensors_agrees_with_the_library(tmp_path):
    file = tmp_path / "model.safetensors"
    plain = {name: value for name, value in values().items() if value.flags.c_contiguous}
    safetensors.numpy.save_file(plain, file)
    assert all(same(open_file(file)[name].read(), value) for name, value in plain.items())
    write_safetensors(file, values())
    loaded = safetensors.numpy.load_file(file)
    assert all(np.array_equal(loaded[name], value) for name, value in values().items())
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_written_file_has_the_usual_permissions(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"w": np.zeros(3, np.float32)})
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_write_failure_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"w": np.zeros(3, np.float32)})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch_folder.os, "replace", fail)
    assert "disk full" in message(write_safetensors, file, {"w": np.ones(3, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert not open_file(file)["w"].read().any()
    assert "folder exists" in message(write_safetensors, tmp_path / "no" / "x.safetensors", {})
    assert "cannot be written" in message(write_safetensors, file / "x.safetensors", {})


@pytest.mark.parametrize(
    ("header", "data", "found"),
    [
        ({"w": entry(0, 8, [2])}, b"1234567", "0 to 8 of 7"),
        ({"w": entry(0, 8, [2])}, b"123456789", "expected"),
        ({"w": entry(0, 8, [3])}, b"12345678", "expected 12"),
        ({"w": entry(8, 0, [2])}, b"12345678", "8 to 0"),
        ({"w": entry(0, 8, [-2])}, b"12345678", "damaged header"),
        ({"w": entry(0, 8, [2.0])}, b"12345678", "damaged header"),
        ({"w": entry(0, 8, [True, 2])}, b"12345678", "damaged header"),
        ({"w": entry(0, 8, [1] * 40 + [2])}, b"12345678", "damaged header"),
        ({"w": entry(0, 0, [0, 1 << 47, 1 << 47])}, b"", "damaged header"),
        ({"w": entry(0, 0, [10**30])}, b"", "damaged header"),
        ({"w": {"dtype": "F32"}}, b"", "damaged header"),
        ({"w": 3}, b"", "damaged header"),
        ({"w": entry(0, 2, [2], "F8_E4M3")}, b"12", "'F8_E4M3'"),
        ({"w": entry(0, 8, [2]), "v": entry(4, 12, [2])}, b"123456789012", "no overlap"),
        ({"w": entry(0, 4, [1]), "v": entry(8, 12, [1])}, b"123456789012", "no gap"),
        (b'{"w": {}, "w": {}}', b"", "'w' twice"),
        (b"[]", b"", "not a JSON object"),
        (b"{", b"", "expected valid JSON"),
        (b"[" * 100_000, b"", "expected valid JSON"),
        (b'{"w": ' + b"9" * 5000 + b"}", b"", "expected valid JSON"),
        (b"\xff\xfe", b"", "expected valid JSON"),
        ({}, b"", "no tensors"),
    ],
)
def test_bad_safetensors(tmp_path, header, data, found):
    file = header_file(tmp_path / "model.safetensors", header, data)
    line = message(open_folder, tmp_path)
    assert line.startswith(str(file)) and found in line


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", ("in a file of 0,", "an empty file")),
        (b"1234", ("in a file of 4,", "begins with b'1234'")),
        (b"<!DOCTYPE html><html></html>", ("a web page",) * 2),
        (
            b"version %s://git-lfs.github.com/spec/v1\noid sha256:0\n" % b"https",
            ("git lfs pull",) * 2,
        ),
        (b"hello, this is text", ("a header of", "begins with b'hello, this is t'")),
    ],
)
def test_not_weights_at_all(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    line = message(open_folder, tmp_path)
    assert line.startswith(f"{tmp_path / name}: ") and found[name.endswith("bin")] in line


def test_header_limit(tmp_path, monkeypatch):
    split(tmp_path, {"model.safetensors": ["w"]})
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 20)
    assert "20 at most" in message(open_folder, tmp_path)


def test_duplicate_key_is_found_in_linear_time(tmp_path):
    pairs = ",".join(f'"{name}": 0' for name in [*range(200_000), 199_999])
    file = header_file(tmp_path / "model.safetensors", f"{{{pairs}}}".encode())
    start = time.monotonic()
    assert "'199999' twice" in message(open_file, file)
    assert time.monotonic() - start < 10


def test_file_cut_after_opening(tmp_path):
    file = tmp_path / "model.safetensors"
    split(tmp_path, {file.name: ["w"]})
    lazy = open_folder(tmp_path)["w"]
    file.write_bytes(file.read_bytes()[:-1])
    assert "expected 12" in message(lazy.read)
    file.unlink()
    assert "cannot be read" in message(lazy.read)


# Folders and indices


def test_folder_problems(tmp_path):
    assert "nothing there" in message(open_folder, tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "a file" in message(open_folder, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    assert "no weights" in message(open_folder, tmp_path / "folder")
    assert "cannot be read" in message(open_file, tmp_path / "absent.bin")
    assert "cannot be read" in message(open_file, tmp_path / "folder")


def test_shards_with_index(tmp_path):
    split(tmp_path, {ONE: ["a"], TWO: ["b", "c"]}, {"a": ONE, "b": TWO, "c": TWO})
    opened = open_folder(tmp_path)
    assert {name: lazy.file.name for name, lazy in opened.items()} == {"a": ONE, "b": TWO, "c": TWO}


def test_shards_may_be_links_of_the_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    split(snapshot, {ONE: ["a"], TWO: ["b"]}, {"a": ONE, "b": TWO})
    for number_, name in enumerate((ONE, TWO, "model.safetensors.index.json")):
        (snapshot / name).rename(blobs / str(number_))
        (snapshot / name).symlink_to(f"../../blobs/{number_}")
    assert open_folder(snapshot)["b"].read().tolist() == [1, 1, 1]
    (blobs / "1").unlink()
    assert TWO in message(open_folder, snapshot)


def test_shards_without_index(tmp_path):
    split(tmp_path, {ONE: ["a"], TWO: ["b"]})
    assert sorted(open_folder(tmp_path)) == ["a", "b"]
    (tmp_path / ONE).unlink()
    assert "1 of 2 shards" in (line := message(open_folder, tmp_path)) and ONE in line
    split(tmp_path, {"model-00001-of-00003.safetensors": ["a"]})
    assert f"'{TWO}' next to shards 1 to 3" in message(open_folder, tmp_path)


def test_numbered_from_zero_is_refused(tmp_path):
    split(tmp_path, {ONE: ["a"], TWO: ["b"], "model-00000-of-00002.safetensors": ["c"]})
    assert "'model-00000-of-00002.safetensors' next to shards" in message(open_folder, tmp_path)


def test_safetensors_are_preferred_if_complete(tmp_path):
    archive(tmp_path, GOOD)
    (tmp_path / "pytorch_model.bin.index.json").write_text("never read")
    assert sorted(open_folder(tmp_path)) == ["v", "w"]
    split(tmp_path, {ONE: ["a"]}, {"a": ONE, "b": TWO})
    assert sorted(open_folder(tmp_path)) == ["v", "w"]
    split(tmp_path, {TWO: ["b"]})
    assert sorted(open_folder(tmp_path)) == ["a", "b"]
    (tmp_path / "pytorch_model.bin").unlink()
    assert sorted(open_folder(tmp_path)) == ["a", "b"]
    (tmp_path / TWO).unlink()
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    assert f"1 of 2 shards are not in the folder: '{TWO}'" in message(open_folder, tmp_path)


def test_index_and_shards_disagree_in_one_line(tmp_path):
    promised = [f"promised{number_:02}" for number_ in range(47)]
    split(
        tmp_path,
        {ONE: ["a", "twice"], TWO: ["twice", "stray"]},
        {"a": ONE, "twice": ONE, "moved": TWO} | dict.fromkeys(promised, TWO),
    )
    line = message(open_folder, tmp_path)
    assert "model.safetensors.index.json" in line and "1 in two files: 'twice'" in line
    assert "48 named by the index and not in their shard: 'moved (" in line
    assert "promised08" in line and "promised09" not in line and "and 38 more" in line
    assert "1 in a shard and not named by the index: 'stray'" in line


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", ".", "", "a\\x.safetensors"]
    + ["C:x.safetensors", "config.json", "x.bin", 3, None, ["x.safetensors"], {"x": []}],
)
def test_index_entry_must_be_a_plain_name(tmp_path, shard):
    (tmp_path / "x.safetensors").write_bytes(b"")
    inside = tmp_path / "model"
    inside.mkdir()
    split(inside, {}, {"w": shard})
    line = message(open_folder, inside)
    assert "tensor 'w' is in" in line and "index.json" in line and "correct the name" in line


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "expected valid JSON"),
        ("[" * 50_000, "expected valid JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "'w' twice"),
        ('{"weight_map": {"w": "\\u0000.safetensors"}}', "1 of 1 shards"),
        ('{"weight_map": {"w": "\\ud800.safetensors"}}', "1 of 1 shards"),
        (json.dumps({"weight_map": {"w": "x" * 5000 + ".safetensors"}}), "1 of 1 shards"),
    ],
)
def test_bad_index(tmp_path, content, found):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert found in message(open_folder, tmp_path)


# Archives of torch.save, made by hand


def test_archive(tmp_path):
    opened = open_file(archive(tmp_path, GOOD))
    assert opened["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert opened["v"].read().tolist() == [1, 4]
    assert opened["v"].position - opened["w"].position == 4


def test_archive_without_byteorder_and_with_metadata(tmp_path):
    metadata = dictionary(_metadata=ORDERED)
    file = tmp_path / "old.bin"
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("top/data.pkl", b"\x80\x02" + ORDERED + GOOD[1:] + metadata + b"b.")
        out.writestr("top/data/0", bytes(24))
    assert sorted(open_file(file)) == ["v", "w"]


def test_cycles_are_plain(tmp_path):
    cyclic = b"]q\x05h\x05a"
    assert sorted(open_file(archive(tmp_path, GOOD + text("x") + cyclic + b"s"))) == ["v", "w"]


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model"])
def test_wrapped(tmp_path, wrapper):
    entries = {wrapper: GOOD, "epoch": number(3), "args": dictionary(lr=b"N"), "names": b"]"}
    assert sorted(open_file(archive(tmp_path, dictionary(**entries)))) == ["v", "w"]
    entries["optimizer"] = dictionary(step=tensor(storage("0", 6)))
    assert "'optimizer' (dict)" in message(open_file, archive(tmp_path, dictionary(**entries)))


W = tensor(storage("0", 6))
# Each tuple holds the one before it twice: 2 ** 60 leaves, 61 objects.
BOMB = b")q\x00" + b"".join(b"h%c\x86q%c" % (k, k + 1) for k in range(60))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"cos\nsystem\n(X\x04\x00\x00\x00exittR", "'os.system'"),
        (b"cbuiltins\neval\n(X\x04\x00\x00\x001/0 tR", "'builtins.eval'"),
        (b"c__builtin__\neval\n(X\x04\x00\x00\x001/0 tR", "'__builtin__.eval'"),
        (b"cpixellm_jax.errors\nInputError\n", "'pixellm_jax.errors.InputError'"),
        (b"ctorch._utils\n_rebuild_tensor_v3\n", "_rebuild_tensor_v3"),
        (b"ctorch\nload\n", "'torch.load'"),
        (b"ctorch\nComplexFloatStorage\n", "ComplexFloatStorage"),
        (b"cco\nl\\nlections\n", "'co.l\\nlections'"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", "STACK_GLOBAL"),
        (b"(S'exit'\nios\nsystem\n", "opcode STRING"),
        (b"(ios\nsystem\n", "opcode INST"),
        (b"(cos\nsystem\no", "'os.system'"),
        (ORDERED[:-2] + b")\x81", "opcode NEWOBJ"),
        (b"\x82\x01", "opcode EXT1"),
        (ORDERED[:-2] + group(dictionary(a=b"N")) + b"R", "calls collections.OrderedDict"),
        (ORDERED[:-2] + b"]R", None),
        (ORDERED[:-2] + b"NR", "calls collections.OrderedDict"),
        (b"NN\x86)R", "calls no function"),
        (ORDERED + b")R", "calls no function"),
        (REBUILD + b")R", "calls torch._utils._rebuild_tensor_v2"),
        (REBUILD + dictionary(a=b"N") + b"b", "sets attributes"),
        (ORDERED + b"]b", "sets attributes"),
        (ORDERED + REBUILD + b"b", "sets attributes"),
        (b"NNNs", "sets items of an object which is no dictionary"),
        (b"NNa", "appends to an object which is no list"),
        (b"}" + b"NNs", "dictionary key of type NoneType"),
        (b"}" + b")Ns", "dictionary key of type tuple"),
        (BOMB + b"}h\x3cNs", "dictionary key of type tuple"),
        (dictionary(w=REBUILD), "entry 'w' (torch._utils._rebuild_tensor_v2)"),
        (dictionary(w=storage("0", 6)), "entry 'w' (Storage)"),
        (dictionary(a=W, deep=dictionary(w=W)), "entry 'deep' (dict)"),
        (dictionary(a=W, model=dictionary(w=W)), "entry 'model' (dict)"),
        (b"}K\x01" + W + b"s", "entry 1 (TensorView)"),
        (b"]", "holds a list"),
        (b"N", "holds a NoneType"),
        (W, "holds a TensorView"),
        (b"0", "opcode POP"),
        (b"u", "truncated or damaged"),
        (b"\x87", "truncated or damaged"),
        (b"h\x07", "truncated or damaged"),
        (b"q\x07", "truncated or damaged"),
        (b"(((", "truncated or damaged"),
        (b"}(Nu", "truncated or damaged"),
        (b"X\xff\xff\xff\x7fabc", "truncated or damaged"),
        (b"\xff", "truncated or damaged"),
        (b"L" + b"9" * 5000 + b"L\n", "truncated or damaged"),
    ],
)
def test_hostile_pickle(tmp_path, monkeypatch, value, found):
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("it ran"))
    file = archive(tmp_path, value)
    if found is None:  # harmless: an empty dictionary
        assert open_file(file) == {}
    else:
        line = message(open_file, file)
        assert line.startswith(f"{file}: ") and found in line


def test_nested_reduce_does_not_run(tmp_path):
    """The classic: an object whose `__reduce__` calls eval, pickled by Python itself."""

    class Attack:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps({"w": Attack()}, protocol)
        content = pickled.removeprefix(b"\x80\x02").removesuffix(b".")
        message(open_file, archive(tmp_path, content))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("deep", [b"]" * 10**5 + b"a" * (10**5 - 1), b")" + b"\x85" * 10**5])
def test_deep_nesting(tmp_path, deep):
    assert open_file(archive(tmp_path, dictionary(x=deep))) == {}


def test_memo_bombs(tmp_path):
    """A huge memo index takes no memory; tuples of tuples of tuples take no time."""
    start = time.monotonic()
    assert open_file(archive(tmp_path, b"}r\xff\xff\xff\xff")) == {}
    assert open_file(archive(tmp_path, dictionary(x=BOMB))) == {}
    shared = b"](" + b"N" * 100_000 + b"eq\x00"
    many = b"".join(b"M" + struct.pack("<H", key) + b"h\x00" for key in range(1 << 16))
    assert open_file(archive(tmp_path, b"}(K\x00" + shared + many + b"u")) == {}
    assert time.monotonic() - start < 5


def test_hash_and_argument_bombs(tmp_path):
    """Colliding keys, and calls with a huge argument list, end early."""
    integers = [k * (2**61 - 1) for k in range(1, 3000)]
    keys = b"".join(b"\x8a\x0c" + key.to_bytes(12, "little") + b"N" for key in integers)
    assert "colliding hashes" in message(open_file, archive(tmp_path, b"}(" + keys + b"u"))
    callee = b"ctorch._utils\n_rebuild_parameter_with_state\nq\x01"
    arguments = b"(" + tensor(storage("0", 6)) + b"N" * 10**6 + b"tq\x02"
    calls = b"](" + callee + arguments + b"R" + b"h\x01h\x02R" * 10**5 + b"e"
    start = time.monotonic()
    assert "instructions" in message(open_file, archive(tmp_path, dictionary(x=calls)))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"shape": (3, 3)}, "leaves its storage"),
        ({"offset": 1}, "leaves its storage"),
        ({"strides": (4, 1)}, "leaves its storage"),
        ({"shape": (1 << 47, 1 << 47)}, "leaves its storage"),
        ({"shape": (-2, 3)}, "no proper numbers"),
        ({"strides": (-3, 1)}, "no proper numbers"),
        ({"offset": -1}, "no proper numbers"),
        ({"shape": (1 << 63, 1)}, "no proper numbers"),
        ({"strides": (1 << 70, 1)}, "no proper numbers"),
        ({"strides": (1,)}, "no proper numbers"),
        ({"shape": (1,) * 40, "strides": (0,) * 40}, "no proper numbers"),
        ({"shape": (1 << 40, 1), "strides": (0, 0)}, "tensor.contiguous()"),
        ({"shape": (0, 1 << 47, 1 << 47), "strides": (0, 0, 0)}, "tensor.contiguous()"),
        ({"tail": dictionary(conj=b"\x88")}, "calls torch._utils._rebuild_tensor_v2"),
        ({"tail": b"K\x01"}, "calls torch._utils._rebuild_tensor_v2"),
    ],
)
def test_hostile_view(tmp_path, options, found):
    assert found in message(
        open_file, archive(tmp_path, dictionary(w=tensor(storage("0", 6), **options)))
    )


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (storage("0", 7), "truncated"),
        (storage("0", 1 << 47), "truncated"),
        (storage("0", 6, "DoubleStorage"), "truncated"),
        (storage("0", -1), "has a storage"),
        (storage("0", 1 << 63), "has a storage"),
        (storage("1", 6), "'top/data/1' is not in the archive"),
        (storage("../0", 6), "'top/data/../0' is not in the archive"),
        (storage("0", 6, "float32"), "has a storage"),
        (text("0") + b"Q", "has a storage"),
        (b")Q", "has a storage"),
        (b"NQ", "has a storage"),
    ],
)
def test_hostile_storage(tmp_path, stored, found):
    assert found in message(open_file, archive(tmp_path, dictionary(w=tensor(stored))))


def test_expanded_and_empty_views(tmp_path):
    value = dictionary(
        expanded=tensor(storage("0", 6), (3, 5), (0, 1)),
        empty=tensor(storage("0", 6), (0, 7), (7, 1)),
        scalar=tensor(storage("0", 6), (), (), 5),
    )
    opened = open_file(archive(tmp_path, value))
    assert opened["expanded"].read().tolist() == [[0, 1, 2, 3, 4]] * 3
    assert opened["empty"].read().shape == (0, 7)
    assert opened["scalar"].read().shape == () and opened["scalar"].read() == 5


def test_other_archives_are_refused(tmp_path):
    assert "compressed" in message(open_file, archive(tmp_path, GOOD, zipfile.ZIP_DEFLATED))
    assert "b'big'" in message(open_file, archive(tmp_path, GOOD, byteorder=b"big"))
    legacy = tmp_path / "legacy.bin"
    legacy.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    assert "_use_new_zipfile_serialization=True" in message(open_file, legacy)
    with tarfile.open(tmp_path / "tar.bin", "w") as out:
        out.add(legacy, "storages")
    assert "a tar archive" in message(open_file, tmp_path / "tar.bin")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as out:
        out.writestr("word/document.xml", b"")
    assert "0 TOP/data.pkl" in message(open_file, tmp_path / "other.bin")
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(tmp_path / "twice.bin", "w") as out,
    ):
        out.writestr("top/data.pkl", b"}.")
        out.writestr("top/data.pkl", b"}.")
    assert "no name twice" in message(open_file, tmp_path / "twice.bin")


def test_pickle_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 100)
    assert "at most 100" in message(open_file, archive(tmp_path, GOOD))


def test_every_truncation_is_reported(tmp_path):
    for file in (archive(tmp_path, GOOD), tmp_path / "model.safetensors"):
        if not file.exists():
            split(tmp_path, {file.name: ["a", "b"]})
        whole = file.read_bytes()
        for length in range(0, len(whole), 3):
            file.write_bytes(whole[:length])
            message(open_file, file)


def mutate(rng: random.Random, content: bytes) -> bytes:
    mutated = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(mutated))
        match rng.randrange(6):
            case 0:
                mutated[place] ^= 1 << rng.randrange(8)
            case 1:
                mutated[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del mutated[place : place + rng.randint(1, 8)]
            case 3:
                mutated[place:place] = rng.randbytes(rng.randint(1, 8))
            case 4:
                mutated[place : place + 4] = rng.choice(
                    (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f")
                )
            case 5:
                start = rng.randrange(len(mutated))
                mutated[place : place + 9] = mutated[start : start + 9]
    return bytes(mutated)


@pytest.mark.parametrize("kind", ["bin", "safetensors", "index"])
def test_mutated_files_raise_nothing_else(tmp_path, kind):
    if kind == "bin":
        file = archive(tmp_path, GOOD)
    elif kind == "safetensors":
        file = tmp_path / "model.safetensors"
        write_safetensors(file, {"w": np.ones((2, 3), np.float32), "v": np.ones(5, np.int8)})
    else:
        split(tmp_path, {ONE: ["a"], TWO: ["b"]}, {"a": ONE, "b": TWO})
        file = tmp_path / "model.safetensors.index.json"
    whole = file.read_bytes()
    rng = random.Random(kind)
    refused = 0
    start = time.monotonic()
    for _ in range(400):
        file.write_bytes(mutate(rng, whole))
        try:
            for lazy in open_folder(tmp_path).values():
                assert lazy.read().shape == lazy.shape
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100
    assert time.monotonic() - start < 60


MEASURE = """
import re, sys
from pathlib import Path
from pixellm_jax.weights.torch_folder import open_folder

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

tensors = open_folder(Path(sys.argv[1]))
before = peak()
for lazy in tensors.values():
    assert lazy.read()[-1, -1] == 0
print(len(tensors), peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_one_tensor(tmp_path):
    """Ten tensors of 30 MiB each."""
    count, rows = 10, 30 * 1024 // 4
    weights = (tensor(storage(str(k), rows * 1024), (rows, 1024), (1024, 1)) for k in range(count))
    zeros = bytes(rows * 1024 * 4)
    value = dictionary(**{f"w{k}": weight for k, weight in enumerate(weights)})
    archive(tmp_path, value, **{f"data/{k}": zeros for k in range(count)})
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found, growth = done.stdout.split()
    assert int(found) == count
    assert 25 < float(growth) < 40
