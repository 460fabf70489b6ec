"""The pickle machine: a stack, a memo, and one function an instruction. It knows data, no names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_limits import (
    Limits,
    MalformedFileError,
    limit_exceeded_error,
)

__all__ = ["Buffer", "PickleMachine", "ValueResolver"]

_LONGEST_NAME = 2000  # characters; a class nested in a function in a package stays far below


class Buffer(Protocol):
    """Bytes, or a memory-mapped file."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    def find(self, sub: bytes, start: int = ..., end: int = ..., /) -> int: ...  # noqa: D102


class ValueResolver(Protocol):
    """What names and persistent ids stand for; never the objects themselves."""

    def resolve_global(self, name: str) -> object:
        """The value of a global."""

    def resolve_call(self, function: object, args: tuple[object, ...]) -> object:
        """What calling a value would have given."""

    def apply_state(self, value: object, state: object) -> object:
        """The value once it has its state; mostly the same object."""

    def resolve_persistent_id(self, pid: object) -> object:
        """The value behind a persistent id."""


class PickleMachine:
    """Reads one pickle from ``data`` at ``position``; afterwards ``position`` is where it ended."""

    def __init__(
        self, data: Buffer, meaning: ValueResolver, limits: Limits, position: int = 0
    ) -> None:
        self.data = data
        self.meaning = meaning
        self.limits = limits
        self.position = position
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self, instructions: Mapping[int, Callable[[PickleMachine], None]], stop: int) -> object:
        """Follow the instructions up to ``stop``. Raises Fault."""
        data, end, limits = self.data, len(self.data), self.limits
        for done in range(limits.instructions):
            if self.position >= end:
                raise MalformedFileError("a pickle that ends too early")
            code = data[self.position]
            self.position += 1
            if code == stop:
                limits.instructions -= done
                return self.pop()
            instruction = instructions.get(code)
            if instruction is None:
                raise MalformedFileError(
                    f"byte {code:#04x} at {self.position - 1:,}, which is no instruction of a pickle"
                )
            instruction(self)
        raise limit_exceeded_error()

    def take_bytes(self, count: int) -> bytes:
        """The next bytes. Raises Fault if there are fewer, before anything is allocated."""
        start, stop = self.position, self.position + count
        if count < 0 or stop > len(self.data):
            raise MalformedFileError(
                f"a pickle that ends too early: {count:,} bytes are announced, {len(self.data) - start:,} left"
            )
        self.position = stop
        return self.data[start:stop]  # type: ignore[no-any-return]

    def take_byte(self) -> int:
        """The next byte as a number; most arguments are one byte."""
        if self.position >= len(self.data):
            raise MalformedFileError("a pickle that ends too early")
        self.position += 1
        return self.data[self.position - 1]  # type: ignore[no-any-return]

    def take_integer(self, count: int, *, signed: bool = False) -> int:
        """The next bytes as a little-endian integer."""
        return int.from_bytes(self.take_bytes(count), "little", signed=signed)

    def take_line(self) -> bytes:
        """The bytes up to the next line feed, which is skipped."""
        found = self.data.find(b"\n", self.position)
        if found < 0:
            raise MalformedFileError("a pickle that ends too early")
        line = self.take_bytes(found - self.position)
        self.position += 1
        return line

    def pop(self) -> Any:
        """The top of the stack, taken off. Raises Fault if there is none above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise MalformedFileError("a pickle that takes more values than it gave")
        return self.stack.pop()

    def top(self) -> Any:
        """The top of the stack, left there."""
        if not self.stack:
            raise MalformedFileError("a pickle that takes more values than it gave")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        """Everything above the last mark, taken off together with the mark."""
        if not self.marks:
            raise MalformedFileError("a pickle that takes more values than it gave")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def store_in_memo(self, index: int) -> None:
        """Put the top of the stack into the memo."""
        value = self.top()
        self.memo[index] = value
        if type(value) is OpaqueObject:
            value.slots.append(index)

    def push_from_memo(self, index: int) -> None:
        """Push what the memo holds."""
        try:
            self.stack.append(self.memo[index])
        except KeyError:
            raise MalformedFileError(
                f"a pickle that refers to value {index}, which it never gave"
            ) from None

    def replace_top(self, value: Any) -> Any:
        """Put a value where an Opaque stood, on the stack and in the memo, and return it."""
        old = self.top()
        self.stack[-1] = value
        if type(old) is OpaqueObject and value is not old:
            for index in old.slots:
                if self.memo.get(index) is old:
                    self.memo[index] = value
            old.slots.clear()
        return value

    def push_global(self, module: object, name: object) -> None:
        """Push the meaning of a global."""
        if (
            type(module) is not str
            or type(name) is not str
            or len(module) + len(name) > _LONGEST_NAME
        ):
            raise MalformedFileError("a pickle that names a global by something other than a name")
        self.stack.append(self.meaning.resolve_global(f"{module}.{name}"))

    def push_call_result(self, function: object, args: object) -> None:
        """Push what the meaning says about a call."""
        if type(args) is not tuple:
            raise MalformedFileError("a pickle that calls something without a tuple of arguments")
        self.stack.append(self.meaning.resolve_call(function, args))
