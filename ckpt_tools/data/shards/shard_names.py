"""Find the shards that a path, a folder, a pattern or a URL names."""

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

__all__ = [
    "expand_braces",
    "is_pattern",
    "is_shard",
    "is_shard_url",
    "list_shards",
    "local_shards",
    "remote_shards",
]

_MAX_SHARDS = 100_000  # of one spec: a few braces could ask for more names than fit into memory
_SHOWN = 100  # characters of a spec that cannot be read, in a message
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])")
# Compressed shards are refused. They are recognised all the same, so that the message can say why.
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_shard(name: str) -> bool:
    """Whether a file is a shard, judged by its name."""
    return name.lower().endswith((".tar", *_COMPRESSED))


def is_pattern(text: str) -> bool:
    """Whether a text holds wildcards or braces, so that it can name several files."""
    return "{" in text or glob.has_magic(text)


def is_shard_url(url: str) -> bool:
    """Whether a URL names shards, as a pattern or by its extension.

    The URL of a folder does not, even if shards lie in that folder.
    """
    return "{" in url or "*" in url or is_shard(redact_url(url))


def list_shards(folder: Path) -> tuple[Path, ...]:
    """List the shards directly in a folder, sorted by name, without hidden ones.

    Raises DataError if the folder cannot be listed.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be listed: {error.strerror}.") from error
    return tuple(path for path in entries if is_shard(path.name) and not path.name.startswith("."))


def local_shards(spec: str, pattern: str) -> tuple[Path, ...]:
    """Find the files that a pattern with braces or ``* ? []`` names, each once.

    Raises DataError if one is not there.
    """
    names = _expand_pattern(spec, pattern)
    try:
        files_by_name = {name: _matching_files(name) for name in names}
    except OSError as error:
        raise DataError(f"{spec[:_SHOWN]}: the shards cannot be looked for: {error.strerror}.") from error
    missing = [name for name, files in files_by_name.items() if not files]
    if len(missing) == len(names):
        raise DataError(f"{spec}: no .tar shard matches this, {_first_of(names)}. Check folder and numbers.")
    if missing:
        raise DataError(f"{spec}: {len(missing)} of {len(names)} shards are not there, {_first_of(missing)}.")
    shards = tuple(dict.fromkeys(itertools.chain.from_iterable(files_by_name.values())))
    for shard in shards:
        if not is_shard(shard.name):
            advice = "For images and arrays, give the folder or file."
            raise DataError(f"{spec}: expected .tar shards, found {shard}. {advice}")
    return shards


def _matching_files(name: str) -> Sequence[Path]:
    path = Path(name)
    if is_folder(path):
        return list_shards(path)
    if os.path.lexists(path):  # before the wildcards: a file may have brackets in its name
        return [path]
    if not glob.has_magic(name):
        return []
    matches = matching_paths(name)
    # If no file is a shard, all are returned, so that a message can name one of them.
    return [match for match in matches if is_shard(match.name)] or matches


def remote_shards(url: str) -> tuple[str, ...]:
    """Find the shards that a URL with braces or ``*``, or the URL of a folder, names, each once.

    Of shards that the URL spells out, only the first and the last are looked for: a request for
    each of thousands would take long. Raises DataError, RemoteError, UsageError.
    """
    shown = redact_url(url)
    urls = _expand_pattern(shown, url)
    shards = list(dict.fromkeys(itertools.chain.from_iterable(map(_matching_urls, urls))))
    if not shards:
        raise DataError(f"{shown}: expected .tar shards behind this URL, found none. Check the URL.")
    for shard in dict.fromkeys((shards[0], shards[-1])):
        if shard in urls:
            open_remote(shard).size()  # raises if the shard is not there
    return tuple(shards)


def _matching_urls(url: str) -> Sequence[str]:
    # A URL may be signed: redact_url drops the query that then stands behind the extension.
    if "*" in url:
        return open_remote(url).matches(is_shard)
    if is_shard(redact_url(url)):
        return [url]
    return [f"{url.rstrip('/')}/{name}" for name in open_remote(url).names(is_shard) if is_shard(name)]


def _expand_pattern(spec: str, pattern: str) -> Sequence[str]:
    try:
        return list(dict.fromkeys(expand_braces(pattern)))
    except OverflowError:
        raise DataError(
            f"{spec[:_SHOWN]}: more than {_MAX_SHARDS:,} shards. Check the numbers in braces."
        ) from None
    except (RecursionError, ValueError) as error:
        raise DataError(
            f"{spec[:_SHOWN]}: these braces cannot be read. Write train-{{000..146}}.tar."
        ) from error


def expand_braces(pattern: str) -> list[str]:
    """Expand the braces in a pattern as a shell does.

    It knows ``{000..146}``, ``{0..9..3}``, ``{a..e}``, ``{train,val}``, also nested. Braces that
    mean nothing stay as they are. Raises OverflowError for more than 100,000 names.
    """
    names = [""]
    for choices in _pattern_pieces(pattern):
        if len(names) * len(choices) > _MAX_SHARDS:
            raise OverflowError
        names = [head + tail for head in names for tail in choices]
    return names


def _pattern_pieces(pattern: str) -> Iterator[Sequence[str]]:
    """Yield the texts that can stand in each part of a pattern, from left to right."""
    start, brace = 0, pattern.find("{")
    while brace >= 0:
        group = _text_in_braces(pattern, brace)
        choices = None if group is None else _choices(group)
        if group is not None and choices is not None:
            yield [pattern[start:brace]]
            yield choices
            start = brace + len(group) + 2
            brace = pattern.find("{", start)
        else:
            brace = pattern.find("{", brace + 1)
    yield [pattern[start:]]


def _text_in_braces(pattern: str, start: int) -> str | None:
    """Return the text between the braces that open at ``start``; None if they do not close."""
    depth = 0
    for position in range(start, len(pattern)):
        depth += (pattern[position] == "{") - (pattern[position] == "}")
        if not depth:
            return pattern[start + 1 : position]
    return None


def _choices(group: str) -> Sequence[str] | None:
    numbers, letters = _NUMBERS.fullmatch(group), _LETTERS.fullmatch(group)
    if numbers is not None:
        first, last, step = numbers[1], numbers[2], int(numbers[3] or 1) or 1
        # As in a shell, one end with a leading zero makes all numbers equally wide.
        padded = any(re.match(r"-?0\d", end) for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return [f"{number:0{width}d}" for number in _span(int(first), int(last), step)]
    if letters is not None:
        first, last = (end for end in letters.groups() if end)
        return [chr(code) for code in _span(ord(first), ord(last))]
    parts = _split_at_commas(group)
    if len(parts) == 1:
        return None
    names: list[str] = []
    for part in parts:
        names += expand_braces(part)
        if len(names) > _MAX_SHARDS:
            raise OverflowError
    return names


def _span(first: int, last: int, step: int = 1) -> range:
    span = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if len(span) > _MAX_SHARDS:  # len() itself raises OverflowError if no list could be so long
        raise OverflowError
    return span


def _split_at_commas(group: str) -> list[str]:
    """Split a text at the commas that stand in no inner braces."""
    parts, depth = [""], 0
    for character in group:
        depth += (character == "{") - (character == "}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _first_of(names: Sequence[str]) -> str:
    return f"the first being {names[0]}" if len(names) > 1 else f"looked for {names[0]}"
