"""Import from the current folder only the modules that the user names and their imports.

The current folder may hold checkpoints from somebody else, with a ``torch.py`` among them, or a
``pandas.py`` that answers where a library tries to import a package that is not installed. So the
current folder never stands on ``sys.path``, where it would serve every import, and where its
``*.dist-info`` folders would declare plugins (entry points) to torch, fsspec and this package.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from importlib.util import find_spec
from multiprocessing.reduction import ForkingPickler
from operator import attrgetter
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

__all__ = [
    "children_without_current_folder",
    "import_user_module",
    "suggest_import_path",
    "user_code_for_children",
]

_SAFE_PATH = "PYTHONSAFEPATH"  # https://docs.python.org/3/using/cmdline.html#envvar-PYTHONSAFEPATH
_MACHINERY = frozenset({"importlib", "_frozen_importlib", "_frozen_importlib_external"})


class _UserCodeFinder(MetaPathFinder):
    """Finds top-level modules of the user's code in the folder of the module that imports them.

    ``folders`` has the folder of every top-level module that the user named or that such a module
    imported. Python asks this finder last, so that the standard library and installed packages come
    before a file of the same name.
    """

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a top-level module that the user's code imports; None for every other.

        Submodules have a ``path``, that of their package, by which Python finds them without this
        finder.
        """
        folder = self.folders.get(fullname) or self.folders.get(_importing_package())
        if path is not None or folder is None:
            return None
        spec = _files(folder).find_spec(fullname, target)
        if spec is not None:
            self.folders[fullname] = folder
        return spec


_finder = _UserCodeFinder()


def import_user_module(name: str) -> ModuleType:
    """Import a module that the user has named, from what is installed or from the current folder.

    Modules beside it are found when it imports them, also later. Raises ImportError where the
    current folder and the installation both have a module of this name, as either may be meant, and
    whatever the module raises.
    """
    top = name.partition(".")[0]
    here, previous = _current_folder(), _finder.folders.pop(top, None)
    # Where the folder is on sys.path, by PYTHONPATH for instance, the user has chosen the order.
    if (
        here is not None
        and here not in sys.path
        and "" not in sys.path
        and (_is_only_in(here, top) or here == previous)
    ):
        _serve({top: here})
    return importlib.import_module(name)


def suggest_import_path(spec: str) -> str:
    """Return a sentence that says how to name what ``folder/script.py:Name`` means.

    Python imports modules by name and not by file: ``script:Name`` from the folder of the script.
    """
    file, _, name = spec.partition(":")
    name = name or "NAME"
    path = Path(os.path.relpath(Path(file).expanduser()))
    folder, stem = path.parent, path.stem
    if not stem.isidentifier():
        new_stem = re.sub(r"\W", "_", stem)
        return (
            f"Python cannot import a file of the name {path.name}: rename it to {new_stem}.py, and write "
            f"{new_stem}:{name}."
        )
    advice = f"Name the module and not its file: {stem}:{name}"
    if folder == Path():
        return f"{advice}."
    if all(part.isidentifier() for part in folder.parts):
        dotted = ".".join((*folder.parts, stem))
        return f"{advice} from the folder {folder}, or {dotted}:{name} from here."
    return f"{advice} from the folder {folder}, or with PYTHONPATH={folder}."


@contextmanager
def user_code_for_children() -> Iterator[None]:
    """Let workers that multiprocessing spawns import the user's code as this process does.

    A spawned worker imports the classes and functions that it is sent. Those of the user's code are
    sent with the folders that they are found in. Forked workers need nothing of this.
    """
    # multiprocessing sends everything through this class and has no setting for it.
    pickler: Any = ForkingPickler
    before = vars(ForkingPickler).get("reducer_override")
    pickler.reducer_override = _reduce_user_code
    try:
        yield
    finally:
        if before is None:
            del pickler.reducer_override
        else:
            pickler.reducer_override = before


@contextmanager
def children_without_current_folder() -> Iterator[None]:
    """Keep the current folder off the path of Python processes that the block starts.

    multiprocessing starts its workers by ``python -c``, which puts the current folder before the
    standard library.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = before or "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_SAFE_PATH, None)
        else:
            os.environ[_SAFE_PATH] = before


def _reduce_user_code(pickler: ForkingPickler, value: object) -> Any:
    """Pickle the user's classes and functions with their folders; NotImplemented for all else."""
    module = getattr(value, "__module__", None)
    if not isinstance(value, type | FunctionType) or not isinstance(module, str):
        return NotImplemented
    if module.partition(".")[0] not in _finder.folders or "<" in value.__qualname__:
        return NotImplemented
    return _import_user_code, ({**_finder.folders}, module, value.__qualname__)


def _import_user_code(folders: Mapping[str, str], module: str, name: str) -> object:
    _serve(folders)
    return attrgetter(name)(importlib.import_module(module))


def _serve(folders: Mapping[str, str]) -> None:
    if _finder not in sys.meta_path:
        sys.meta_path.append(_finder)
    _finder.folders.update(folders)


def _importing_package() -> str:
    """Return the top-level name of the module that imports, by statement or by importlib."""
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        package = module.partition(".")[0]
        if module != __name__ and package not in _MACHINERY:
            return package
        frame = frame.f_back
    return ""


def _current_folder() -> str | None:
    try:
        return str(Path.cwd())
    except OSError:  # it was removed
        return None


def _is_only_in(folder: str, top: str) -> bool:
    """Return whether the folder has a module of this name and the installation has none.

    Raises ImportError where both have one. A folder without ``__init__.py`` is no module in this
    sense: it has no origin, and Python prefers a module to it wherever that stands.
    """
    local, installed = _files(folder).find_spec(top), _installed_spec(top)
    if local is None or installed is None:
        return local is not None
    if top == __package__:  # a checkout of ours: what runs is what is meant
        return False
    if local.origin is None or installed.origin is None:
        return False
    if Path(installed.origin).exists() and Path(installed.origin).samefile(local.origin):
        return False
    raise ImportError(
        f"expected one module named {top}, found two: {local.origin} in the current folder and "
        f"{installed.origin}. "
        "Rename or remove one of them; with PYTHONPATH=. the current folder's comes first",
        name=top,
    )


def _files(folder: str) -> FileFinder:
    """Return a finder of modules in one folder, as Python has for the folders on ``sys.path``."""
    return FileFinder(
        folder,
        (ExtensionFileLoader, EXTENSION_SUFFIXES),
        (SourceFileLoader, SOURCE_SUFFIXES),
        (SourcelessFileLoader, BYTECODE_SUFFIXES),
    )


def _installed_spec(top: str) -> ModuleSpec | None:
    try:
        return find_spec(top)
    except ValueError:  # a module that was made by hand has no spec
        return None
