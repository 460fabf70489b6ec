"""The resolver for files from anywhere: data for a few names, inert objects for all others."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable

from ckpt_tools.storage.formats.pickles.known_names import GLOBAL_VALUES, SET_TYPES, evaluate_call
from ckpt_tools.storage.formats.pickles.numpy_arrays import NUMPY_ARRAY, ArrayConverter
from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_limits import Limits, MalformedFileError

__all__ = ["SafeResolver"]

_NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)
# numpy 1 and 2 keep the same function in `core` and `_core`.
_FROM_BUFFER = frozenset({"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"})
# copyreg is named copy_reg in pickles of Python 2.
_COPYREG = frozenset(
    f"{module}.{name}"
    for module in ("copyreg", "copy_reg")
    for name in ("__newobj__", "__newobj_ex__", "_reconstructor")
)
# Outside torch.save files a storage is pickled as the bytes of a torch.save file.
_FROM_BYTES = "torch.storage._load_from_bytes"


class SafeResolver:
    """Gives data for names that are known to mean data, and an OpaqueObject for all others.

    ``storages`` returns the value behind a persistent id, and ``inner`` reads a pickle inside this
    one. With ``arrays`` numpy arrays become tensors, as they are the weights in files without any
    tensor of torch; otherwise they stay OpaqueObjects. One resolver serves one file.
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
        self._nested_values: dict[int, tuple[bytes, object]] = {}

    def resolve_global(self, name: str) -> object:
        """Return a dtype and the like; an OpaqueObject for everything else."""
        return GLOBAL_VALUES[name] if name in GLOBAL_VALUES else OpaqueObject(name)

    def resolve_call(self, function: object, args: tuple[object, ...]) -> object:
        """Return what stands for ``function(*args)``. Raises MalformedFileError.

        The arguments count as copied, because a call can copy them: a list of a list, a text of
        bytes.
        """
        items = sum(len(arg) for arg in args if isinstance(arg, _SIZED))
        self._limits.charge_copies(len(args) + items)
        name = function.name if type(function) is OpaqueObject and function.args is None else ""
        if name in _COPYREG:
            return self._rebuild_object(name, args)
        if name in SET_TYPES:
            self._limits.check_keys(args[0] if args and isinstance(args[0], list | tuple) else ())
        if name == _FROM_BYTES:
            return self._read_nested_pickle(*args)
        if name in _FROM_BUFFER and self._arrays:
            return self._arrays.from_buffer(*args)
        if name in _FROM_BUFFER:
            return OpaqueObject(NUMPY_ARRAY, args)
        return evaluate_call(function, args)

    def _rebuild_object(self, name: str, args: tuple[object, ...]) -> object:
        """Return what stands for an object that a function of ``copyreg`` makes.

        Protocols 0 and 1, and some classes in all protocols, make their objects that way.
        """
        kind, *parameters = args or (None,)
        if name.endswith("__newobj__"):
            return self.resolve_call(kind, tuple(parameters))
        if name.endswith("__newobj_ex__"):
            args = parameters[0] if parameters and isinstance(parameters[0], tuple) else ()
            return self.resolve_call(kind, args)
        instance = self.resolve_call(kind, ())
        # _reconstructor(class, base, value): the value of the plain type that the class extends.
        value = parameters[1] if len(parameters) > 1 else None
        if type(instance) is OpaqueObject and isinstance(value, dict | list):
            instance.items = value
        elif type(instance) is OpaqueObject and value is not None:
            instance.args = (value,)
        return instance

    def apply_state(self, value: object, state: object) -> object:
        """Return the value with its state: attributes of an object, or the bytes of an array."""
        if type(value) is OpaqueObject:
            if self._arrays and value.name == NUMPY_ARRAY and value.args is not None:
                return self._arrays.from_state(value, state)
            value.state = self._merge_states(value.state, state)
        elif isinstance(value, _NAMESPACES) and isinstance(state, dict):
            self._limits.charge_copies(len(state))
            vars(value).update((key, inner) for key, inner in state.items() if isinstance(key, str))
        return value

    def resolve_persistent_id(self, pid: object) -> object:
        """Return a storage of the file; an OpaqueObject in a pickle that has no storages."""
        if self._storages is None:
            return OpaqueObject("pickle.persistent_id", (pid,))
        return self._storages(pid)

    def _merge_states(self, old: object, new: object) -> object:
        # Objects with attributes and slots have the state (dict of attributes, dict of slots).
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

    def _read_nested_pickle(self, raw: object = b"", *_: object) -> object:
        """Return the value of a pickle inside this one, the same object for the same bytes.

        Otherwise a pickle that refers to one nested pickle over and over again could fill the
        memory.
        """
        if not isinstance(raw, bytes):
            raise MalformedFileError("a pickle inside the pickle that is no bytes")
        if id(raw) not in self._nested_values:
            # The bytes are kept, too: their identity must not be given to others.
            self._nested_values[id(raw)] = (raw, self._inner(raw))
        return self._nested_values[id(raw)][1]
