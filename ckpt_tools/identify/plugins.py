"""Find adapters by their entry points, and the adapter that an architecture's name means."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from ckpt_tools.contract import Adapter
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.import_path import import_user_module, suggest_import_path

GROUP = "ckpt_tools.adapters"
_FACTORY = "factory"
_FIRST = ("timm", "torchvision")  # the order in which ambiguous words of a checkpoint are read


def prefixes() -> tuple[str, ...]:
    """Return the words that may stand before the colon, without loading any adapter."""
    names = {point.name for point in entry_points(group=GROUP)}
    return tuple(name for name in _FIRST if name in names) + tuple(sorted(names - {*_FIRST}))


@functools.cache
def adapter(prefix: str) -> Adapter:
    """Load one adapter.

    ``prefix`` is the name of an entry point, or ``module:Class`` for an adapter that is not
    registered. Raises ArchitectureError.
    """
    registered = next(iter(entry_points(group=GROUP, name=prefix)), None)
    # An adapter that is not registered is named as in an entry point: module:Class.
    point = registered or EntryPoint(prefix, prefix, GROUP)
    try:
        if registered is None:
            import_user_module(prefix.partition(":")[0])
        loaded = point.load()()
    except Exception as error:
        raise ArchitectureError(
            f"adapter {prefix} ({point.value}{_origin(point)}) could not be loaded: "
            f"{type(error).__name__}: {error}. Repair or uninstall it."
        ) from error
    if not isinstance(loaded, Adapter):
        raise ArchitectureError(
            f"adapter {prefix} ({point.value}{_origin(point)}): expected the methods of "
            f"ckpt_tools.contract.Adapter, found {type(loaded).__name__}, "
            f"which lacks {', '.join(_missing_methods(loaded))}."
        )
    return loaded


def adapters() -> dict[str, Adapter]:
    """Return every adapter that can be loaded, by prefix.

    For a broken one ``adapter`` says what is wrong.
    """
    loaded = {}
    for prefix in prefixes():
        try:
            loaded[prefix] = adapter(prefix)
        except ArchitectureError:
            continue
    return loaded


def resolve(architecture: str) -> tuple[Adapter, str]:
    """Return the adapter that an architecture means, and the name that it builds.

    An architecture is ``timm:resnet50``, ``package.module:factory`` or a bare name.

    ``module:Class:name`` uses an adapter that is not registered. Raises ArchitectureError.
    """
    prefix, colon, name = architecture.partition(":")
    if not colon:
        return _only_owner(architecture)
    if prefix in prefixes():
        return adapter(prefix), name
    if name.count(":"):
        class_name, _, name = name.partition(":")
        return adapter(f"{prefix}:{class_name}"), name
    close = difflib.get_close_matches(prefix, prefixes(), n=1)
    if close and not _importable(prefix):
        raise ArchitectureError(
            f"{architecture}: no adapter is called {prefix!r}, and no such module can be imported. "
            f"Did you mean {close[0]}:{name}?"
        )
    return adapter(_FACTORY), architecture


def _only_owner(name: str) -> tuple[Adapter, str]:
    names_by_prefix = {prefix: loaded.architectures() for prefix, loaded in adapters().items()}
    owners = [prefix for prefix, names in names_by_prefix.items() if name in names]
    if len(owners) == 1:
        return adapter(owners[0]), name
    if owners:
        spellings = " or ".join(f"{prefix}:{name}" for prefix in owners)
        raise ArchitectureError(f"{name}: {' and '.join(owners)} both have it. Write {spellings}.")
    if name.endswith(".py"):
        raise ArchitectureError(f"{name}: a file of Python code. {suggest_import_path(name)}")
    everything = (f"{prefix}:{candidate}" for prefix, names in names_by_prefix.items() for candidate in names)
    raise ArchitectureError(
        f"{name}: no adapter has an architecture of this name.{_suggestion(name, everything)} "
        "Write timm:NAME, torchvision:NAME or package.module:factory."
    )


def _suggestion(name: str, spellings: Iterable[str]) -> str:
    by_name: dict[str, list[str]] = {}
    for spelling in spellings:
        by_name.setdefault(spelling.partition(":")[2], []).append(spelling)
    close = [s for match in difflib.get_close_matches(name, by_name, n=2) for s in by_name[match]]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _importable(module: str) -> bool:
    """Look for the top-level package, also in the current folder, without importing it."""
    top = module.partition(".")[0]
    if not top.isidentifier():
        return False
    if top in sys.modules or Path(f"{top}.py").is_file() or Path(top).is_dir():
        return True
    return importlib.util.find_spec(top) is not None


def _origin(point: EntryPoint) -> str:
    return f", from {point.dist.name}" if point.dist else ""


def _missing_methods(loaded: object) -> list[str]:
    wanted = [*Adapter.__annotations__, *(name for name, value in vars(Adapter).items() if callable(value))]
    return [name for name in wanted if not name.startswith("_") and not hasattr(loaded, name)]
