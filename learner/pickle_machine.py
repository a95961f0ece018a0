"""A pickle machine that can neither import, call nor set anything that its caller did not hand in.

Python's own unpickler calls whatever a file names, and allocates whatever a file announces. This one is a
loop over the few opcodes that plain data needs. Bytes are views of the file's own, texts are short, and the
number of operations is limited, so that its memory is bounded by the file's size.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MAX_OPERATIONS = 500_000  # a published checkpoint takes about 20,000
_MAX_TEXT = 4_096  # bytes of one string; the longest names have about 70
_PROTOCOLS = (3, 4, 5)  # older ones hold bytes as calls


class Refused(ValueError):
    """What a file asks for and does not get, or how it is damaged, as part of a sentence."""


Make = Callable[[tuple[Any, ...]], Any]


@dataclass(frozen=True)
class Admitted:
    """What a name in a file stands for; where it may stand in a call, and in front of fields."""

    name: str
    call: Make | None = None
    new: Make | None = None


class Buildable(ABC):
    """A value that a file first names and then describes.

    A base class: asked whether a value fits a protocol, Python 3.12 and newer look at their caller's frame.
    """

    @abstractmethod
    def build(self, state: Any) -> None:
        """Takes the description, once."""


Names = Mapping[tuple[str, str], Admitted]  # (module, name) -> what it stands for


def load(data: bytes, names: Names) -> Any:
    """The object that a pickle describes: None, numbers, strings, memoryviews of bytes, tuples, lists, dicts
    with string keys, and what `names` make of them.

    Raises Refused for anything else, and for a damaged file.
    """
    return _Machine(data, names).run()


def kind_of(value: Any) -> str:
    """A word for the type of a loaded value. Never its text: that could be endless."""
    return type(value).__name__.lstrip("_").lower()


class _Machine:
    def __init__(self, data: bytes, names: Names):
        self._data, self._at, self._names = memoryview(data), 0, names
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MAX_OPERATIONS):
            opcode = bytes(self.take(1))
            if opcode == pickle.STOP:
                return self._result()
            operation = _OPERATIONS.get(opcode)
            if operation is None:
                raise Refused(f"it uses the pickle operation {_describe(opcode)}, which arrays do not need")
            operation(self)
        raise Refused(f"it takes more than {_MAX_OPERATIONS:,} operations to read")

    def _result(self) -> Any:
        if self._at != len(self._data):
            raise Refused(f"{len(self._data) - self._at:,} bytes follow its end")
        if len(self._stack) != 1 or self._marks:
            raise Refused("it is damaged: values are left over at its end")
        return self._stack[0]

    # --- reading ----------------------------------------------------------------------------------

    def take(self, size: int) -> memoryview:
        """The next bytes of the file, without a copy."""
        left = len(self._data) - self._at
        if size > left:
            raise Refused(f"it is cut short: it announces {size:,} bytes where {left:,} are left")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack(kind, self.take(struct.calcsize(kind)))
        return value

    def counted(self, kind: str) -> memoryview:
        return self.take(self.number(kind))

    def text(self, kind: str) -> str:
        raw = self.counted(kind)
        if len(raw) > _MAX_TEXT:
            raise Refused(f"it holds a text of {len(raw):,} bytes")
        try:
            return bytes(raw).decode()
        except UnicodeDecodeError:
            raise Refused("it holds a text that is not UTF-8") from None

    def line(self) -> str:
        """An ASCII word up to the end of its line."""
        raw = bytes(self._data[self._at : self._at + _MAX_TEXT])
        word, newline, _ = raw.partition(b"\n")
        if not newline or not word.isascii():
            raise Refused("it is damaged: a name has no end")
        self._at += len(word) + 1
        return word.decode()

    # --- stack and memo ---------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Refused("it is damaged: it takes a value where there is none")
        return self._stack.pop()

    def pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise Refused("it is damaged: it takes values where there are none")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def remember(self, index: int | None = None) -> None:
        value = self.pop()
        self.push(value)
        self._memo[len(self._memo) if index is None else index] = value

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise Refused("it is damaged: it refers to a value that it does not hold")
        self.push(self._memo[index])

    def top(self, kind: type) -> Any:
        value = self.pop()
        self.push(value)
        if type(value) is not kind:
            raise Refused(f"it is damaged: it fills a {kind.__name__} that is none")
        return value

    # --- operations -------------------------------------------------------------------------------

    def protocol(self) -> None:
        number = self.number("B")
        if number not in _PROTOCOLS:
            raise Refused(f"it is a pickle of protocol {number}; published ones have 4")

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top(dict)
        if len(values) % 2:
            raise Refused("it is damaged: a key has no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str:
                raise Refused(f"it has a {kind_of(key)} as a key, where names are strings")
            if key in target:
                raise Refused(f"it has the key {key[:80]!r} twice")
            target[key] = value

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused("it is damaged: a name is no string")
        if (module, name) not in self._names:
            wanted = f"{module}.{name}"[:200]
            raise Refused(f"it asks for {wanted!r}, which is not admitted (nothing was imported or run)")
        self.push(self._names[module, name])

    def make(self, *, new: bool) -> None:
        target, arguments = self.pop_many(2)
        make = (target.new if new else target.call) if type(target) is Admitted else None
        if make is None or type(arguments) is not tuple:
            name = target.name if type(target) is Admitted else kind_of(target)
            raise Refused(f"it calls {name!r}, which is not admitted (nothing was run)")
        self.push(make(arguments))

    def build(self) -> None:
        target, state = self.pop_many(2)
        if not isinstance(target, Buildable):
            raise Refused(f"it sets the state of a {kind_of(target)}, which is not admitted")
        target.build(state)
        self.push(target)


def _describe(opcode: bytes) -> str:
    names = {known.code: known.name for known in pickletools.opcodes}
    return names.get(opcode.decode("latin-1"), f"{opcode!r} (so it is no pickle)")


def _long(machine: _Machine, kind: str) -> None:
    raw = machine.counted(kind)
    if len(raw) > 8:
        raise Refused(f"it holds a whole number of {len(raw):,} bytes")
    machine.push(int.from_bytes(raw, "little", signed=True))


_OPERATIONS: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.PROTO: _Machine.protocol,
    pickle.FRAME: lambda m: m.number("<Q"),
    pickle.MARK: _Machine.mark,
    pickle.POP: _Machine.pop,
    pickle.POP_MARK: _Machine.pop_to_mark,
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: lambda m: _long(m, "<B"),
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.text("<B")),
    pickle.BINUNICODE: lambda m: m.push(m.text("<I")),
    pickle.BINUNICODE8: lambda m: m.push(m.text("<Q")),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.counted("<B")),
    pickle.BINBYTES: lambda m: m.push(m.counted("<I")),
    pickle.BINBYTES8: lambda m: m.push(m.counted("<Q")),
    pickle.BYTEARRAY8: lambda m: m.push(m.counted("<Q")),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE1: lambda m: m.push(m.pop_many(1)),
    pickle.TUPLE2: lambda m: m.push(m.pop_many(2)),
    pickle.TUPLE3: lambda m: m.push(m.pop_many(3)),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_to_mark())),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.APPEND: lambda m: m.append([m.pop()]),
    pickle.APPENDS: lambda m: m.append(m.pop_to_mark()),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.SETITEM: lambda m: m.set_items(list(m.pop_many(2))),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_to_mark()),
    pickle.MEMOIZE: _Machine.remember,
    pickle.BINPUT: lambda m: m.remember(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.remember(m.number("<I")),
    pickle.BINGET: lambda m: m.recall(m.number("<B")),
    pickle.LONG_BINGET: lambda m: m.recall(m.number("<I")),
    pickle.GLOBAL: lambda m: m.find(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.find(*m.pop_many(2)),
    pickle.REDUCE: lambda m: m.make(new=False),
    pickle.NEWOBJ: lambda m: m.make(new=True),
    pickle.BUILD: _Machine.build,
}
