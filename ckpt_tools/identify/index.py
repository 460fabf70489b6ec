"""The index of every architecture that the libraries had when it was built: digests of names and shapes.

It only proposes. What it names is built by the installed library and compared key by key before it is believed.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Literal

from ckpt_tools.identify.shape_digest import BUCKETS, Part, Shapes, parts, tops

Level = Literal["full", "body", "trunk", "frame"]
Keys = tuple[str, ...]

LEVELS: tuple[Level, ...] = ("full", "body", "trunk", "frame")
_FILE = "index.json.gz"
_MASK = 2**32 - 1  # the half of a digest that is kept: among 1,500 models a chance match is one in three million
_SIZE_WEIGHT = 2.0  # buckets that a factor of two in size counts for


@dataclass(frozen=True)
class Entry:
    """One architecture: its digests, and the keys that follow the class count and the input channels."""

    architecture: str
    digests: tuple[int, ...]  # in the order of LEVELS
    head: Keys
    stem: Keys
    sketch: bytes
    size: int  # values, without the head


@dataclass(frozen=True)
class Match:
    """Architectures whose digest is that of the tensors under ``prefix``."""

    prefix: str
    level: Level
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class Near:
    """An architecture whose sketch resembles that of the tensors under ``prefix``; 1 is as near as can be."""

    prefix: str
    entry: Entry
    likeness: float


@dataclass(frozen=True)
class Index:
    """Every entry, and the versions of the libraries they were taken from."""

    versions: Mapping[str, str]
    entries: tuple[Entry, ...]

    def matches(self, shapes: Shapes) -> Iterator[Match]:
        """What the digests say: the whole before parts of it, and of each the surest first."""
        for part in parts(shapes):
            for level in LEVELS:
                names = dict.fromkeys(self._names(part, level))
                if names:
                    yield Match(part.prefix, level, tuple(names))

    def nearest(self, shapes: Shapes, count: int) -> list[Near]:
        """The ``count`` entries with the likest sketches, the likest first."""
        best: dict[str, Near] = {}
        for part in parts(shapes):
            for entry in self.entries:
                near = Near(part.prefix, entry, _likeness(part, entry))
                known = best.get(entry.architecture)
                if known is None or known.likeness < near.likeness:
                    best[entry.architecture] = near
        return sorted(best.values(), key=lambda near: -near.likeness)[:count]

    def _names(self, part: Part, level: Level) -> Iterator[str]:
        for (head, stem), table in self._tables[level].items():
            yield from table.get(_digest(part, level, head, stem) & _MASK, ())

    @cached_property
    def _tables(self) -> dict[Level, dict[tuple[Keys, Keys], dict[int, list[str]]]]:
        """For every level, and every way to take a state dict apart on it, the names by digest."""
        tables: dict[Level, dict[tuple[Keys, Keys], dict[int, list[str]]]] = defaultdict(dict)
        for entry in self.entries:
            cuts: dict[Level, tuple[Keys, Keys]] = {
                "full": ((), ()),
                "body": (entry.head, ()),
                "trunk": (tops(entry.head), ()),
                "frame": (tops(entry.head), entry.stem),
            }
            for level, digest in zip(LEVELS, entry.digests, strict=True):
                tables[level].setdefault(cuts[level], defaultdict(list))[digest].append(entry.architecture)
        return tables


def entry_for(architecture: str, shapes: Shapes, head: Iterable[str], stem: Iterable[str]) -> Entry:
    """The entry of one architecture, from the shapes of its default build."""
    part, heads, stems = Part("", shapes), tuple(sorted(head)), tuple(sorted(stem))
    whole = (part.full, part.body(heads), part.trunk(tops(heads)), part.frame(tops(heads), stems))
    return Entry(architecture, tuple(one & _MASK for one in whole), heads, stems, part.sketch, part.size(heads))


@functools.cache
def shipped() -> Index:
    """The index that comes with this package."""
    return decode(files("ckpt_tools.identify").joinpath(_FILE).read_bytes())


def encode(index: Index) -> bytes:
    """Gzipped JSON, the same bytes for the same index: names as text, numbers in columns, in base64."""
    heads = sorted({entry.head for entry in index.entries})
    stems = sorted({entry.stem for entry in index.entries})
    count = len(index.entries)
    content: dict[str, object] = {
        "versions": dict(index.versions),
        "architectures": [entry.architecture for entry in index.entries],
        "heads": heads,
        "stems": stems,
        "head": [heads.index(entry.head) for entry in index.entries],
        "stem": [stems.index(entry.stem) for entry in index.entries],
        "size": [entry.size for entry in index.entries],
        "sketch": _text(b"".join(_halved(entry.sketch) for entry in index.entries)),
    }
    for i, level in enumerate(LEVELS):
        content[level] = _text(struct.pack(f"<{count}I", *(entry.digests[i] for entry in index.entries)))
    return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


def decode(data: bytes) -> Index:
    """The index that ``encode`` wrote."""
    content = json.loads(gzip.decompress(data))
    names: Sequence[str] = content["architectures"]
    heads, stems = [[tuple(keys) for keys in content[name]] for name in ("heads", "stems")]
    columns = (struct.unpack(f"<{len(names)}I", base64.b64decode(content[level])) for level in LEVELS)
    sketches, width = base64.b64decode(content["sketch"]), BUCKETS // 2
    rows = zip(names, zip(*columns, strict=True), content["head"], content["stem"], content["size"], strict=True)
    entries = (
        Entry(name, own, heads[head], stems[stem], _doubled(sketches[i * width : (i + 1) * width]), size)
        for i, (name, own, head, stem, size) in enumerate(rows)
    )
    return Index(content["versions"], tuple(entries))


def _digest(part: Part, level: Level, head: Keys, stem: Keys) -> int:
    match level:
        case "full":
            return part.full
        case "body":
            return part.body(head)
        case "trunk":
            return part.trunk(head)
        case "frame":
            return part.frame(head, stem)


def _likeness(part: Part, entry: Entry) -> float:
    alike = sum(a == b for a, b in zip(part.sketch, entry.sketch, strict=True))
    apart = abs(math.log2((1 + part.size(entry.head)) / (1 + entry.size)))
    return (alike - _SIZE_WEIGHT * min(apart, 2.0)) / BUCKETS


def _halved(sketch: bytes) -> bytes:
    """Two buckets of four bits a byte."""
    return bytes(high << 4 | low for high, low in zip(sketch[::2], sketch[1::2], strict=True))


def _doubled(packed: bytes) -> bytes:
    return bytes(half for byte in packed for half in (byte >> 4, byte & 15))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
