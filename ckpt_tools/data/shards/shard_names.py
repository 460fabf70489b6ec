"""Which shards a path, a folder, a pattern or a URL names."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckpt_tools.errors import DataError
from ckpt_tools.paths import is_folder, matching_paths
from ckpt_tools.remote.remote_store import open_remote
from ckpt_tools.urls import redact_url

__all__ = ["expand_braces", "is_pattern", "is_shard", "is_shard_url", "list_shards", "local_shards", "remote_shards"]

_MOST = 100_000  # shards of one spec
_SHOWN = 100  # characters of one that cannot be read
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # told from others, to say why they are refused


def is_shard(name: str) -> bool:
    """Whether a file is a shard by its name."""
    return name.lower().endswith((".tar", *_COMPRESSED))


def is_pattern(text: str) -> bool:
    """Whether a text can name several files."""
    return "{" in text or glob.has_magic(text)


def is_shard_url(url: str) -> bool:
    """Whether a URL names shards by itself, as a pattern or by its extension: a folder does not."""
    return "{" in url or "*" in url or is_shard(redact_url(url))


def list_shards(folder: Path) -> tuple[Path, ...]:
    """The shards directly in a folder, sorted by name. Raises DataError if it cannot be listed."""
    try:
        return tuple(sorted(one for one in folder.iterdir() if is_shard(one.name) and not one.name.startswith(".")))
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be listed: {error.strerror}.") from error


def local_shards(spec: str, pattern: str) -> tuple[Path, ...]:
    """The files that a pattern with braces or ``* ? []`` names, each once. Raises DataError if one is not there."""
    names = _expand_pattern(spec, pattern)
    try:
        found = {name: _local(name) for name in names}
    except OSError as error:
        raise DataError(f"{spec[:_SHOWN]}: the shards cannot be looked for: {error.strerror}.") from error
    missing = [name for name, files in found.items() if not files]
    if len(missing) == len(names):
        raise DataError(f"{spec}: no .tar shard matches this, {_example(names)}. Check the folder and the numbers.")
    if missing:
        raise DataError(f"{spec}: {len(missing)} of {len(names)} shards are not there, {_example(missing)}.")
    shards = tuple(dict.fromkeys(itertools.chain.from_iterable(found.values())))
    other = next((shard for shard in shards if not is_shard(shard.name)), None)
    if other is not None:
        raise DataError(f"{spec}: expected .tar shards, found {other}. For images and arrays, give the folder or file.")
    return shards


def _local(name: str) -> Sequence[Path]:
    path = Path(name)
    if is_folder(path):
        return list_shards(path)
    if os.path.lexists(path):
        return [path]
    if not glob.has_magic(name):
        return []
    matches = matching_paths(name)
    return [match for match in matches if is_shard(match.name)] or matches


def remote_shards(url: str) -> tuple[str, ...]:
    """The URLs that one with braces or ``*`` names, or that lie in the folder it names, each once.

    Of a list that is spelled out, the first and the last are looked for. Raises DataError, RemoteError, UsageError.
    """
    shown = redact_url(url)
    urls = _expand_pattern(shown, url)
    found = list(dict.fromkeys(itertools.chain.from_iterable(map(_remote, urls))))
    if not found:
        raise DataError(f"{shown}: expected .tar shards behind this URL, found none. Check the URL.")
    for one in dict.fromkeys((found[0], found[-1])):
        if one in urls:
            open_remote(one).size()
    return tuple(found)


def _remote(url: str) -> Sequence[str]:
    if "*" in url:
        return open_remote(url).matches(is_shard)
    if is_shard(redact_url(url)):
        return [url]
    return [f"{url.rstrip('/')}/{name}" for name in open_remote(url).names(is_shard) if is_shard(name)]


def _expand_pattern(spec: str, pattern: str) -> Sequence[str]:
    try:
        return list(dict.fromkeys(expand_braces(pattern)))
    except OverflowError:
        raise DataError(f"{spec[:_SHOWN]}: more than {_MOST:,} shards. Check the numbers in braces.") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{spec[:_SHOWN]}: these braces cannot be read. Write train-{{000..146}}.tar.") from error


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of a pattern with braces: ``{000..146}``, ``{0..9..3}``, ``{a..e}``, ``{train,val}``, nested.

    Braces that mean nothing stay as they are. Raises OverflowError for too many.
    """
    found = [""]
    for choices in _pieces(pattern):
        if len(found) * len(choices) > _MOST:
            raise OverflowError
        found = [head + one for head in found for one in choices]
    return found


def _pieces(pattern: str) -> Iterator[Sequence[str]]:
    """What can stand in each part of a pattern, from left to right."""
    start, at = 0, pattern.find("{")
    while at >= 0:
        group = _group(pattern, at)
        choices = None if group is None else _choices(group)
        if group is not None and choices is not None:
            yield [pattern[start:at]]
            yield choices
            start = at = at + len(group) + 2
        else:
            at += 1
        at = pattern.find("{", at)
    yield [pattern[start:]]


def _group(pattern: str, start: int) -> str | None:
    """What stands in the braces that open at ``start``; None if they do not close."""
    depth = 0
    for at in range(start, len(pattern)):
        depth += (pattern[at] == "{") - (pattern[at] == "}")
        if not depth:
            return pattern[start + 1 : at]
    return None


def _choices(group: str) -> Sequence[str] | None:
    numbers, letters = _NUMBERS.fullmatch(group), _LETTERS.fullmatch(group)
    if numbers is not None:
        first, last, step = numbers[1], numbers[2], int(numbers[3] or 1) or 1
        padded = any(re.match(r"-?0\d", end) for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return [f"{number:0{width}d}" for number in _span(int(first), int(last), step)]
    if letters is not None:
        first, last = (end for end in letters.groups() if end)
        return [chr(code) for code in _span(ord(first), ord(last))]
    parts = _parts(group)
    if len(parts) == 1:
        return None
    found: list[str] = []
    for part in parts:
        found += expand_braces(part)
        if len(found) > _MOST:
            raise OverflowError
    return found


def _span(first: int, last: int, step: int = 1) -> range:
    span = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if len(span) > _MOST:  # raises OverflowError by itself if it is longer than any list
        raise OverflowError
    return span


def _parts(group: str) -> list[str]:
    """The parts between commas that stand in no inner braces."""
    parts, depth = [""], 0
    for character in group:
        depth += (character == "{") - (character == "}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _example(names: Sequence[str]) -> str:
    return f"the first being {names[0]}" if len(names) > 1 else f"looked for {names[0]}"
