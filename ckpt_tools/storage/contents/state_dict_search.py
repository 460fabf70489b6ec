"""Finding the state dict in whatever object a training script saved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.contents.averaged_copies import find_averaged_copies
from ckpt_tools.storage.formats.module_trees import TreeBudget, module_state
from ckpt_tools.storage.formats.pickles import OpaqueObject

__all__ = [
    "StateDictEntry",
    "as_mapping",
    "choose_entry",
    "is_trainer_state",
    "list_entries",
    "separate_remaining_entries",
]

# Entries that timm, torchvision references, Lightning, BasicSR, DeepSpeed and plain scripts save weights under.
_WEIGHTS = frozenset(
    {
        "state_dict",
        "model",
        "model_state_dict",
        "model_state",
        "model_weights",
        "net",
        "net_state_dict",
        "network",
    }
    | {"network_state_dict", "weights", "params", "module", "current_model_state"}
)
_AVERAGED = frozenset({"ema", "swa", "avg", "averaged", "polyak"})
_SWAPPED = frozenset(
    {"state_dict", "current_model_state", "averaging_state"}
)  # Lightning's WeightAveraging
_TRAINER = ("optim", "sched", "scaler", "rng", "random")  # how a word in the name begins
_SETTINGS = frozenset(
    {"args", "config", "cfg", "hyper", "hparams", "callbacks", "loops", "opt", "amp"}
)

_FEW = 16
_MOST = 200  # state dicts in one file; a pickle can name one of them any number of times
_UNFOLDED = 300_000  # modules and tensors in all of them


@dataclass(frozen=True)
class SearchMemory:
    """What a search has met, by identity: a pickle can hold one value in many places, and each is searched once.

    ``barren`` has the mappings without any state dict, and how many levels of them were searched; ``states`` the state
    dicts of modules.
    """

    barren: dict[int, int] = field(default_factory=dict)
    states: dict[int, Mapping[str, object] | None] = field(default_factory=dict)
    allowance: TreeBudget = field(default_factory=lambda: TreeBudget(_UNFOLDED))

    def state_of(self, value: object) -> Mapping[str, object] | None:
        """The state dict of a whole module, trusted and alive or read as a tree of placeholders."""
        if id(value) not in self.states:
            self.states[id(value)] = (
                value.state_dict()
                if isinstance(value, nn.Module)
                else module_state(value, self.allowance)
            )
        return self.states[id(value)]


@dataclass(frozen=True)
class StateDictEntry:
    """A state dict and where it stands: ``path`` is () for the top level.

    ``copy`` is the prefix of an averaged copy within a larger state dict, which ``whole`` then is; ``source`` is the
    module whose state dict this is, if one was pickled.
    """

    path: tuple[str, ...]
    state: Mapping[str, object]
    averaged: bool = False  # over training steps (EMA, SWA)
    copy: str = ""
    whole: Mapping[str, object] | None = None
    source: object = None

    @property
    def name(self) -> str:
        """The path as the user sees it and writes it after ``--weights``."""
        return ".".join((*self.path, self.copy.rstrip("."))).rstrip(".")

    @property
    def rank(self) -> tuple[bool, int]:
        """Order of preference: names that mean weights first, then the least nested."""
        known = self.averaged or bool(self.path and self.path[-1] in _WEIGHTS)
        return (not known, max(1, len(self.path)))


def list_entries(root: object, seen: SearchMemory | None = None) -> list[StateDictEntry]:
    """Every state dict at the top level and up to two levels down; optimizer states are none.

    ``seen``: what earlier searches of the same file have met.
    """
    searched = _search(root, (), False, seen or SearchMemory())
    return [entry for found in islice(searched, _MOST) for entry in _split(found)]


def as_mapping(root: object) -> object:
    """What stands at the top of a file as a mapping, where it has parts: a pair by index, an object by attribute."""
    if isinstance(root, list | tuple) and len(root) <= _FEW:
        return {str(i): value for i, value in enumerate(root)}
    if (
        isinstance(root, OpaqueObject)
        and isinstance(root.state, Mapping)
        and module_state(root) is None
    ):
        return root.state
    return root


def choose_entry(root: object, weights: str, where: object) -> StateDictEntry:
    """The entry that ``weights`` asks for: "auto" (averaged ones if there are any), "model", "ema" or a name.

    Raises CheckpointError if there is none, or more than one.
    """
    entries = list_entries(root)
    found = ", ".join(entry.name or "(top level)" for entry in entries)
    named = [entry for entry in entries if entry.name and entry.name == weights]
    pool = named or _pool(entries, weights)
    if not entries:
        raise CheckpointError(
            f"{where}: expected a state dict (names to tensors) at the top level or up to two levels down, found none. "
            f"Save model.state_dict() with torch.save{_trust(root)}."
        )
    if not pool:
        kind = {"model": "weights that are not averaged", "ema": "averaged (EMA) weights"}
        wanted = kind.get(weights, f"an entry named {weights!r}")
        raise CheckpointError(
            f"{where}: expected {wanted}, found only {found}. Pass --weights auto, or one of these."
        )
    best = [entry for entry in pool if entry.rank == min(entry.rank for entry in pool)]
    if len(best) > 1:
        names = ", ".join(entry.name or "(top level)" for entry in best)
        raise CheckpointError(
            f"{where}: expected one state dict, found {len(best)} that could be meant: {names}. "
            "Pass one of these names to --weights."
        )
    return best[0]


def separate_remaining_entries(
    root: object, chosen: StateDictEntry
) -> tuple[dict[str, object], list[str]]:
    """Split what stands beside the chosen state dict into words and the names of what is left out.

    Left out: optimizer and other trainer state, further state dicts, loose tensors with dimensions.
    """
    words: dict[str, object] = {}
    left_out: list[str] = []
    seen = SearchMemory()
    holder = root
    for depth, step in enumerate(chosen.path):
        if not isinstance(holder, Mapping):
            break
        for key, value in holder.items():
            if key == step:
                continue
            if _is_word(str(key), value, seen):
                words[str(key)] = value  # the nearer to the state dict, the more it says about it
            else:
                left_out.append(".".join((*chosen.path[:depth], str(key))))
        holder = holder[step]
    return words, left_out


def is_trainer_state(key: str) -> bool:
    """Whether an entry's name says that it is the optimizer's, the scheduler's and the like."""
    return "." not in key and any(token.startswith(_TRAINER) for token in _tokens(key))


def _trust(root: object) -> str:
    """Advice for a file with objects that only their own code can open."""
    values = list(root.values()) if isinstance(root, Mapping) else [root]
    names = [value.name for value in values if isinstance(value, OpaqueObject)]
    shown = "".join(c for c in names[0][:100] if c.isprintable()) if names else ""
    return (
        f", or pass --trust if you trust the file: {shown} in it can then run any code"
        if shown
        else ""
    )


def _pool(entries: list[StateDictEntry], weights: str) -> list[StateDictEntry]:
    averaged = [entry for entry in entries if entry.averaged]
    plain = [entry for entry in entries if not entry.averaged]
    return {"auto": averaged or plain, "model": plain, "ema": averaged}.get(weights, [])


def _search(
    value: object, path: tuple[str, ...], averaged: bool, seen: SearchMemory
) -> Iterator[StateDictEntry]:
    state = value if isinstance(value, Mapping) else seen.state_of(value)
    levels = 2 - len(path)
    if state is None or seen.barren.get(id(value), -1) >= levels:
        return
    found = any_inside = _holds_weights(state)
    if found:
        yield StateDictEntry(path, state, averaged, source=None if state is value else value)
    # The top level may hold a stray tensor beside the state dict; deeper down a state dict ends the search.
    if state is value and len(path) < 2 and not (found and path):
        swapped = state.keys() >= _SWAPPED
        for key, inner in state.items():
            if isinstance(key, str) and not _is_aside(key):
                means = not _AVERAGED.isdisjoint(_tokens(key)) or (swapped and key == "state_dict")
                for entry in _search(inner, (*path, key), averaged or means, seen):
                    any_inside = True
                    yield entry
    if not any_inside:
        seen.barren[id(value)] = levels


def _split(entry: StateDictEntry) -> list[StateDictEntry]:
    """A state dict in which a training module kept an averaged copy of its model is two entries."""
    copies = [] if entry.averaged else find_averaged_copies(entry.state)
    if not copies:
        return [entry]
    roots = tuple(copy.root for copy in copies)
    rest = {key: value for key, value in entry.state.items() if not key.startswith(roots)}
    parts = {
        copy.prefix: {
            key: value for key, value in entry.state.items() if key.startswith(copy.prefix)
        }
        for copy in copies
    }
    return [
        replace(entry, state=rest, whole=entry.state),
        *(
            replace(entry, state=part, averaged=True, copy=copy, whole=entry.state)
            for copy, part in parts.items()
        ),
    ]


def _holds_weights(value: Mapping[Any, object]) -> bool:
    """Names to tensors, at least one of which is no mere number; no optimizer state."""
    if "param_groups" in value or not all(isinstance(key, str) for key in value):
        return False
    return any(
        isinstance(x, Tensor) and x.dim() > 0 and not _is_aside(str(key))
        for key, x in value.items()
    )


def _is_word(key: str, value: object, seen: SearchMemory) -> bool:
    if is_trainer_state(key) or (isinstance(value, Mapping) and "param_groups" in value):
        return False
    if any(
        isinstance(x, Tensor) and x.dim() > 0
        for x in (value if isinstance(value, list) else [value])
    ):
        return False
    return _is_settings(key) or not list_entries(value, seen)


def _is_aside(key: str) -> bool:
    """Whether an entry's name says that it holds no weights. Keys with dots are parameters, not entries."""
    if "." in key:
        return key.endswith("._extra_state")
    return is_trainer_state(key) or _is_settings(key)


def _is_settings(key: str) -> bool:
    return not _SETTINGS.isdisjoint(_tokens(key))


def _tokens(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())
