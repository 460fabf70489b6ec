"""The pickle machine: a stack, a memo, and one function an instruction. It knows data, no names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ckpt_tools.storage.formats.pickles.faults import Fault, Limits, endless
from ckpt_tools.storage.formats.pickles.opaque import Opaque

__all__ = ["Buffer", "Machine", "Meaning"]

_LONGEST_NAME = 2000  # characters; a class nested in a function in a package stays far below


class Buffer(Protocol):
    """Bytes, or a memory-mapped file."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    def find(self, sub: bytes, start: int = ..., end: int = ..., /) -> int: ...  # noqa: D102


class Meaning(Protocol):
    """What names and persistent ids stand for; never the objects themselves."""

    def name(self, name: str) -> object:
        """The value of a global."""

    def call(self, function: object, args: tuple[object, ...]) -> object:
        """What calling a value would have given."""

    def build(self, value: object, state: object) -> object:
        """The value once it has its state; mostly the same object."""

    def persistent(self, pid: object) -> object:
        """The value behind a persistent id."""


class Machine:
    """Reads one pickle from ``data`` at ``position``; afterwards ``position`` is where it ended."""

    def __init__(self, data: Buffer, meaning: Meaning, limits: Limits, position: int = 0) -> None:
        self.data = data
        self.meaning = meaning
        self.limits = limits
        self.position = position
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self, instructions: Mapping[int, Callable[[Machine], None]], stop: int) -> object:
        """Follow the instructions up to ``stop``. Raises Fault."""
        data, end, limits = self.data, len(self.data), self.limits
        for done in range(limits.instructions):
            if self.position >= end:
                raise Fault("a pickle that ends too early")
            code = data[self.position]
            self.position += 1
            if code == stop:
                limits.instructions -= done
                return self.pop()
            instruction = instructions.get(code)
            if instruction is None:
                raise Fault(f"byte {code:#04x} at {self.position - 1:,}, which is no instruction of a pickle")
            instruction(self)
        raise endless()

    def take(self, count: int) -> bytes:
        """The next bytes. Raises Fault if there are fewer, before anything is allocated."""
        start, stop = self.position, self.position + count
        if count < 0 or stop > len(self.data):
            raise Fault(f"a pickle that ends too early: {count:,} bytes are announced, {len(self.data) - start:,} left")
        self.position = stop
        return self.data[start:stop]  # type: ignore[no-any-return]

    def byte(self) -> int:
        """The next byte as a number; most arguments are one byte."""
        if self.position >= len(self.data):
            raise Fault("a pickle that ends too early")
        self.position += 1
        return self.data[self.position - 1]  # type: ignore[no-any-return]

    def number(self, count: int, *, signed: bool = False) -> int:
        """The next bytes as a little-endian integer."""
        return int.from_bytes(self.take(count), "little", signed=signed)

    def line(self) -> bytes:
        """The bytes up to the next line feed, which is skipped."""
        found = self.data.find(b"\n", self.position)
        if found < 0:
            raise Fault("a pickle that ends too early")
        line = self.take(found - self.position)
        self.position += 1
        return line

    def pop(self) -> Any:
        """The top of the stack, taken off. Raises Fault if there is none above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Fault("a pickle that takes more values than it gave")
        return self.stack.pop()

    def top(self) -> Any:
        """The top of the stack, left there."""
        if not self.stack:
            raise Fault("a pickle that takes more values than it gave")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        """Everything above the last mark, taken off together with the mark."""
        if not self.marks:
            raise Fault("a pickle that takes more values than it gave")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def remember(self, index: int) -> None:
        """Put the top of the stack into the memo."""
        value = self.top()
        self.memo[index] = value
        if type(value) is Opaque:
            value.slots.append(index)

    def recall(self, index: int) -> None:
        """Push what the memo holds."""
        try:
            self.stack.append(self.memo[index])
        except KeyError:
            raise Fault(f"a pickle that refers to value {index}, which it never gave") from None

    def replace_top(self, value: Any) -> Any:
        """Put a value where an Opaque stood, on the stack and in the memo, and return it."""
        old = self.top()
        self.stack[-1] = value
        if type(old) is Opaque and value is not old:
            for index in old.slots:
                if self.memo.get(index) is old:
                    self.memo[index] = value
            old.slots.clear()
        return value

    def push_name(self, module: object, name: object) -> None:
        """Push the meaning of a global."""
        if type(module) is not str or type(name) is not str or len(module) + len(name) > _LONGEST_NAME:
            raise Fault("a pickle that names a global by something other than a name")
        self.stack.append(self.meaning.name(f"{module}.{name}"))

    def call(self, function: object, args: object) -> None:
        """Push what the meaning says about a call."""
        if type(args) is not tuple:
            raise Fault("a pickle that calls something without a tuple of arguments")
        self.stack.append(self.meaning.call(function, args))
