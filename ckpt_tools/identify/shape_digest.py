"""What the names and shapes of a state dict add up to, as a whole and in parts.

A digest is the sum of a 64-bit hash of every (key, shape), modulo 2^64: independent of the order, and the digest of
a part (without the head, without the stem) is a subtraction. Counters never count: old files lack them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

BATCH_COUNTER = "num_batches_tracked"  # not saved before PyTorch 1.0
SKETCH_BUCKETS = 32  # of a sketch; the first half looks at keys and shapes, the second at keys alone

LOSS_ATTRIBUTES = frozenset(
    {"criterion.", "criterions.", "loss.", "losses.", "loss_fn.", "loss_func.", "loss_function."}
)

_MODULUS = 2**64
_MAIN_SHARE = 0.25  # of all tensors: what stands under a prefix is a model of its own, not one of its layers
_DEEPEST = 3  # attributes in front of a model


def top_attribute(key: str) -> str:
    """The attribute of the outermost module that a key lies under, with its dot: ``head.`` for ``head.fc.weight``."""
    first, dot, _ = key.partition(".")
    return first + dot


def top_attributes(keys: Iterable[str]) -> tuple[str, ...]:
    """The distinct ones of ``top_attribute``, sorted."""
    return tuple(sorted({top_attribute(key) for key in keys}))


@dataclass(frozen=True)
class ModelPart:
    """The keys and shapes that stand under one prefix, without it."""

    prefix: str
    shapes: Shapes

    @cached_property
    def hashes(self) -> dict[str, int]:
        """The hash of every key with its shape."""
        return {key: _hash(key, shape) for key, shape in self.shapes.items() if not key.endswith(BATCH_COUNTER)}

    @cached_property
    def full_digest(self) -> int:
        """The digest of everything."""
        return sum(self.hashes.values()) % _MODULUS

    def body_digest(self, head: Iterable[str]) -> int:
        """The digest without the keys ``head``, which may be absent."""
        return (self.full_digest - sum(self.hashes.get(key, 0) for key in head)) % _MODULUS

    def trunk_digest(self, tops: Iterable[str]) -> int:
        """The digest without everything under the attributes ``tops``."""
        return (self.full_digest - sum(self._under_tops[0].get(top, 0) for top in tops)) % _MODULUS

    def frame_digest(self, tops: Collection[str], stem: Iterable[str]) -> int:
        """The digest of the tensors with two dimensions and more, without ``tops`` and the keys ``stem``.

        It survives another number of input channels, and BatchNorm folded into convolutions.
        """
        inner = (key for key in stem if top_attribute(key) not in tops and len(self.shapes.get(key, ())) > 1)
        less = sum(self._under_tops[1].get(top, 0) for top in tops) + sum(self.hashes[key] for key in inner)
        return (self._wide - less) % _MODULUS

    @cached_property
    def sketch(self) -> bytes:
        """``SKETCH_BUCKETS`` small numbers that mostly agree between similar state dicts (one-permutation min-hash)."""
        half = SKETCH_BUCKETS // 2
        least = [_MODULUS] * SKETCH_BUCKETS
        for key, value in self.hashes.items():
            for number, offset in ((value, 0), (_hash(key, ()), half)):
                bucket = offset + number % half
                least[bucket] = min(least[bucket], number // half)
        return bytes(value % 16 for value in least)

    def size(self, head: Iterable[str]) -> int:
        """The number of values without the keys ``head``."""
        return self._size - sum(math.prod(self.shapes[key]) for key in head if key in self.hashes)

    @cached_property
    def _size(self) -> int:
        return sum(math.prod(self.shapes[key]) for key in self.hashes)

    @cached_property
    def _wide(self) -> int:
        return sum(self._under_tops[1].values())

    @cached_property
    def _under_tops(self) -> tuple[Counter[str], Counter[str]]:
        """Sums by top attribute: of all tensors, and of those with two dimensions and more."""
        every: Counter[str] = Counter()
        wide: Counter[str] = Counter()
        for key, value in self.hashes.items():
            every[top_attribute(key)] += value
            if len(self.shapes[key]) > 1:
                wide[top_attribute(key)] += value
        return every, wide


def split_into_parts(shapes: Shapes) -> Iterator[ModelPart]:
    """The whole, and what stands under each prefix that may hold a model of its own, the largest first."""
    yield ModelPart("", {key: shape for key, shape in shapes.items() if top_attribute(key) not in LOSS_ATTRIBUTES})
    counts: Counter[str] = Counter()
    for key in shapes:
        for prefix in _prefixes(key):
            counts[prefix] += 1
    for prefix, count in counts.most_common():
        if count >= _MAIN_SHARE * len(shapes):
            yield ModelPart(
                prefix, {key.removeprefix(prefix): s for key, s in shapes.items() if key.startswith(prefix)}
            )


def _prefixes(key: str) -> Iterator[str]:
    names = key.split(".", _DEEPEST)
    for depth in range(1, len(names)):
        yield ".".join(names[:depth]) + "."


def _hash(key: str, shape: Shape) -> int:
    text = f"{key}:{','.join(map(str, shape))}"
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
