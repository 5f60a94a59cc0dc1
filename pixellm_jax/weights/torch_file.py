"""Locate the tensors in a file of `torch.save`, without PyTorch and without running its code.

Such a file (PyTorch 1.6 or later) is an uncompressed zip archive. `TOP/data.pkl` is a pickle of the
saved object, `TOP/data/KEY` holds the bytes of storage KEY, and a tensor is a storage with an
offset, a shape and strides (torch/serialization.py, torch/_utils.py). The restricted unpickler
accepts the few opcodes and names that a dictionary of tensors needs, the same idea as
`torch.load(weights_only=True)`. Nothing that the file names is ever imported or called.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, NoReturn

import ml_dtypes
import numpy as np

from pixellm_jax.errors import InputError
from pixellm_jax.safe_pickle import DAMAGE, LimitError, SafeUnpickler, WrongOperandError, short_name
from pixellm_jax.weights.tensor_view import MAX_AXES, TensorView, is_size

MAX_PICKLE_BYTES = 4 << 20
"""Maximum size of `data.pkl`. A tensor takes about 250 bytes of it: enough for 15 000 tensors."""

MAX_EXPANDED = 1 << 24
"""Maximum number of elements of an expanded view, which repeats the values of its storage."""

_WRAPPERS = ("state_dict", "module", "model")
_AGAIN = "download or save the file again"
_ONLY_MODEL = "save only the state_dict of the model"
_RESAVE = "use torch.save(..., _use_new_zipfile_serialization=True) or save it as safetensors"
_BAD_ZIP = (zipfile.BadZipFile, RuntimeError, ValueError, OverflowError, struct.error)

_STORAGES: dict[str, np.dtype] = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_DTYPES = frozenset(f"torch.{dtype.name}" for dtype in _STORAGES.values())
_BUILDERS = ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
_CALLS = {"collections.OrderedDict", "torch.Size", *(f"torch._utils.{name}" for name in _BUILDERS)}


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    position: int
    numel: int


@dataclass(frozen=True)
class _Global:
    """A global of the pickle, `module.name`. It is compared, never resolved."""

    name: str


def find_tensors(stream: BinaryIO) -> dict[str, TensorView]:
    """Return the tensors of an open `.bin` archive by name; only the headers are read.

    A dictionary inside `{"state_dict": ...}`, `{"module": ...}` or `{"model": ...}` is unwrapped.
    Plain values next to the tensors (numbers, strings, None and containers of these) are left out.

    Raises:
        InputError: the file is no such archive, is damaged or truncated, or holds anything else.
            The message lacks the name of the file, which the caller knows.
    """
    archive = _Archive(stream)
    order = archive.read("byteorder", limit=16) if archive.has("byteorder") else b"little"
    if order != b"little":
        raise InputError(f"byte order {order!r}, expected b'little'; save it on such a machine")
    return _state_dict(_TensorUnpickler(archive, archive.read("data.pkl", MAX_PICKLE_BYTES)).load())


class _Archive:
    """Members of a zip archive below its only top folder, located by byte range."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        head = stream.read(512)
        if not head.startswith(b"PK"):
            raise InputError(f"{_describe(head)}, expected a zip archive of torch.save; {_RESAVE}")
        try:
            with zipfile.ZipFile(stream) as archive:
                members = archive.infolist()
        except _BAD_ZIP as error:
            raise InputError(
                f"no zip directory ({error}): truncated or damaged; {_AGAIN}"
            ) from error
        self._members = {member.filename: member for member in members}
        paths = [name.split("/") for name in self._members]
        tops = [path[0] + "/" for path in paths if path[1:] == ["data.pkl"]]
        if len(tops) != 1 or len(self._members) != len(members):
            found = f"a zip archive with {len(tops)} TOP/data.pkl"
            raise InputError(f"{found}, expected one and no name twice; {_RESAVE}")
        self._top = tops[0]

    def has(self, name: str) -> bool:
        return self._top + name in self._members

    def locate(self, name: str) -> tuple[int, int]:
        """Return the position and the size, in bytes, of member `TOP/name` in the file."""
        where = f"member {self._top + name!r}"
        member = self._members.get(self._top + name)
        if member is None:
            raise InputError(f"{where} is not in the archive; {_AGAIN}")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise InputError(f"{where} is compressed or encrypted, expected plain bytes; {_RESAVE}")
        header = b""
        if 0 <= member.header_offset < self._size:
            self._stream.seek(member.header_offset)
            header = self._stream.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise InputError(f"{where} has no header at byte {member.header_offset}; {_AGAIN}")
        position = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        end = position + member.file_size
        if end > self._size:
            found = f"{where} should end at byte {end}, the file ends at {self._size}"
            raise InputError(f"{found}: truncated; {_AGAIN}")
        return position, member.file_size

    def read(self, name: str, limit: int) -> bytes:
        position, size = self.locate(name)
        if size > limit:
            raise InputError(f"{name} has {size} bytes, expected at most {limit}; {_ONLY_MODEL}")
        self._stream.seek(position)
        return self._stream.read(size)


class _TensorUnpickler(SafeUnpickler):
    """Unpickler of plain data and tensors: the opcodes of protocol 2 that `torch.save` writes."""

    opcodes = frozenset(
        ("PROTO", "STOP", "MARK", "GLOBAL", "BINPERSID", "REDUCE", "BUILD")
        + ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
        + ("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE")
        + ("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS")
        + ("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET")
    )
    key_types: ClassVar[set[type]] = {str, int, bool}
    max_integer_bits = 8 * 255

    def __init__(self, archive: _Archive, data: bytes) -> None:
        super().__init__(data)
        self._archive = archive

    def load(self) -> Any:
        """Return the object in the pickle, made of builtins, `TensorView` and `_Storage`."""
        try:
            return super().load()
        except (LimitError, WrongOperandError) as error:
            self._refuse(str(error))
        except DAMAGE as error:
            reason = repr(str(error)[:100])
            raise InputError(f"data.pkl is truncated or damaged ({reason}); {_AGAIN}") from error

    def find_class(self, module: str, name: str) -> _Global | str:
        full_name = f"{module}.{name}"
        if full_name in _DTYPES:
            return full_name
        if full_name not in _CALLS and full_name not in _STORAGES:
            self._refuse(f"asks for the Python object '{short_name(module, name, 120)}'")
        return _Global(full_name)

    def refuse_opcode(self, opcode: pickletools.OpcodeInfo) -> NoReturn:
        if opcode.arg is not None:
            opcode.arg.reader(self.source)  # a truncated operand is reported as damage
        self._refuse(f"uses opcode {opcode.name}, which torch.save does not write for tensors")

    def load_build(self) -> None:
        """Drop the attributes of a dictionary, such as `_metadata` of a state_dict."""
        if not isinstance(self.stack.pop(), dict) or not isinstance(self.stack[-1], dict):
            self._refuse("sets attributes of an object which is no dictionary")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _Global(kind), str(key), _, n) if kind in _STORAGES and is_size(n):
                dtype = _STORAGES[kind]
            case _:
                self._refuse("has a storage which is not (storage, type, key, place, numel)")
        position, size = self._archive.locate(f"data/{key}")
        if n * dtype.itemsize > size:
            found = f"storage {key[:40]!r} has {size} bytes"
            raise InputError(f"{found}, expected {n} values of {dtype}: truncated; {_AGAIN}")
        return _Storage(dtype, position, n)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if isinstance(arguments, tuple):
            self.budget.spend(len(arguments))
        name = function.name if isinstance(function, _Global) else "no function"
        self.append(self._call(name, arguments))

    def _call(self, name: str, arguments: Any) -> Any:
        match (name, arguments):
            case ("collections.OrderedDict", ()):
                return {}
            case ("torch.Size", (tuple(shape),)):
                return shape
            case ("torch._utils._rebuild_parameter", (TensorView() as tensor, _, _)):
                return tensor
            case ("torch._utils._rebuild_parameter_with_state", (TensorView() as tensor, *_)):
                return tensor
            case (
                "torch._utils._rebuild_tensor_v2",
                (_Storage() as storage, offset, tuple(shape), tuple(strides), _, _, *metadata),
            ) if not any(metadata):  # metadata marks a negative or conjugate view
                return self._tensor(storage, offset, shape, strides)
        self._refuse(f"calls {name} with arguments which torch.save does not write for a tensor")

    def _tensor(self, storage: _Storage, offset: Any, shape: tuple, strides: tuple) -> TensorView:
        sizes = (offset, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > MAX_AXES or not all(map(is_size, sizes)):
            self._refuse("has a tensor whose shape, strides or offset are no proper numbers")
        where = f"a tensor of shape {shape}, strides {strides} and offset {offset}"
        count = math.prod(max(length, 1) for length in shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.numel:
            raise InputError(f"{where} leaves its storage of {storage.numel} values; {_AGAIN}")
        if count > max(storage.numel, MAX_EXPANDED):
            expected = f"expected at most {MAX_EXPANDED} for {storage.numel}"
            raise InputError(f"{where} has {count} values, {expected}; save tensor.contiguous()")
        position = storage.position + offset * storage.dtype.itemsize
        return TensorView(storage.dtype, shape, strides, position)

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"data.pkl {what}; only a dictionary of plain tensors is read: load the "
            "file in PyTorch if you trust it, and save only its state_dict"
        )


def _state_dict(saved: Any) -> dict[str, TensorView]:
    """Unwrap the dictionary of tensors of a saved object."""
    if not isinstance(saved, dict):
        raise InputError(f"holds a {_type(saved)}, expected a dictionary; {_ONLY_MODEL}")
    wrapper = next((key for key in _WRAPPERS if isinstance(saved.get(key), dict)), None)
    if wrapper is None or any(isinstance(value, TensorView) for value in saved.values()):
        return _tensors(saved)
    inner = saved.pop(wrapper)
    _tensors(saved)
    return _tensors(inner)


def _tensors(state: dict[Any, Any]) -> dict[str, TensorView]:
    """Return the tensors of a dictionary; refuse entries that are neither tensors nor plain."""
    tensors = {}
    seen: set[int] = set()
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, TensorView):
            tensors[name] = value
        elif not _is_plain(value, seen):
            found = f"entry {name!r:.120} ({_type(value)})"
            raise InputError(f"{found} is no tensor with a name, nor plain values; {_ONLY_MODEL}")
    return tensors


def _is_plain(value: Any, seen: set[int]) -> bool:
    """Return whether a value consists of numbers, strings and None.

    `seen`: ids of the containers that were checked before; the new ones are added.
    """
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list | tuple):
            if id(item) not in seen:
                seen.add(id(item))
                waiting.extend(item.values() if isinstance(item, dict) else item)
        elif not isinstance(item, int | float | str | None):
            return False
    return True


def _type(value: Any) -> str:
    return value.name if isinstance(value, _Global) else type(value).__name__.strip("_")


def _describe(head: bytes) -> str:
    """Describe a file that is no zip archive by its first 512 bytes."""
    if not head:
        return "an empty file"
    if head[257:262] == b"ustar":
        return "a tar archive (the format before PyTorch 0.4)"
    if head[:1] == b"\x80":
        return "a bare pickle (the format before PyTorch 1.6)"
    return f"a file that begins with {head[:16]!r}"
