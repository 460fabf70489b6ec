"""The stand-in for everything in a pickle that is not plain data."""

from __future__ import annotations

__all__ = ["OpaqueObject"]


class OpaqueObject:
    """A global that a pickle names, or an object it would have made by calling one. It can do nothing.

    ``name`` is ``package.module.Class``. ``args`` are the arguments of the call, None for the global itself. ``state``
    is what ``__setstate__`` would have got: attributes as one dict where that is clear, as it stands otherwise.
    ``items`` are what ``append`` and ``__setitem__`` would have got: a list, or a dict.
    """

    __slots__ = ("args", "items", "name", "slots", "state")

    def __init__(self, name: str, args: tuple[object, ...] | None = None) -> None:
        self.name = name
        self.args = args
        self.state: object = None
        self.items: list[object] | dict[object, object] = []
        self.slots: list[int] = []  # where the machine's memo holds it

    def __repr__(self) -> str:
        return f"<{self.name}>"
