"""Patterns that name BN layers, as ``--only`` and ``--keep`` take them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ckpt_tools.arguments import advise
from ckpt_tools.errors import UsageError
from ckpt_tools.results import BatchNormLayer

__all__ = ["select_layers"]

_SHOWN_NAMES = 3


def select_layers(layers: Sequence[BatchNormLayer], patterns: Iterable[str], option: str) -> frozenset[str]:
    """Return the names of the layers that at least one pattern matches.

    A pattern is a shell-style one for the layer's name, or for the name of a container, which means
    every layer below it: ``layer4`` and ``layer[34]`` select ``layer4.0.bn1``, too. A layer that
    the model holds under several names may be given by any of them. ``option`` is the keyword
    argument that the patterns stem from, for the message.

    Raises UsageError for a pattern that matches no layer, since a mistyped name would otherwise
    change what is rewritten without a word.
    """
    selected: set[str] = set()
    if not layers:
        return frozenset()  # nothing that a name could mean; the caller says that there is no layer
    for pattern in patterns:
        matching = {layer.name for layer in layers if _matches(layer, pattern)}
        if not matching:
            raise UsageError(_no_match_message(layers, pattern, option))
        selected |= matching
    return frozenset(selected)


def _matches(layer: BatchNormLayer, pattern: str) -> bool:
    names = (layer.name, *layer.aliases)
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names)


def _no_match_message(layers: Sequence[BatchNormLayer], pattern: str, option: str) -> str:
    names = [name for layer in layers for name in (layer.name, *layer.aliases)]
    close = difflib.get_close_matches(pattern, dict.fromkeys([*names, *_containers(names)]), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    shown = ", ".join(layer.name or "(root)" for layer in layers[:_SHOWN_NAMES])
    more = len(layers) - _SHOWN_NAMES
    lister = advise("ckpt-fix inspect --all lists them", "walk(model, batch).batch_norms has them")
    return (
        f"{advise(f'--{option} {pattern}', f'{option}={pattern!r}')}: expected a pattern that matches a BN "
        f"layer or a container of BN layers, found that none has such a name.{hint} The BN layers are "
        f"{shown}{f' and {more} more; {lister}' if more > 0 else ''}."
    )


def _containers(names: Iterable[str]) -> list[str]:
    """The names of all modules that hold one of the named layers."""
    containers = []
    for name in names:
        while name := name.rpartition(".")[0]:
            containers.append(name)
    return containers
