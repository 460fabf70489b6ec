"""An index of the architectures of timm and torchvision, by digests of their keys and shapes.

The index only proposes. Each proposal is built by the installed library and compared with the
checkpoint key by key before it is accepted, so an outdated index or a chance match can do no harm.
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

from ckpt_tools.identify.shape_digest import (
    SKETCH_BUCKETS,
    ModelPart,
    Shapes,
    split_into_parts,
    top_attributes,
)

Level = Literal["full", "body", "trunk", "frame"]
Keys = tuple[str, ...]

DIGEST_LEVELS: tuple[Level, ...] = ("full", "body", "trunk", "frame")
_FILE = "index.json.gz"
# The index keeps half of each digest. Among 1,500 models, a chance match is one in three million.
_MASK = 2**32 - 1
_SIZE_WEIGHT = 2.0  # A factor of two in size counts as much as so many different sketch buckets.


@dataclass(frozen=True)
class IndexEntry:
    """One architecture of a library, in its default build.

    `head` are the keys that depend on the class count, `stem` those that depend on the input
    channels. The four digests stand in the order of DIGEST_LEVELS. `size` counts the values of all
    tensors but the head's.
    """

    architecture: str
    digests: tuple[int, ...]
    head: Keys
    stem: Keys
    sketch: bytes
    size: int


@dataclass(frozen=True)
class DigestMatch:
    """Architectures with the same digest, at this level, as the tensors under `prefix`."""

    prefix: str
    level: Level
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class SketchMatch:
    """An architecture whose sketch resembles that of the tensors under `prefix`.

    `likeness` is 1 for equal sketches and sizes, and falls with every difference.
    """

    prefix: str
    entry: IndexEntry
    likeness: float


@dataclass(frozen=True)
class ArchitectureIndex:
    """All entries, and the versions of the libraries that they were taken from."""

    versions: Mapping[str, str]
    entries: tuple[IndexEntry, ...]

    def find_matches(self, shapes: Shapes) -> Iterator[DigestMatch]:
        """Yield the architectures with equal digests.

        The whole state dict comes before its parts, and for each of them the strictest level comes
        first.
        """
        for part in split_into_parts(shapes):
            for level in DIGEST_LEVELS:
                architectures = dict.fromkeys(self._architectures(part, level))
                if architectures:
                    yield DigestMatch(part.prefix, level, tuple(architectures))

    def nearest_entries(self, shapes: Shapes, count: int) -> list[SketchMatch]:
        """Return the `count` entries with the most similar sketches, the most similar first."""
        best: dict[str, SketchMatch] = {}
        for part in split_into_parts(shapes):
            for entry in self.entries:
                match = SketchMatch(part.prefix, entry, _likeness(part, entry))
                previous = best.setdefault(entry.architecture, match)
                if previous.likeness < match.likeness:
                    best[entry.architecture] = match
        return sorted(best.values(), key=lambda match: -match.likeness)[:count]

    def _architectures(self, part: ModelPart, level: Level) -> Iterator[str]:
        for (head, stem), table in self._tables[level].items():
            yield from table.get(_digest(part, level, head, stem) & _MASK, ())

    @cached_property
    def _tables(self) -> dict[Level, dict[tuple[Keys, Keys], dict[int, list[str]]]]:
        """Architectures by level, by what the level leaves out (head, stem), and by digest.

        Few different heads and stems exist, so a look-up computes few digests of a state dict.
        """
        tables: dict[Level, dict[tuple[Keys, Keys], dict[int, list[str]]]] = defaultdict(dict)
        for entry in self.entries:
            left_out = _left_out(entry.head, entry.stem)
            for level, digest in zip(DIGEST_LEVELS, entry.digests, strict=True):
                table = tables[level].setdefault(left_out[level], defaultdict(list))
                table[digest].append(entry.architecture)
        return tables


def make_index_entry(
    architecture: str, shapes: Shapes, head: Iterable[str], stem: Iterable[str]
) -> IndexEntry:
    """Return the entry of one architecture, from the shapes of its default build."""
    part, head, stem = ModelPart("", shapes), tuple(sorted(head)), tuple(sorted(stem))
    left_out = _left_out(head, stem)
    digests = tuple(_digest(part, level, *left_out[level]) & _MASK for level in DIGEST_LEVELS)
    return IndexEntry(architecture, digests, head, stem, part.sketch, part.size(head))


@functools.cache
def load_shipped_index() -> ArchitectureIndex:
    """Return the index that comes with this package. `scripts/build_index.py` makes it."""
    return decode_index(files("ckpt_tools.identify").joinpath(_FILE).read_bytes())


def encode_index(index: ArchitectureIndex) -> bytes:
    """Write an index as gzipped JSON, with names as text and columns of numbers in base64."""
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
        "sketch": _base64_text(b"".join(_pack_sketch(entry.sketch) for entry in index.entries)),
    }
    for i, level in enumerate(DIGEST_LEVELS):
        column = struct.pack(f"<{count}I", *(entry.digests[i] for entry in index.entries))
        content[level] = _base64_text(column)
    # With `mtime=0` the header holds no time, so that the same index gives the same bytes.
    return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


def decode_index(data: bytes) -> ArchitectureIndex:
    """Read an index that `encode_index` wrote."""
    content = json.loads(gzip.decompress(data))
    architectures: Sequence[str] = content["architectures"]
    count, width = len(architectures), SKETCH_BUCKETS // 2
    heads, stems = [[tuple(keys) for keys in content[name]] for name in ("heads", "stems")]
    columns = [struct.unpack(f"<{count}I", base64.b64decode(content[level])) for level in DIGEST_LEVELS]
    sketches = base64.b64decode(content["sketch"])
    entries = tuple(
        IndexEntry(
            architecture,
            digests=tuple(column[i] for column in columns),
            head=heads[content["head"][i]],
            stem=stems[content["stem"][i]],
            sketch=_unpack_sketch(sketches[i * width : (i + 1) * width]),
            size=content["size"][i],
        )
        for i, architecture in enumerate(architectures)
    )
    return ArchitectureIndex(content["versions"], entries)


def _left_out(head: Keys, stem: Keys) -> dict[Level, tuple[Keys, Keys]]:
    """Return by level what its digest leaves out of the head and of the stem.

    "trunk" and "frame" leave out whole top attributes, not only the keys that depend on the class
    count.
    """
    tops = top_attributes(head)
    return {"full": ((), ()), "body": (head, ()), "trunk": (tops, ()), "frame": (tops, stem)}


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
    equal_buckets = sum(a == b for a, b in zip(part.sketch, entry.sketch, strict=True))
    size_difference = abs(math.log2((1 + part.size(entry.head)) / (1 + entry.size)))
    # Beyond a factor of four, the size counts no further.
    return (equal_buckets - _SIZE_WEIGHT * min(size_difference, 2.0)) / SKETCH_BUCKETS


def _pack_sketch(sketch: bytes) -> bytes:
    # A bucket has four bits, so two of them fill a byte.
    return bytes(high << 4 | low for high, low in zip(sketch[::2], sketch[1::2], strict=True))


def _unpack_sketch(packed: bytes) -> bytes:
    return bytes(half for byte in packed for half in (byte >> 4, byte & 15))


def _base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()
