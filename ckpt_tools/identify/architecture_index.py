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

from ckpt_tools.identify.shape_digest import SKETCH_BUCKETS, ModelPart, Shapes, split_into_parts, top_attributes

Level = Literal["full", "body", "trunk", "frame"]
Keys = tuple[str, ...]

DIGEST_LEVELS: tuple[Level, ...] = ("full", "body", "trunk", "frame")
_FILE = "index.json.gz"
_MASK = 2**32 - 1  # the half of a digest that is kept: among 1,500 models a chance match is one in three million
_SIZE_WEIGHT = 2.0  # buckets that a factor of two in size counts for


@dataclass(frozen=True)
class IndexEntry:
    """One architecture: its digests, and the keys that follow the class count and the input channels."""

    architecture: str
    digests: tuple[int, ...]  # in the order of LEVELS
    head: Keys
    stem: Keys
    sketch: bytes
    size: int  # values, without the head


@dataclass(frozen=True)
class DigestMatch:
    """Architectures whose digest is that of the tensors under ``prefix``."""

    prefix: str
    level: Level
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class SketchMatch:
    """An architecture whose sketch resembles that of the tensors under ``prefix``; 1 is as near as can be."""

    prefix: str
    entry: IndexEntry
    likeness: float


@dataclass(frozen=True)
class ArchitectureIndex:
    """Every entry, and the versions of the libraries they were taken from."""

    versions: Mapping[str, str]
    entries: tuple[IndexEntry, ...]

    def find_matches(self, shapes: Shapes) -> Iterator[DigestMatch]:
        """What the digests say: the whole before parts of it, and of each the surest first."""
        for part in split_into_parts(shapes):
            for level in DIGEST_LEVELS:
                names = dict.fromkeys(self._names(part, level))
                if names:
                    yield DigestMatch(part.prefix, level, tuple(names))

    def nearest_entries(self, shapes: Shapes, count: int) -> list[SketchMatch]:
        """The ``count`` entries with the likest sketches, the likest first."""
        best: dict[str, SketchMatch] = {}
        for part in split_into_parts(shapes):
            for entry in self.entries:
                near = SketchMatch(part.prefix, entry, _likeness(part, entry))
                known = best.get(entry.architecture)
                if known is None or known.likeness < near.likeness:
                    best[entry.architecture] = near
        return sorted(best.values(), key=lambda near: -near.likeness)[:count]

    def _names(self, part: ModelPart, level: Level) -> Iterator[str]:
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
                "trunk": (top_attributes(entry.head), ()),
                "frame": (top_attributes(entry.head), entry.stem),
            }
            for level, digest in zip(DIGEST_LEVELS, entry.digests, strict=True):
                tables[level].setdefault(cuts[level], defaultdict(list))[digest].append(entry.architecture)
        return tables


def make_index_entry(architecture: str, shapes: Shapes, head: Iterable[str], stem: Iterable[str]) -> IndexEntry:
    """The entry of one architecture, from the shapes of its default build."""
    part, heads, stems = ModelPart("", shapes), tuple(sorted(head)), tuple(sorted(stem))
    whole = (
        part.full_digest,
        part.body_digest(heads),
        part.trunk_digest(top_attributes(heads)),
        part.frame_digest(top_attributes(heads), stems),
    )
    return IndexEntry(architecture, tuple(one & _MASK for one in whole), heads, stems, part.sketch, part.size(heads))


@functools.cache
def load_shipped_index() -> ArchitectureIndex:
    """The index that comes with this package."""
    return decode_index(files("ckpt_tools.identify").joinpath(_FILE).read_bytes())


def encode_index(index: ArchitectureIndex) -> bytes:
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
        "sketch": _text(b"".join(_pack_sketch(entry.sketch) for entry in index.entries)),
    }
    for i, level in enumerate(DIGEST_LEVELS):
        content[level] = _text(struct.pack(f"<{count}I", *(entry.digests[i] for entry in index.entries)))
    return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


def decode_index(data: bytes) -> ArchitectureIndex:
    """The index that ``encode_index`` wrote."""
    content = json.loads(gzip.decompress(data))
    names: Sequence[str] = content["architectures"]
    heads, stems = [[tuple(keys) for keys in content[name]] for name in ("heads", "stems")]
    columns = (struct.unpack(f"<{len(names)}I", base64.b64decode(content[level])) for level in DIGEST_LEVELS)
    sketches, width = base64.b64decode(content["sketch"]), SKETCH_BUCKETS // 2
    rows = zip(names, zip(*columns, strict=True), content["head"], content["stem"], content["size"], strict=True)
    entries = (
        IndexEntry(name, own, heads[head], stems[stem], _unpack_sketch(sketches[i * width : (i + 1) * width]), size)
        for i, (name, own, head, stem, size) in enumerate(rows)
    )
    return ArchitectureIndex(content["versions"], tuple(entries))


def _digest(part: ModelPart, level: Level, head: Keys, stem: Keys) -> int:
    match level:
        case "full":
            return part.full_digest
        case "body":
            return part.body_digest(head)
        case "trunk":
            return part.trunk_digest(head)
        case "frame":
            return part.frame_digest(head, stem)


def _likeness(part: ModelPart, entry: IndexEntry) -> float:
    alike = sum(a == b for a, b in zip(part.sketch, entry.sketch, strict=True))
    apart = abs(math.log2((1 + part.size(entry.head)) / (1 + entry.size)))
    return (alike - _SIZE_WEIGHT * min(apart, 2.0)) / SKETCH_BUCKETS


def _pack_sketch(sketch: bytes) -> bytes:
    """Two buckets of four bits a byte."""
    return bytes(high << 4 | low for high, low in zip(sketch[::2], sketch[1::2], strict=True))


def _unpack_sketch(packed: bytes) -> bytes:
    return bytes(half for byte in packed for half in (byte >> 4, byte & 15))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
