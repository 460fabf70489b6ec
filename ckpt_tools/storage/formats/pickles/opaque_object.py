"""The stand-in for everything in a pickle that is not plain data."""

from __future__ import annotations

__all__ = ["OpaqueObject"]


class OpaqueObject:
    """A global that a pickle names, or an object that the pickle makes by calling one.

    It can do nothing. ``name`` is ``package.module.Class``. ``args`` are the arguments of the call,
    None for the global itself. ``state`` is the argument of ``__setstate__``: attributes as one
    dict where that is clear, as it stands otherwise. ``items`` are the arguments of ``append`` (a
    list) or of ``__setitem__`` (a dict).
    """

    __slots__ = ("args", "items", "memo_indices", "name", "state")

    def __init__(self, name: str, args: tuple[object, ...] | None = None) -> None:
        self.name = name
        self.args = args
        self.state: object = None
        self.items: list[object] | dict[object, object] = []
        # Where the machine's memo holds the object, so that something else can take its place
        # there.
        self.memo_indices: list[int] = []

    def __repr__(self) -> str:
        return f"<{self.name}>"
