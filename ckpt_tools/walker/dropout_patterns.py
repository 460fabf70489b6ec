"""Dropout that a user declares by name, as ``--dropout`` and ``dropout=`` take it.

Ports of networks from other frameworks often lack the dropout of the original: at test time it does
nothing, so the port gives the right outputs without it. The BN statistics still come from a
training with it.

Importing this module imports no torch, so that the command line can check what it was given.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from ckpt_tools.errors import UsageError

__all__ = ["check_declared_rates", "match_modules", "parse_declared_dropout", "split_side"]

_INPUT = ":input"
_SHOWN_NAMES = 5


def parse_declared_dropout(pairs: Iterable[str]) -> dict[str, float]:
    """Turn ``["pool*=0.25"]`` into ``{"pool*": 0.25}``; a later pair replaces an equal pattern.

    Raises UsageError for a text of another form, and for a rate outside of 0 to 1.
    """
    declared: dict[str, float] = {}
    for pair in pairs:
        pattern, _, text = pair.rpartition("=")
        try:
            declared[pattern.strip()] = float(text)
        except ValueError:
            pattern = ""
        if not pattern.strip():
            raise UsageError(f"--dropout: expected NAME=RATE such as 'pool*=0.25', found {pair!r}.")
    check_declared_rates(declared)
    return declared


def check_declared_rates(dropout: Mapping[str, float]) -> None:
    """Raise UsageError for a rate that is no number from 0 to below 1."""
    for pattern, rate in dropout.items():
        is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not is_number or math.isnan(rate) or not 0 <= rate < 1:
            raise UsageError(
                f"--dropout {pattern}={rate} (dropout={{{pattern!r}: {rate!r}}} in Python): expected a drop "
                "rate of at least 0 and below 1, the share of values that training set to zero."
            )


def split_side(pattern: str) -> tuple[str, bool]:
    """Return the pattern for names, and whether it means the input of the modules (``conv2:input``)."""
    return pattern.removesuffix(_INPUT), pattern.endswith(_INPUT)


def match_modules(names: Sequence[str], pattern: str) -> list[str]:
    """Return the names that a shell-style pattern matches, without what lies inside of a match.

    ``layer*`` means ``layer1`` and not ``layer1.0.conv``, since ``*`` stands for dots, too.

    Raises UsageError for a pattern without a match: a mistyped name would go unnoticed.
    """
    stem, _ = split_side(pattern)
    matching = {name for name in names if name and fnmatchcase(name, stem)}
    outermost = [name for name in names if name in matching and not matching & set(_containers(name))]
    if not outermost:
        close = difflib.get_close_matches(stem, [name for name in names if name], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        shown = [name for name in names if name][:_SHOWN_NAMES]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) + 1 else ""
        raise UsageError(
            f"--dropout {pattern} (dropout={{{pattern!r}: …}} in Python): expected a pattern that matches "
            f"the name of a module, found that none has such a name.{hint} The modules are "
            f"{', '.join(shown)}{more}."
        )
    return outermost


def _containers(name: str) -> Iterable[str]:
    while name := name.rpartition(".")[0]:
        yield name
