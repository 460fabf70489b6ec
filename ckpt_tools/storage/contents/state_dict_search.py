"""Finding the state dict in whatever object a training script saved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.contents.averaged_copies import (
    FlattenedCopy,
    find_averaged_copies,
    find_flattened_copy,
)
from ckpt_tools.storage.contents.averaging_conventions import (
    averaged_by_framework,
    sounds_averaged,
    unfinished_averages,
    wraps_average,
)
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

# Entries that timm, torchvision references, Lightning, BasicSR, DeepSpeed and plain scripts save
# weights under.
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
# The beginnings of words in the names of what belongs to the trainer.
_TRAINER = ("optim", "sched", "scaler", "rng", "random")
# Words in the names of settings, which hold no weights.
_SETTINGS = frozenset({"args", "config", "cfg", "hyper", "hparams", "callbacks", "loops", "opt", "amp"})

_MAX_PARTS = 16  # of a list or tuple at the top of a file
_MAX_STATE_DICTS = 200  # in one file; a pickle can name one of them any number of times
_MAX_TREE_VALUES = 300_000  # modules and tensors in all pickled modules of one file


@dataclass(frozen=True)
class SearchMemory:
    """What a search has met so far, by identity: a pickle can hold one value in many places.

    ``barren`` has the mappings without any state dict, and how many levels of them were searched.
    ``states`` has the state dicts of modules. ``budget`` bounds the modules in all of them.
    """

    barren: dict[int, int] = field(default_factory=dict)
    states: dict[int, Mapping[str, object] | None] = field(default_factory=dict)
    budget: TreeBudget = field(default_factory=lambda: TreeBudget(_MAX_TREE_VALUES))

    def state_of(self, value: object) -> Mapping[str, object] | None:
        """Return the state dict of a whole module; None for other values.

        The module is a real one in a file that is trusted, and a tree of placeholders elsewhere.
        """
        if id(value) not in self.states:
            if isinstance(value, nn.Module):
                self.states[id(value)] = value.state_dict()
            else:
                self.states[id(value)] = module_state(value, self.budget)
        return self.states[id(value)]


@dataclass(frozen=True)
class StateDictEntry:
    """A state dict and its place in a file: ``path`` is () for the top level.

    Where an averaged copy stands within a larger state dict, ``copy`` is its prefix.
    ``larger_state`` is that state dict, for the copy and for the model beside it. ``source`` is the
    module whose state dict this is, if one was pickled. ``on_request``: "auto" never takes it.
    """

    path: tuple[str, ...]
    state: Mapping[str, object]
    averaged: bool = False  # over training steps (EMA, SWA)
    copy: str = ""
    larger_state: Mapping[str, object] | None = None
    source: object = None
    on_request: bool = False

    @property
    def name(self) -> str:
        """The path as the user sees it, and gives it to ``--weights``."""
        return ".".join((*self.path, self.copy.rstrip("."))).rstrip(".")

    @property
    def rank(self) -> tuple[bool, int]:
        """The order of preference: names that mean weights first, then the least nested."""
        means_weights = self.averaged or bool(self.path and self.path[-1] in _WEIGHTS)
        return (not means_weights, max(1, len(self.path)))


def list_entries(root: object, memory: SearchMemory | None = None) -> list[StateDictEntry]:
    """Return every state dict at the top level and up to two levels down, without optimizer states.

    ``memory`` is that of earlier searches of the same file.
    """
    found = list(islice(_search(root, (), None, memory or SearchMemory()), _MAX_STATE_DICTS))
    entries = [part for entry in found for part in _split_averaged_copies(entry)]
    if isinstance(root, Mapping):
        entries += [
            StateDictEntry(path, state, averaged=True, on_request=True)
            for path, state in unfinished_averages(root).items()
        ]
    return [_complete_average(entry, entries) for entry in entries]


def as_mapping(root: object) -> object:
    """Return the object in a file as a mapping of its parts, if it has parts.

    Those of a list are named by index, those of an object by attribute. An object without parts,
    and a whole module, are returned as they are.
    """
    if isinstance(root, list | tuple) and len(root) <= _MAX_PARTS:
        return {str(i): value for i, value in enumerate(root)}
    if isinstance(root, OpaqueObject) and isinstance(root.state, Mapping) and module_state(root) is None:
        return root.state
    return root


def choose_entry(root: object, weights: str, where: object) -> StateDictEntry:
    """Return the entry that ``weights`` asks for.

    This is "auto" (averaged weights if there are any), "model", "ema", or the name of an entry.
    Raises CheckpointError if there is no such entry, or more than one of the best rank.
    """
    entries = list_entries(root)
    named = [
        entry
        for entry in entries
        if entry.name and entry.name == weights and (weights != "ema" or entry.averaged)
    ]
    candidates = named or _filter_entries(entries, weights)
    if not entries:
        raise CheckpointError(
            f"{where}: expected a state dict (names to tensors) at the top level or up to two "
            "levels down, found none. Save model.state_dict() with "
            f"torch.save{_suggest_trust(root)}."
        )
    if not candidates:
        kind = {"model": "weights that are not averaged", "ema": "averaged (EMA) weights"}
        expected = kind.get(weights, f"an entry named {weights!r}")
        raise CheckpointError(
            f"{where}: expected {expected}, found only {_join_names(entries)}. Pass --weights auto, "
            "or one of these."
        )
    best_rank = min(entry.rank for entry in candidates)
    best = [entry for entry in candidates if entry.rank == best_rank]
    if len(best) > 1:
        raise CheckpointError(
            f"{where}: expected one state dict, found {len(best)} that could be meant: "
            f"{_join_names(best)}. Pass one of these names to --weights."
        )
    return best[0]


def _join_names(entries: list[StateDictEntry]) -> str:
    return ", ".join(entry.name or "(top level)" for entry in entries)


def separate_remaining_entries(root: object, chosen: StateDictEntry) -> tuple[dict[str, object], list[str]]:
    """Return the values that are recorded beside the chosen state dict, and the names left out.

    Left out are the states of the optimizer and the trainer, further state dicts, and single
    tensors with dimensions.
    """
    words: dict[str, object] = {}
    left_out: list[str] = []
    memory = SearchMemory()
    holder = root
    for depth, step in enumerate(chosen.path):
        if not isinstance(holder, Mapping):
            break
        for key, value in holder.items():
            if key == step:
                continue
            if _is_recorded_value(str(key), value, memory):
                # Of two values with one name the one nearer to the state dict says more about it.
                words[str(key)] = value
            else:
                left_out.append(".".join((*chosen.path[:depth], str(key))))
        holder = holder[step]
    return words, left_out


def is_trainer_state(key: str) -> bool:
    """Return whether an entry's name says that it belongs to an optimizer or the like."""
    return "." not in key and any(token.startswith(_TRAINER) for token in _tokens(key))


def _suggest_trust(root: object) -> str:
    """Return advice for a file with objects of foreign classes; "" for other files."""
    values = list(root.values()) if isinstance(root, Mapping) else [root]
    names = [value.name for value in values if isinstance(value, OpaqueObject)]
    shown = "".join(c for c in names[0][:100] if c.isprintable()) if names else ""
    if not shown:
        return ""
    return f", or pass --trust if you trust the file: {shown} in it can then run any code"


def _filter_entries(entries: list[StateDictEntry], weights: str) -> list[StateDictEntry]:
    averaged = [entry for entry in entries if entry.averaged and not entry.on_request]
    plain = [entry for entry in entries if not entry.averaged and not entry.on_request]
    unfinished = [entry for entry in entries if entry.averaged and entry.on_request]
    # A file that is a state dict as a whole holds the model, whatever else it is.
    whole = [entry for entry in averaged if not entry.name]
    return {"auto": averaged or plain, "model": plain or whole, "ema": averaged or unfinished}.get(
        weights, []
    )


def _search(
    value: object, path: tuple[str, ...], averaged: bool | None, memory: SearchMemory
) -> Iterator[StateDictEntry]:
    """Yield the state dicts in a value that stands at ``path``.

    ``averaged`` says what is known of their weights from where they stand.
    """
    state = value if isinstance(value, Mapping) else memory.state_of(value)
    levels = 2 - len(path)
    if state is None or memory.barren.get(id(value), -1) >= levels:
        return
    is_state_dict = is_fruitful = _holds_weights(state)
    if is_state_dict:
        is_averaged = wraps_average(state) if averaged is None else averaged
        yield StateDictEntry(path, state, is_averaged, source=None if state is value else value)
    # The top level may hold a stray tensor beside the state dict; deeper down a state dict ends the
    # search.
    if state is value and len(path) < 2 and not (is_state_dict and path):
        by_framework = averaged_by_framework(state)
        for key, inner in state.items():
            if isinstance(key, str) and not _is_no_weights(key):
                by_name = True if sounds_averaged(key) else averaged
                inner_averaged = by_framework.get(key, by_name)
                for entry in _search(inner, (*path, key), inner_averaged, memory):
                    is_fruitful = True
                    yield entry
    if not is_fruitful:
        memory.barren[id(value)] = levels


def _split_averaged_copies(entry: StateDictEntry) -> list[StateDictEntry]:
    """Return the model and each averaged copy of it in a state dict as entries of their own."""
    # ema-pytorch saves both models, and that as an entry which may be called the average.
    if entry.averaged and not any(key.startswith("online_model.") for key in entry.state):
        return [entry]
    if flattened := find_flattened_copy(entry.state):
        return _split_flattened_copy(entry, flattened)
    copies = find_averaged_copies(entry.state)
    if not copies:
        return [entry]
    roots = tuple(copy.root for copy in copies)
    items = entry.state.items()
    model = {key: value for key, value in items if not key.startswith(roots)}
    parts = [replace(entry, state=model, averaged=False, larger_state=entry.state)]
    for prefix in dict.fromkeys(copy.prefix for copy in copies):
        copy = {key: value for key, value in items if key.startswith(prefix)}
        parts.append(replace(entry, state=copy, averaged=True, copy=prefix, larger_state=entry.state))
    return parts


def _split_flattened_copy(entry: StateDictEntry, copy: FlattenedCopy) -> list[StateDictEntry]:
    """Return the model with its own parameters, and with those of its copy in buffers."""
    items = entry.state.items()
    plain = {key: value for key, value in items if key not in copy.buffers and key not in copy.counters}
    copied = {**plain, **{name: entry.state[buffer] for buffer, name in copy.buffers.items()}}
    return [
        replace(entry, state=plain, averaged=not copy.averaged, larger_state=entry.state),
        replace(
            entry,
            state=copied,
            averaged=copy.averaged,
            copy=copy.root if copy.averaged else f"{copy.root}*",
            larger_state=entry.state,
            on_request=not copy.averaged,
        ),
    ]


def _complete_average(entry: StateDictEntry, entries: list[StateDictEntry]) -> StateDictEntry:
    """Return averaged weights with the BN statistics of the model, where they have none themselves.

    Many scripts average the parameters alone, and put them into the model with its buffers.
    """
    if not entry.averaged or entry.on_request or _has_variances(entry.state):
        return entry
    for model in entries:
        state = model.state
        is_larger = not model.averaged and _has_variances(state)
        if is_larger and all(
            key in state and _same_shape(value, state[key]) for key, value in entry.state.items()
        ):
            return replace(entry, state={**state, **entry.state}, source=None)
    return entry


def _has_variances(state: Mapping[str, object]) -> bool:
    return any(key.endswith("running_var") for key in state)


def _same_shape(first: object, second: object) -> bool:
    return getattr(first, "shape", None) == getattr(second, "shape", ())


def _holds_weights(value: Mapping[Any, object]) -> bool:
    """Return whether a mapping is a state dict: names to tensors, at least one with dimensions.

    The state of an optimizer is none.
    """
    if "param_groups" in value or not all(isinstance(key, str) for key in value):
        return False
    return any(
        isinstance(item, Tensor) and item.dim() > 0 and not _is_no_weights(str(key))
        for key, item in value.items()
    )


def _is_recorded_value(key: str, value: object, memory: SearchMemory) -> bool:
    if is_trainer_state(key) or (isinstance(value, Mapping) and "param_groups" in value):
        return False
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, Tensor) and item.dim() > 0 for item in items):
        return False
    return _is_settings(key) or not list_entries(value, memory)


def _is_no_weights(key: str) -> bool:
    """Return whether a name says that it is not one of weights."""
    # Keys with dots are those of parameters, whose modules may have such names.
    if "." in key:
        return key.endswith("._extra_state")
    return is_trainer_state(key) or _is_settings(key)


def _is_settings(key: str) -> bool:
    return not _SETTINGS.isdisjoint(_tokens(key))


def _tokens(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())
