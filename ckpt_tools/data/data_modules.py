"""Lightning DataModules, known by their methods: Lightning itself need not be installed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ckpt_tools.contract import Split
from ckpt_tools.errors import DataError

__all__ = ["is_data_module", "open_data_module"]

# Labelled data is that for validation, else for tests.
_LOADERS = {"train": ("train_dataloader",), "test": ("val_dataloader", "test_dataloader")}
_STAGES = {"train_dataloader": "fit", "val_dataloader": "validate", "test_dataloader": "test"}
_LIGHTNING = ("lightning", "pytorch_lightning")


def is_data_module(candidate: object) -> bool:
    """Whether an object, or its class, makes its DataLoaders as a Lightning DataModule does."""
    return callable(getattr(candidate, "train_dataloader", None))


def open_data_module(data_module: Any, split: Split) -> object:
    """Return the DataLoader for a split, prepared as Lightning's Trainer would.

    That is ``prepare_data()``, ``setup(stage)``, and then ``train_dataloader()`` or, for labelled
    data, ``val_dataloader()`` or ``test_dataloader()``. Raises DataError where there is no loader, or
    more than one, and whatever the methods raise.
    """
    method = next((name for name in _LOADERS[split] if _is_own(data_module, name)), None)
    if method is None:
        raise DataError(
            f"{type(data_module).__name__}: expected a method {' or '.join(_LOADERS[split])}, found none. "
            "Define it, or name a function that returns the DataLoader."
        )
    if hasattr(data_module, "prepare_data"):
        data_module.prepare_data()
    if hasattr(data_module, "setup"):
        _set_up(data_module.setup, _STAGES[method])
    return _single_loader(getattr(data_module, method)(), f"{type(data_module).__name__}.{method}()")


def _is_own(data_module: object, name: str) -> bool:
    """Whether a method is the user's. Lightning's base class has all of them, and they raise."""
    method = getattr(data_module, name, None)
    return callable(method) and getattr(method, "__module__", "").partition(".")[0] not in _LIGHTNING


def _set_up(setup: Any, stage: str) -> None:
    # Lightning passes the stage; modules written without it define setup(self).
    if inspect.signature(setup).parameters:
        setup(stage)
    else:
        setup()


def _single_loader(loaders: object, name: str) -> object:
    """Return the only loader; of a collection with one entry, that entry."""
    if not isinstance(loaders, list | tuple | Mapping):
        return loaders
    entries = list(loaders.values()) if isinstance(loaders, Mapping) else list(loaders)
    if len(entries) != 1:
        raise DataError(
            f"{name} returned {len(entries)} loaders, expected one. Name a function that returns the one "
            "to read."
        )
    return entries[0]
