"""The instructions of a pickle that make plain data, and no others.

Python's `pickletools` lists them (protocols 0 to 5). A machine has a stack of values, a memo of
values by number, and marks in the stack from where an instruction takes all that is above.

    ( I1 I2 l p0 .     mark, 1, 2, list from the mark, keep it as number 0, end  ->  [1, 2]
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from pixellm_jax.errors import InputError

STEP_LIMIT = 2**25
"""Most instructions, 33 million. The published indices have about 10 million."""

INTEGER_LIMIT = 64
"""Longest integer, in bytes."""

CONTAINERS = (list, dict, set, tuple, frozenset)
_SCALARS = (str, bytes, int, float, bool, type(None))


class _Name(NamedTuple):
    """A global that `_CALLS` knows."""

    module: str
    name: str


def _refuse(what: str) -> InputError:
    return InputError(
        f"names {what}, which could run a program: only lists, dictionaries, sets, numbers and "
        "text are read; get the file from a source that you trust or convert it to JSON"
    )


def _latin_1(text: str = "", encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(encoding)
    return text.encode("latin-1")


def _from_list(kind: Callable[[list], Any]) -> Callable[..., Any]:
    def make(values: list | None = None) -> Any:
        if type(values) not in (list, type(None)):
            raise TypeError(type(values))
        return kind([_hashable(value) for value in values or ()])

    return make


_CALLS: dict[_Name, Callable[..., Any]] = {
    _Name("_codecs", "encode"): _latin_1,
    **{
        _Name(module, name): make
        for module in ("builtins", "__builtin__")
        for name, make in (
            ("set", _from_list(set)),
            ("frozenset", _from_list(frozenset)),
            ("bytes", _latin_1),
        )
    },
}
"""What protocols 0 to 3 write for sets and bytes, which they have no instruction for."""


def _hashable(key: Any) -> Any:
    """A key of a dictionary or a member of a set: one value or a flat tuple (hashing recurses)."""
    if type(key) in _SCALARS:
        return key
    if type(key) is tuple and all(type(part) in _SCALARS for part in key):
        return key
    raise TypeError(f"{type(key).__name__} as a key")


def _text_2(data: bytes) -> str:
    """A byte string of Python 2."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _quoted(line: bytes) -> str:
    """The text between the quotes of a Python literal."""
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("no quotes")
    inner = line[1:-1]
    return _text_2(codecs.escape_decode(inner)[0] if b"\\" in inner else inner)


def _integer(line: bytes) -> int | bool:
    if line in (b"00", b"01"):
        return line == b"01"
    return _bounded(int(line))


def _bounded(value: int) -> int:
    if value.bit_length() > 8 * INTEGER_LIMIT:
        raise OverflowError("integer")
    return value


class Machine:
    """A stack of values, the stacks below the open marks, and values by number (the memo)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.shared = False

    def run(self) -> Any:
        for _ in range(STEP_LIMIT):
            code = self.data[self.at]
            self.at += 1
            if code == _STOP:
                return self.stack.pop()
            _STEPS[code](self)
        raise InputError(f"has more than {STEP_LIMIT} instructions: convert it to JSON")

    def line(self) -> bytes:
        end = self.data.index(b"\n", self.at)
        line, self.at = self.data[self.at : end], end + 1
        return line

    def take(self, size: int) -> bytes:
        taken = self.data[self.at : self.at + size]
        if len(taken) < size:
            raise IndexError("cut off")
        self.at += size
        return taken

    def count(self, size: int) -> int:
        """A number of `size` bytes, lowest first, not negative."""
        return int.from_bytes(self.take(size), "little")

    def sized(self, size: int) -> bytes:
        """The bytes after their number, which takes `size` bytes itself."""
        return self.take(self.count(size))

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def keep(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def again(self, value: Any) -> None:
        self.shared = self.shared or isinstance(value, CONTAINERS)
        self.stack.append(value)

    def tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError("tuple")
        self.stack[-size:] = [tuple(self.stack[-size:])]

    def append(self) -> None:
        value = self.stack.pop()
        list.append(self.stack[-1], value)

    def extend(self) -> None:
        values = self.since_mark()
        list.extend(self.stack[-1], values)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        dict.__setitem__(self.stack[-1], _hashable(key), value)

    def set_items(self) -> None:
        items = _pairs(self.since_mark())
        dict.update(self.stack[-1], items)

    def add_items(self) -> None:
        members = map(_hashable, self.since_mark())
        set.update(self.stack[-1], members)

    def name(self, module: Any, name: Any) -> None:
        if (found := _Name(module, name)) not in _CALLS:
            raise _refuse(f"the global {_short(module)}.{_short(name)}")
        self.stack.append(found)

    def name_from_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("name")
        self.name(module, name)

    def call(self) -> None:
        given, name = self.stack.pop(), self.stack.pop()
        if type(name) is not _Name or type(given) is not tuple:
            raise TypeError("call")
        self.stack.append(_CALLS[name](*given))


def _pairs(values: list[Any]) -> dict[Any, Any]:
    keys = map(_hashable, values[::2])
    return dict(zip(keys, values[1::2], strict=True))


def _short(text: str) -> str:
    return text[:60] if text.isprintable() else repr(text[:60])


def _push(read: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def step(machine: Machine) -> None:
        value = read(machine)  # first: reading may change the stack
        machine.stack.append(value)

    return step


def _never(what: str) -> Callable[[Machine], None]:
    def step(machine: Machine) -> None:
        raise _refuse(what)

    return step


def _utf_8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _signed(data: bytes) -> int:
    return _bounded(int.from_bytes(data, "little", signed=True))


_STOP = ord(".")

_STEPS: dict[int, Callable[[Machine], Any]] = {
    code[0]: step
    for code, step in {
        # structure
        b"\x80": lambda m: m.take(1),  # protocol
        b"\x95": lambda m: m.take(8),  # frame
        b"(": Machine.mark,
        b"0": Machine.pop,
        b"1": Machine.since_mark,
        b"2": lambda m: m.again(m.stack[-1]),
        # the memo
        b"p": lambda m: m.keep(int(m.line())),
        b"q": lambda m: m.keep(m.count(1)),
        b"r": lambda m: m.keep(m.count(4)),
        b"\x94": lambda m: m.keep(len(m.memo)),
        b"g": lambda m: m.again(m.memo[int(m.line())]),
        b"h": lambda m: m.again(m.memo[m.count(1)]),
        b"j": lambda m: m.again(m.memo[m.count(4)]),
        # constants and numbers
        b"N": _push(lambda m: None),
        b"\x88": _push(lambda m: True),
        b"\x89": _push(lambda m: False),
        b"I": _push(lambda m: _integer(m.line())),
        b"J": _push(lambda m: _signed(m.take(4))),
        b"K": _push(lambda m: m.count(1)),
        b"M": _push(lambda m: m.count(2)),
        b"L": _push(lambda m: _bounded(int(m.line().rstrip(b"L")))),
        b"\x8a": _push(lambda m: _signed(m.sized(1))),
        b"\x8b": _push(lambda m: _signed(m.sized(4))),
        b"F": _push(lambda m: float(m.line())),
        b"G": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
        # text and bytes
        b"S": _push(lambda m: _quoted(m.line())),
        b"T": _push(lambda m: _text_2(m.sized(4))),
        b"U": _push(lambda m: _text_2(m.sized(1))),
        b"V": _push(lambda m: m.line().decode("raw-unicode-escape")),
        b"X": _push(lambda m: _utf_8(m.sized(4))),
        b"\x8c": _push(lambda m: _utf_8(m.sized(1))),
        b"\x8d": _push(lambda m: _utf_8(m.sized(8))),
        b"B": _push(lambda m: m.sized(4)),
        b"C": _push(lambda m: m.sized(1)),
        b"\x8e": _push(lambda m: m.sized(8)),
        # containers
        b"]": _push(lambda m: []),
        b"a": Machine.append,
        b"e": Machine.extend,
        b"l": _push(Machine.since_mark),
        b")": _push(lambda m: ()),
        b"t": _push(lambda m: tuple(m.since_mark())),
        b"\x85": lambda m: m.tuple(1),
        b"\x86": lambda m: m.tuple(2),
        b"\x87": lambda m: m.tuple(3),
        b"}": _push(lambda m: {}),
        b"d": _push(lambda m: _pairs(m.since_mark())),
        b"s": Machine.set_item,
        b"u": Machine.set_items,
        b"\x8f": _push(lambda m: set()),
        b"\x90": Machine.add_items,
        b"\x91": _push(lambda m: frozenset(map(_hashable, m.since_mark()))),
        # names
        b"c": lambda m: m.name(_utf_8(m.line()), _utf_8(m.line())),
        b"\x93": Machine.name_from_stack,
        b"i": lambda m: m.name(_utf_8(m.line()), _utf_8(m.line())),
        b"R": Machine.call,
        b"o": _never("a class"),
        b"b": _never("the state of an object"),
        b"\x81": _never("a new object"),
        b"\x92": _never("a new object"),
        b"\x82": _never("an extension code"),
        b"\x83": _never("an extension code"),
        b"\x84": _never("an extension code"),
        b"P": _never("an object outside the file"),
        b"Q": _never("an object outside the file"),
        b"\x96": _never("a writable buffer"),
        b"\x97": _never("a buffer outside the file"),
        b"\x98": _never("a buffer outside the file"),
    }.items()
}
"""What each instruction does; the letters are those of `pickletools`."""
