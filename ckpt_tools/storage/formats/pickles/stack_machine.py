"""The pickle machine: a stack, a memo, and a loop that follows the instructions of a pickle.

It moves data. What a name or a call means is the business of a ``ValueResolver``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_limits import (
    LONGEST_NAME,
    Limits,
    MalformedFileError,
    limit_exceeded_error,
)

__all__ = ["TOO_FEW_VALUES", "Buffer", "Instruction", "PickleMachine", "ValueResolver"]

TOO_FEW_VALUES = "a pickle that takes more values than it gave"


class Buffer(Protocol):
    """Bytes, or a memory-mapped file."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    def find(self, sub: bytes, start: int = ..., end: int = ..., /) -> int: ...  # noqa: D102


class ValueResolver(Protocol):
    """Decides which values stand for the names, calls and persistent ids of a pickle.

    A resolver gives data in their place and never the objects that a pickle names, so that reading
    executes nothing.
    """

    def resolve_global(self, name: str) -> object:
        """Return what stands for the global ``package.module.name``."""

    def resolve_call(self, function: object, args: tuple[object, ...]) -> object:
        """Return what stands for the result of ``function(*args)``."""

    def apply_state(self, value: object, state: object) -> object:
        """Return the value with its state; mostly this is the same object."""

    def resolve_persistent_id(self, pid: object) -> object:
        """Return the value behind a persistent id, which is something kept outside the pickle."""


class PickleMachine:
    """Reads one pickle from ``data``, from ``position`` on, which moves to the pickle's end.

    ``marks`` are lengths that the stack had: values above the last mark are the items of a
    container to come. ``memo`` holds values that later instructions refer to by number.
    """

    def __init__(self, data: Buffer, resolver: ValueResolver, limits: Limits, position: int = 0) -> None:
        self.data = data
        self.resolver = resolver
        self.limits = limits
        self.position = position
        self.stack: list[Any] = []
        self.marks: list[int] = []
        # This is a dict and no list, because a hostile file could choose a huge number.
        self.memo: dict[int, object] = {}

    def run(self, instructions: Mapping[int, Instruction], stop: int) -> object:
        """Follow the instructions up to the opcode ``stop``, and return the value that they leave.

        ``instructions`` maps opcodes to functions. Raises MalformedFileError, also if the
        instructions that ``limits`` allows are used up.
        """
        # This loop runs millions of times for a large checkpoint, so that it uses local variables.
        data, end, limits = self.data, len(self.data), self.limits
        for executed in range(limits.instructions):
            if self.position >= end:
                raise MalformedFileError("a pickle that ends too early")
            code = data[self.position]
            self.position += 1
            if code == stop:
                limits.instructions -= executed
                return self.pop()
            instruction = instructions.get(code)
            if instruction is None:
                raise MalformedFileError(
                    f"byte {code:#04x} at {self.position - 1:,}, which is no instruction of a pickle"
                )
            instruction(self)
        raise limit_exceeded_error()

    def take_bytes(self, count: int) -> bytes:
        """Return the next ``count`` bytes.

        Raises MalformedFileError if there are fewer, before anything is allocated.
        """
        start, stop = self.position, self.position + count
        if count < 0 or stop > len(self.data):
            raise MalformedFileError(
                f"a pickle that ends too early: {count:,} bytes are announced, "
                f"{len(self.data) - start:,} left"
            )
        self.position = stop
        return self.data[start:stop]  # type: ignore[no-any-return]

    def take_byte(self) -> int:
        """Return the next byte as a number. Most arguments are one byte, so this must be fast."""
        if self.position >= len(self.data):
            raise MalformedFileError("a pickle that ends too early")
        self.position += 1
        return self.data[self.position - 1]  # type: ignore[no-any-return]

    def take_integer(self, count: int, *, signed: bool = False) -> int:
        """Return the next ``count`` bytes as a little-endian integer."""
        return int.from_bytes(self.take_bytes(count), "little", signed=signed)

    def take_line(self) -> bytes:
        """Return the bytes up to the next line feed, which is skipped."""
        line_feed = self.data.find(b"\n", self.position)
        if line_feed < 0:
            raise MalformedFileError("a pickle that ends too early")
        line = self.take_bytes(line_feed - self.position)
        self.position += 1
        return line

    def pop(self) -> Any:
        """Take the top off the stack and return it.

        Raises MalformedFileError if there is nothing above the last mark.
        """
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise MalformedFileError(TOO_FEW_VALUES)
        return self.stack.pop()

    def top(self) -> Any:
        """Return the top of the stack and leave it there."""
        if not self.stack:
            raise MalformedFileError(TOO_FEW_VALUES)
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        """Take everything above the last mark off, together with the mark, and return it."""
        if not self.marks:
            raise MalformedFileError(TOO_FEW_VALUES)
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def store_in_memo(self, index: int) -> None:
        """Put the top of the stack into the memo, under a number."""
        value = self.top()
        self.memo[index] = value
        if type(value) is OpaqueObject:
            value.memo_indices.append(index)

    def push_from_memo(self, index: int) -> None:
        """Push what the memo holds under a number. Raises MalformedFileError if that is nothing."""
        try:
            self.stack.append(self.memo[index])
        except KeyError:
            raise MalformedFileError(f"a pickle that refers to value {index}, which it never gave") from None

    def replace_top(self, value: Any) -> Any:
        """Replace the top of the stack, and return the new value.

        Where the old value was an OpaqueObject, the memo refers to the new one from now on, too. It
        may hold the object before its state or its items turn it into something else.
        """
        old = self.top()
        self.stack[-1] = value
        # Only of OpaqueObjects it is noted where the memo holds them: nothing else is replaced.
        if type(old) is OpaqueObject and value is not old:
            for index in old.memo_indices:
                if self.memo.get(index) is old:
                    self.memo[index] = value
            old.memo_indices.clear()
        return value

    def push_global(self, module: object, name: object) -> None:
        """Push what stands for a global. Raises MalformedFileError for what is no name."""
        if type(module) is not str or type(name) is not str or len(module) + len(name) > LONGEST_NAME:
            raise MalformedFileError("a pickle that names a global by something other than a name")
        self.stack.append(self.resolver.resolve_global(f"{module}.{name}"))

    def push_call_result(self, function: object, args: object) -> None:
        """Push what stands for the result of a call. Raises MalformedFileError."""
        if type(args) is not tuple:
            raise MalformedFileError("a pickle that calls something without a tuple of arguments")
        self.stack.append(self.resolver.resolve_call(function, args))


Instruction = Callable[[PickleMachine], None]
