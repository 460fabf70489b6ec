"""From names and persistent ids to values, for one file."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable

from ckpt_tools.storage.formats.pickles.known_names import GLOBAL_VALUES, SET_TYPES, evaluate_call
from ckpt_tools.storage.formats.pickles.numpy_arrays import NUMPY_ARRAY, ArrayConverter
from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_limits import Limits, MalformedFileError

__all__ = ["SafeResolver"]

_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)
_FROM_BUFFER = frozenset({"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"})
_MAKERS = ("__newobj__", "__newobj_ex__", "_reconstructor")
_COPYREG = frozenset(f"{module}.{name}" for module in ("copyreg", "copy_reg") for name in _MAKERS)
_FROM_BYTES = "torch.storage._load_from_bytes"


class SafeResolver:
    """Data for what is known to be data, an Opaque for the rest.

    ``storages`` gives the value behind a persistent id, ``inner`` reads a pickle inside this one. With ``arrays``
    numpy arrays become tensors, as in files that name weights without using torch; otherwise they stay Opaque.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        inner: Callable[[bytes], object],
        storages: Callable[[object], object] | None = None,
        arrays: bool = False,
    ) -> None:
        self._limits = limits
        self._inner = inner
        self._storages = storages
        self._arrays = ArrayConverter() if arrays else None
        self._blobs: dict[int, tuple[bytes, object]] = {}

    def resolve_global(self, name: str) -> object:
        """A dtype and the like; an Opaque for everything else."""
        return GLOBAL_VALUES[name] if name in GLOBAL_VALUES else OpaqueObject(name)

    def resolve_call(self, function: object, args: tuple[object, ...]) -> object:
        """What ``function(*args)`` means. Raises Fault."""
        self._limits.charge_copies(
            len(args) + sum(len(arg) for arg in args if isinstance(arg, _SIZED))
        )
        name = function.name if type(function) is OpaqueObject and function.args is None else ""
        if name in _COPYREG:
            return self._copyreg(name, args)
        if name in SET_TYPES:
            self._limits.check_keys(args[0] if args and isinstance(args[0], list | tuple) else ())
        if name == _FROM_BYTES:
            return self._blob(*args)
        if name in _FROM_BUFFER:
            return (
                self._arrays.from_buffer(*args) if self._arrays else OpaqueObject(NUMPY_ARRAY, args)
            )
        return evaluate_call(function, args)

    def _copyreg(self, name: str, args: tuple[object, ...]) -> object:
        """The calls by which protocols 0 and 1, and some classes in all protocols, make an object of a class."""
        kind, *rest = args or (None,)
        if name.endswith("__newobj__"):
            return self.resolve_call(kind, tuple(rest))
        if name.endswith("__newobj_ex__"):
            return self.resolve_call(kind, rest[0] if rest and isinstance(rest[0], tuple) else ())
        made = self.resolve_call(kind, ())
        value = rest[1] if len(rest) > 1 else None  # of the plain type that the class extends
        if type(made) is OpaqueObject and isinstance(value, dict | list):
            made.items = value
        elif type(made) is OpaqueObject and value is not None:
            made.args = (value,)
        return made

    def apply_state(self, value: object, state: object) -> object:
        """The value with its state."""
        if type(value) is OpaqueObject:
            if self._arrays and value.name == NUMPY_ARRAY and value.args is not None:
                return self._arrays.from_state(value, state)
            value.state = self._merge_states(value.state, state)
        elif isinstance(value, argparse.Namespace | types.SimpleNamespace) and isinstance(
            state, dict
        ):
            self._limits.charge_copies(len(state))
            vars(value).update((key, inner) for key, inner in state.items() if isinstance(key, str))
        return value

    def resolve_persistent_id(self, pid: object) -> object:
        """A storage of the file; an Opaque in a pickle that has none."""
        return (
            self._storages(pid) if self._storages else OpaqueObject("pickle.persistent_id", (pid,))
        )

    def _merge_states(self, old: object, new: object) -> object:
        # (dict, dict of slots) is how objects with both are pickled.
        if (
            isinstance(new, tuple)
            and len(new) == 2
            and isinstance(new[1], dict)
            and isinstance(new[0], dict | None)
        ):
            new = {**(new[0] or {}), **new[1]}
            self._limits.charge_copies(len(new))
        if isinstance(old, dict) and isinstance(new, dict):
            self._limits.charge_copies(len(old) + len(new))
            return {**old, **new}
        return new

    def _blob(self, blob: object = b"", *_: object) -> object:
        """The value of a pickle inside this one. The same bytes give the same value, or a few could fill the memory."""
        if not isinstance(blob, bytes):
            raise MalformedFileError("a pickle inside the pickle that is no bytes")
        if id(blob) not in self._blobs:
            self._blobs[id(blob)] = (blob, self._inner(blob))
        return self._blobs[id(blob)][1]
