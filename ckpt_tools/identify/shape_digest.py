"""Digests of the keys and shapes of a state dict, as a whole and in parts.

A digest is the sum of a 64-bit hash of every (key, shape), modulo 2^64. It does not depend on the
order of the keys, and the digest of a part (without the head, without the stem) is a subtraction.
Counters of batches are left out, since old files lack them.
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

BATCH_COUNTER = "num_batches_tracked"  # Not saved before PyTorch 1.0.
# The first half of a sketch's buckets depends on keys and shapes, the second half on keys alone.
SKETCH_BUCKETS = 32

# A loss function that was an attribute of the training module is saved along with the model.
LOSS_ATTRIBUTES = frozenset(
    {"criterion.", "criterions.", "loss.", "losses.", "loss_fn.", "loss_func.", "loss_function."}
)

_MODULUS = 2**64
# With a smaller share of all tensors, what stands under a prefix is a layer and no model.
_MIN_SHARE = 0.25
_MAX_PREFIX_LENGTH = 3  # In attributes, as in `module.model.backbone.`.


def top_attribute(key: str) -> str:
    """Return the outermost module's attribute that a key lies under, with its dot.

    It is `head.` for `head.fc.weight`. A parameter of the outermost module itself (`cls_token`) has
    no dot.
    """
    first, dot, _ = key.partition(".")
    return first + dot


def top_attributes(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct top attributes of the keys, sorted."""
    return tuple(sorted({top_attribute(key) for key in keys}))


@dataclass(frozen=True)
class ModelPart:
    """The tensors under one prefix of a state dict. The keys of `shapes` are without the prefix."""

    prefix: str
    shapes: Shapes

    @cached_property
    def hashes(self) -> dict[str, int]:
        """The hash of every key with its shape, without counters of batches."""
        return {
            key: _hash(key, shape) for key, shape in self.shapes.items() if not key.endswith(BATCH_COUNTER)
        }

    @cached_property
    def full_digest(self) -> int:
        """The digest of all tensors."""
        return sum(self.hashes.values()) % _MODULUS

    def body_digest(self, head: Iterable[str]) -> int:
        """Return the digest without the keys of `head`, which may be absent."""
        return (self.full_digest - sum(self.hashes.get(key, 0) for key in head)) % _MODULUS

    def trunk_digest(self, tops: Iterable[str]) -> int:
        """Return the digest without the tensors under the top attributes `tops`.

        It also fits a model whose head was replaced by another one, with keys of its own.
        """
        sums, _ = self._sums_by_top
        return (self.full_digest - sum(sums[top] for top in tops)) % _MODULUS

    def frame_digest(self, tops: Collection[str], stem: Iterable[str]) -> int:
        """Return the digest of the tensors with two dimensions and more, without `tops` and `stem`.

        It does not change with the number of input channels, nor when BatchNorm is folded into the
        convolutions.
        """
        _, weight_sums = self._sums_by_top
        frame = sum(total for top, total in weight_sums.items() if top not in tops)
        for key in stem:
            if top_attribute(key) not in tops and len(self.shapes.get(key, ())) > 1:
                frame -= self.hashes[key]
        return frame % _MODULUS

    @cached_property
    def sketch(self) -> bytes:
        """Small numbers, SKETCH_BUCKETS of them, that mostly agree between similar state dicts.

        The method is min-hash with one permutation: each hash falls into a bucket, and each bucket
        keeps four bits of its smallest hash.
        """
        half = SKETCH_BUCKETS // 2
        minima = [_MODULUS] * SKETCH_BUCKETS
        for key, hash_with_shape in self.hashes.items():
            for number, offset in ((hash_with_shape, 0), (_hash(key, ()), half)):
                bucket = offset + number % half
                minima[bucket] = min(minima[bucket], number // half)
        return bytes(minimum % 16 for minimum in minima)

    def size(self, head: Iterable[str]) -> int:
        """Return the number of values in all tensors but those of `head`."""
        return self._size - sum(math.prod(self.shapes[key]) for key in head if key in self.hashes)

    @cached_property
    def _size(self) -> int:
        return sum(math.prod(self.shapes[key]) for key in self.hashes)

    @cached_property
    def _sums_by_top(self) -> tuple[Counter[str], Counter[str]]:
        """Sums of hashes by top attribute.

        The first counter sums over all tensors, the second over those with two dimensions or more.
        """
        sums: Counter[str] = Counter()
        weight_sums: Counter[str] = Counter()
        for key, value in self.hashes.items():
            sums[top_attribute(key)] += value
            if len(self.shapes[key]) > 1:
                weight_sums[top_attribute(key)] += value
        return sums, weight_sums


def split_into_parts(shapes: Shapes) -> Iterator[ModelPart]:
    """Yield the whole state dict, then each part under a prefix that may be a model of its own.

    The part with the most tensors comes first.
    """
    model = {key: s for key, s in shapes.items() if top_attribute(key) not in LOSS_ATTRIBUTES}
    yield ModelPart("", model)
    counts = Counter(prefix for key in shapes for prefix in _prefixes(key))
    for prefix, count in counts.most_common():
        if count >= _MIN_SHARE * len(shapes):
            part = {key.removeprefix(prefix): s for key, s in shapes.items() if key.startswith(prefix)}
            yield ModelPart(prefix, part)


def _prefixes(key: str) -> Iterator[str]:
    names = key.split(".", _MAX_PREFIX_LENGTH)
    for depth in range(1, len(names)):
        yield ".".join(names[:depth]) + "."


def _hash(key: str, shape: Shape) -> int:
    text = f"{key}:{','.join(map(str, shape))}"
    # A key of a hostile file may hold lone surrogates, which UTF-8 refuses otherwise.
    encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(encoded, digest_size=8).digest(), "big")
