"""Safe reader for pickles of plain data: it imports, calls and builds nothing from the file.

The reference unpickles the refer indices, which lets a file execute arbitrary code
(docs/reference_notes.md D27). `SafeUnpickler` accepts the opcodes that make lists, tuples,
dictionaries, sets, numbers and text (protocols 0 to 5). The few names of builtin containers that
protocols 0 to 3 need for sets and bytes are compared as text, never resolved.

Limits: `SIZE_LIMIT` bytes and `STEP_LIMIT` opcodes; integers of 64 bytes; containers that are
referenced several times, counted at each place, `STEP_LIMIT` values.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pixellm_jax.errors import InputError
from pixellm_jax.safe_pickle import DAMAGE, MAX_OPCODES, LimitError, SafeUnpickler, short_name

SIZE_LIMIT = 512 * 2**20
"""Maximum size of a file, in bytes. The published indices have less than 150 MB."""

STEP_LIMIT = MAX_OPCODES
"""Maximum number of opcodes."""

CONTAINERS = (list, dict, set, tuple, frozenset)


def load(path: Path) -> Any:
    """Return the data in a pickle: containers, numbers, text, bytes, bools and None.

    Byte strings of Python 2 become text: UTF-8 where they are valid UTF-8, otherwise Latin-1.

    Raises:
        InputError: the file is missing, exceeds the limits, is not a pickle, is cut off, contains
            itself, or refers to a global (a class or function), whose name the message gives.
    """
    name = repr(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): check the path") from None
    if len(data) > SIZE_LIMIT:
        raise InputError(f"{name} has more than {SIZE_LIMIT} bytes: convert it to JSON")
    try:
        return loads(data)
    except InputError as error:
        raise InputError(f"{name} {error}") from None


def loads(data: bytes) -> Any:
    """Return the data of a pickle in memory; error messages lack the file name, unlike `load`."""
    unpickler = _PlainUnpickler(data, STEP_LIMIT)
    try:
        value = unpickler.load()
    except LimitError as error:
        raise InputError(f"{error}: convert it to JSON") from None
    except DAMAGE as error:
        where = f"at byte {unpickler.source.tell()} ({type(error).__name__})"
        raise InputError(f"is not a whole pickle {where}: download it again") from None
    if unpickler.has_shared_containers and _expanded_size(value) > STEP_LIMIT:
        raise InputError(f"repeats its parts more than {STEP_LIMIT} times: do not use it")
    return value


class _Name(NamedTuple):
    """A global that `load_reduce` knows."""

    module: str
    name: str


_BYTES = {_Name("_codecs", "encode")}
_KNOWN = _BYTES.copy()
for _module in ("builtins", "__builtin__"):
    _BYTES.add(_Name(_module, "bytes"))
    _KNOWN |= {_Name(_module, kind) for kind in ("bytes", "set", "frozenset")}
# Rejected opcodes: they build objects.
_REFUSED = {
    "INST": "a class",
    "OBJ": "a class",
    "BUILD": "the state of an object",
    "NEWOBJ": "a new object",
    "NEWOBJ_EX": "a new object",
    "EXT1": "an extension code",
    "EXT2": "an extension code",
    "EXT4": "an extension code",
    "PERSID": "an object outside the file",
    "BINPERSID": "an object outside the file",
    "BYTEARRAY8": "a writable buffer",
    "NEXT_BUFFER": "a buffer outside the file",
    "READONLY_BUFFER": "a buffer outside the file",
}


class _PlainUnpickler(SafeUnpickler):
    """Unpickler of plain data.

    Attributes:
        has_shared_containers: whether a container was pushed a second time.
    """

    opcodes = frozenset(opcode.name for opcode in pickletools.opcodes) - _REFUSED.keys()

    def __init__(self, data: bytes, max_opcodes: int) -> None:
        super().__init__(data, max_opcodes)
        self.has_shared_containers = False

    def find_class(self, module: str, name: str) -> _Name:
        global_name = _Name(module, name)
        if global_name not in _KNOWN:
            self._refuse(f"the global {short_name(module, name, 120)}")
        return global_name

    def refuse_opcode(self, opcode: pickletools.OpcodeInfo) -> NoReturn:
        self._refuse(_REFUSED[opcode.name])

    def load_reduce(self) -> None:
        """Build sets and bytes, which protocols 0 to 3 write as calls of a global."""
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(function) is not _Name or type(arguments) is not tuple:
            raise TypeError("call")
        self.budget.spend(sum(map(len, arguments)))
        if function in _BYTES:
            self.append(_latin_1(*arguments))
        else:
            members = self._members(*arguments)
            self.append(set(members) if function.name == "set" else frozenset(members))

    def _members(self, members: list[Any] | None = None) -> list[Any]:
        if type(members) not in (list, type(None)):
            raise TypeError(type(members))
        for member in members or ():
            self.check_key(member)
        return members or []

    def _decode_string(self, value: bytes) -> str:
        """Decode a byte string of Python 2: UTF-8, else Latin-1."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")

    def load_dup(self) -> None:
        super().load_dup()  # type: ignore[misc]
        self._note_shared()

    def load_get(self) -> None:
        super().load_get()  # type: ignore[misc]
        self._note_shared()

    def load_binget(self) -> None:
        super().load_binget()  # type: ignore[misc]
        self._note_shared()

    def load_long_binget(self) -> None:
        super().load_long_binget()  # type: ignore[misc]
        self._note_shared()

    def _note_shared(self) -> None:
        if isinstance(self.stack[-1], CONTAINERS):
            self.has_shared_containers = True

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"names {what}, which could run a program: only lists, dictionaries, sets, numbers and "
            "text are read; get the file from a source that you trust or convert it to JSON"
        )


def _latin_1(text: str = "", encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(encoding)
    return text.encode("latin-1")


def _expanded_size(value: Any) -> int:
    """Return the number of values, counting a container at each place where it is referenced.

    Raises:
        InputError: the data contains itself.
    """
    sizes: dict[int, int] = {}
    open_ids: set[int] = set()
    pending = [value]
    while pending:
        container = pending[-1]
        parts = [part for part in _parts(container) if isinstance(part, CONTAINERS)]
        if id(container) not in open_ids:
            open_ids.add(id(container))
            missing = [part for part in parts if id(part) not in sizes]
            if any(id(part) in open_ids for part in missing):
                raise InputError("contains itself: do not use it")
            pending += missing
            continue
        pending.pop()
        if id(container) not in sizes:
            direct = 1 + sum(1 for _ in _parts(container))
            total = direct + sum(sizes[id(part)] for part in parts)
            sizes[id(container)] = min(total, STEP_LIMIT + 1)
    return sizes[id(value)]


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, CONTAINERS) else ()
