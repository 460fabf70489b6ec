"""Phrases that the text for a terminal and the pages share."""

from __future__ import annotations

# How the drop rates of the model were found out, by the values of `LoadedModel.rates`.
DROP_RATE_SOURCES = {
    "given": "given (--model-kwargs, --dropout)",
    "recorded": "recorded in the checkpoint",
    "estimated": "estimated from the stored statistics",
    "model": "those of the model",
    "unknown": "not recorded",
}

# How the architecture was recognised, for a sentence that begins with "told by".
RECOGNISED_BY_TEXT = {
    "user": "you (--arch); its tensors fit",
    "checkpoint": "the checkpoint itself; its tensors fit",
    "module": "the module that the file holds",
    "shapes": "names and shapes of all tensors",
    "shapes without head": "names and shapes of all tensors but the head's",
    "data": "the data, among several that fit",
    "file name": "the file's name, among several that fit",
}

# Whether data looks like the training data, by the values of `Verdict.level`.
VERDICT_LEVELS = {
    "agree": "agrees with what the BN layers remember",
    "doubt": "differs from what the BN layers remember",
    "refuse": "does NOT look like the training data",
    "none": "was not compared with the training data",
}

_ORDER = ("none", "agree", "doubt", "refuse", "disagree")  # version 0.1.0 said "disagree"


def is_worse(level: str, other: str) -> bool:
    """Tell whether a verdict says more against the data than another one."""
    return _rank(level) > _rank(other)


def _rank(level: str) -> int:
    return _ORDER.index(level) if level in _ORDER else 0
