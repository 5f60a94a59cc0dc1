"""Restricted unpickling: an `Unpickler` with an allow-list of opcodes and a budget.

A pickle is a program for a stack machine, and the plain `pickle.Unpickler` runs whatever the file
asks for. `SafeUnpickler` accepts the opcodes that its subclass lists, resolves globals only through
the `find_class` of the subclass, and stops when the budget is spent. It extends the implementation
of the standard library that is written in Python (`pickle._Unpickler`) because the one in C can be
attacked where no subclass can interfere: it allocates an array as long as the largest memo index
that the file names, and it hashes nested tuples recursively when they are dictionary keys.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import struct
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn

MAX_OPCODES = 2**25
"""Default budget, 33 million opcodes. The published dataset indices have about 10 million."""

MAX_HASH_COLLISIONS = 1024
"""Maximum number of keys of a pickle whose hash equals the hash of another key."""

SCALARS = {str, bytes, int, float, bool, type(None)}

DAMAGE = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
"""Errors that `SafeUnpickler.load` raises for damaged pickles: an empty stack, a wrong operand."""


class WrongOperandError(TypeError):
    """An opcode is applied to a value of a wrong type. The message completes "the pickle ..."."""


class LimitError(Exception):
    """A pickle exceeds a limit of the reader. The message completes "the pickle ..."."""


class Budget:
    """Opcode table of one unpickler that counts the opcodes looked up in it.

    The memory of a pickle that is read stays below its size and 250 bytes per unit of the budget.
    """

    def __init__(self, handlers: dict[int, Callable[[Any], None]], limit: int) -> None:
        self._handlers = handlers
        self._limit = limit
        self._spent = 0

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self._spent += 1
        if self._spent > self._limit:
            self._refuse()
        return self._handlers[code]

    def spend(self, units: int) -> None:
        """Charge for an opcode that copies or hashes `units` values."""
        self._spent += units
        if self._spent > self._limit:
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise LimitError(f"has more than {self._limit} instructions")


class SafeUnpickler(pickle._Unpickler):
    """Unpickler for the opcodes in `opcodes`, named as in `pickletools`.

    Keys of dictionaries and members of sets are scalars or flat tuples of scalars, and containers
    are the builtin ones, so that no code of the file and no recursion runs. A subclass overrides
    `find_class`, `refuse_opcode` and, if it lists these opcodes, `load_reduce`, `load_build` and
    `persistent_load`; no such method may look up a name in a module.

        class Numbers(SafeUnpickler):
            opcodes = frozenset({"PROTO", "FRAME", "BININT1", "STOP"})
            ...
        Numbers(pickle.dumps(3)).load()  ->  3

    Attributes:
        opcodes: names of the opcodes to read.
        key_types: types of keys and members; tuples must be flat.
        max_integer_bits: maximum length of an integer.
        source: the pickle; `source.tell()` is the position of the next opcode.
        budget: counts opcodes, at most `max_opcodes` of them.
    """

    opcodes: ClassVar[frozenset[str]]
    key_types: ClassVar[set[type]] = SCALARS | {tuple}
    max_integer_bits: ClassVar[int] = 512
    _handlers: ClassVar[dict[int, Callable[[Any], None]]]
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, data: bytes, max_opcodes: int = MAX_OPCODES) -> None:
        self.source = io.BytesIO(data)
        super().__init__(self.source)
        self.budget = Budget(self._handlers, max_opcodes)
        # `load` looks its handlers up in this attribute; the class has a plain dictionary there.
        self.dispatch = self.budget  # type: ignore[assignment, misc]
        self._first_keys: dict[int, Any] = {}
        self._collisions = 0

    def __init_subclass__(cls) -> None:
        """Collect the handler of every known opcode, by its byte."""
        cls._handlers = {}
        for opcode in pickletools.opcodes:
            code = ord(opcode.code)
            if opcode.name in cls.opcodes:
                cls._handlers[code] = getattr(cls, pickle._Unpickler.dispatch[code].__name__)
            else:
                cls._handlers[code] = functools.partial(_refuse_opcode, opcode)

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global of the pickle, or raise `InputError`."""
        raise NotImplementedError

    def refuse_opcode(self, opcode: pickletools.OpcodeInfo) -> NoReturn:
        """Raise `InputError` for an opcode that is not in `opcodes`."""
        raise NotImplementedError

    def check_key(self, key: Any) -> None:
        """Raise an error unless a value can be hashed safely.

        The hash of a nested tuple recurses; and a file can choose long integers and tuples whose
        hashes collide, which makes a dictionary as slow as a list.

        Raises:
            WrongOperandError: the type is not in `key_types`, or the value is a nested tuple.
            LimitError: `MAX_HASH_COLLISIONS` is exceeded.
        """
        kind = type(key)
        if kind not in self.key_types or (kind is tuple and not SCALARS.issuperset(map(type, key))):
            raise WrongOperandError(f"has a dictionary key of type {kind.__name__}")
        if kind is tuple:
            self.budget.spend(len(key))
        elif kind is not int or -(1 << 63) <= key < 1 << 63:
            return
        self._collisions += self._first_keys.setdefault(hash(key), key) != key
        if self._collisions > MAX_HASH_COLLISIONS:
            raise LimitError(f"has {self._collisions} keys with colliding hashes")

    def pairs(self, items: list[Any]) -> Iterable[tuple[Any, Any]]:
        """Return [key, value, key, value, ...] as pairs, the keys checked."""
        if len(items) % 2:
            raise ValueError("a key without a value")
        keys = items[::2]
        for key in keys:
            if type(key) is not str:
                self.check_key(key)
        return zip(keys, items[1::2], strict=True)

    def load_frame(self) -> None:
        self.read(8)  # frames only help to read ahead

    def load_int(self) -> None:
        super().load_int()  # type: ignore[misc]
        self._check_integer()

    def load_long(self) -> None:
        super().load_long()  # type: ignore[misc]
        self._check_integer()

    def load_long1(self) -> None:
        super().load_long1()  # type: ignore[misc]
        self._check_integer()

    def load_long4(self) -> None:
        super().load_long4()  # type: ignore[misc]
        self._check_integer()

    def load_append(self) -> None:
        value = self.stack.pop()
        self._list().append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        self._list().extend(values)

    def load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        target = self._dict()
        if type(key) is not str:
            self.check_key(key)
        target[key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = self._dict()
        target.update(self.pairs(items))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(dict(self.pairs(items)))

    def load_additems(self) -> None:
        members = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise WrongOperandError("adds members to an object which is no set")
        for member in members:
            self.check_key(member)
        self.stack[-1].update(members)

    def load_frozenset(self) -> None:
        members = self.pop_mark()
        for member in members:
            self.check_key(member)
        self.append(frozenset(members))

    def _list(self) -> list[Any]:
        if type(self.stack[-1]) is not list:
            raise WrongOperandError("appends to an object which is no list")
        return self.stack[-1]

    def _dict(self) -> dict[Any, Any]:
        if type(self.stack[-1]) is not dict:
            raise WrongOperandError("sets items of an object which is no dictionary")
        return self.stack[-1]

    def _check_integer(self) -> None:
        if self.stack[-1].bit_length() > self.max_integer_bits:
            raise OverflowError(f"an integer of more than {self.max_integer_bits} bits")


def short_name(module: str, name: str, length: int) -> str:
    """Return the name of a global for a message: one line of at most `length` characters."""
    text = f"{module}.{name}"[:length]
    return text if text.isprintable() else repr(text)[1:-1]


def _refuse_opcode(opcode: pickletools.OpcodeInfo, unpickler: SafeUnpickler) -> None:
    unpickler.refuse_opcode(opcode)
