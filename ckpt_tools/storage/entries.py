"""Finding the state dict in whatever object a training script saved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ckpt_tools.errors import CheckpointError

__all__ = ["Entry", "choose_entry", "list_entries", "sort_remainder"]

# Entries that timm, torchvision references, Lightning, BasicSR, DeepSpeed and plain scripts save weights under.
_WEIGHTS = frozenset(
    {"state_dict", "model", "model_state_dict", "model_state", "model_weights", "net", "net_state_dict", "network"}
    | {"network_state_dict", "weights", "params", "module"}
)
_AVERAGED = frozenset({"ema", "swa", "avg", "averaged", "polyak"})
_TRAINER = ("optim", "sched", "scaler", "rng", "random")  # how a word in the name begins
_SETTINGS = frozenset({"args", "config", "cfg", "hyper", "hparams", "callbacks", "loops", "opt", "amp"})


@dataclass(frozen=True)
class Entry:
    """A state dict and where it stands: ``path`` is () for the top level."""

    path: tuple[str, ...]
    state: Mapping[str, object]

    @property
    def name(self) -> str:
        """The path as the user sees it and writes it after ``--weights``."""
        return ".".join(self.path)

    @property
    def averaged(self) -> bool:
        """Whether these are weights averaged over training steps (EMA, SWA)."""
        return any(not _AVERAGED.isdisjoint(_tokens(part)) for part in self.path)

    @property
    def rank(self) -> tuple[bool, int]:
        """Order of preference: names that mean weights first, then the least nested."""
        known = self.averaged or bool(self.path and self.path[-1] in _WEIGHTS)
        return (not known, max(1, len(self.path)))


def list_entries(root: object) -> list[Entry]:
    """Every state dict at the top level and up to two levels down; optimizer states are none."""
    return list(_search(root, ()))


def choose_entry(entries: list[Entry], weights: str, where: object) -> Entry:
    """The entry that ``weights`` asks for: "auto" (averaged ones if there are any), "model", "ema" or a name.

    Raises CheckpointError if there is none, or more than one.
    """
    found = ", ".join(entry.name or "(top level)" for entry in entries)
    named = [entry for entry in entries if entry.path and entry.name == weights]
    pool = named or _pool(entries, weights)
    if not entries:
        raise CheckpointError(
            f"{where}: expected a state dict (names to tensors) at the top level or up to two levels down, found none. "
            "Save model.state_dict() with torch.save."
        )
    if not pool:
        kind = {"model": "weights that are not averaged", "ema": "averaged (EMA) weights"}
        wanted = kind.get(weights, f"an entry named {weights!r}")
        raise CheckpointError(f"{where}: expected {wanted}, found only {found}. Pass --weights auto, or one of these.")
    best = [entry for entry in pool if entry.rank == min(entry.rank for entry in pool)]
    if len(best) > 1:
        names = ", ".join(entry.name or "(top level)" for entry in best)
        raise CheckpointError(
            f"{where}: expected one state dict, found {len(best)} that could be meant: {names}. "
            "Pass one of these names to --weights."
        )
    return best[0]


def sort_remainder(root: object, chosen: Entry) -> tuple[dict[str, object], list[str]]:
    """Split what stands beside the chosen state dict into words and the names of what is left out.

    Left out: optimizer and other trainer state, further state dicts, loose tensors with dimensions.
    """
    words: dict[str, object] = {}
    left_out: list[str] = []
    holder = root
    for depth, step in enumerate(chosen.path):
        if not isinstance(holder, Mapping):
            break
        for key, value in holder.items():
            if key == step:
                continue
            if _is_word(str(key), value):
                words[str(key)] = value  # the nearer to the state dict, the more it says about it
            else:
                left_out.append(".".join((*chosen.path[:depth], str(key))))
        holder = holder[step]
    return words, left_out


def _pool(entries: list[Entry], weights: str) -> list[Entry]:
    averaged = [entry for entry in entries if entry.averaged]
    plain = [entry for entry in entries if not entry.averaged]
    return {"auto": averaged or plain, "model": plain, "ema": averaged}.get(weights, [])


def _search(value: object, path: tuple[str, ...]) -> Iterator[Entry]:
    if isinstance(value, nn.Module):  # only a trusted pickle holds one
        value = value.state_dict()
    if not isinstance(value, Mapping):
        return
    found = _holds_weights(value)
    if found:
        yield Entry(path, value)
    # The top level may hold a stray tensor beside the state dict; deeper down a state dict ends the search.
    if len(path) < 2 and not (found and path):
        for key, inner in value.items():
            if isinstance(key, str) and not _is_aside(key):
                yield from _search(inner, (*path, key))


def _holds_weights(value: Mapping[object, object]) -> bool:
    """Names to tensors, at least one of which is no mere number; no optimizer state."""
    if "param_groups" in value or not all(isinstance(key, str) for key in value):
        return False
    return any(isinstance(x, Tensor) and x.dim() > 0 and not _is_aside(str(key)) for key, x in value.items())


def _is_word(key: str, value: object) -> bool:
    if _is_trainer_state(key) or (isinstance(value, Mapping) and "param_groups" in value):
        return False
    if any(isinstance(x, Tensor) and x.dim() > 0 for x in (value if isinstance(value, list) else [value])):
        return False
    return _is_settings(key) or not list_entries(value)


def _is_aside(key: str) -> bool:
    """Whether an entry's name says that it holds no weights. Keys with dots are parameters, not entries."""
    if "." in key:
        return key.endswith("._extra_state")
    return _is_trainer_state(key) or _is_settings(key)


def _is_settings(key: str) -> bool:
    return not _SETTINGS.isdisjoint(_tokens(key))


def _is_trainer_state(key: str) -> bool:
    return "." not in key and any(token.startswith(_TRAINER) for token in _tokens(key))


def _tokens(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())
