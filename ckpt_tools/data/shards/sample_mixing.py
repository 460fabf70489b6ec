"""Samples that come in the order of their storage, made as random as can be without reading all of them first."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

from ckpt_tools.data.sample_order import balanced_batch_sizes

__all__ = ["batch_evenly", "interleave_sources", "shuffle_within_buffer"]

T = TypeVar("T")


def interleave_sources(
    sources: Iterable[Iterator[T]],
    together: int,
    pool: Executor | None = None,
    weight: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """One item of each of ``together`` sources in turn; when one ends, the next takes its place.

    With a ``pool``, every source is read ahead by a lot in a thread; the order is the same. ``weight`` bounds a lot.
    """
    waiting = iter(sources)
    open_ = deque(_start_reading(source, pool, weight) for _, source in zip(range(together), waiting, strict=False))
    while open_:
        items = open_.popleft()
        for item in items:
            open_.append(items)
            yield item
            break
        else:
            for source in waiting:
                open_.appendleft(_start_reading(source, pool, weight))
                break


def shuffle_within_buffer(
    items: Iterable[T], seed: int, *, most: int, weight: Callable[[T], int], heaviest: int
) -> Iterator[T]:
    """The items, each in place of a random one of up to ``most`` that are held back, or ``heaviest`` in weight."""
    dice = random.Random(seed)
    held: list[T] = []
    total = 0
    for item in items:
        held.append(item)
        total += weight(item)
        while len(held) > most or (total > heaviest and len(held) > 1):
            place = dice.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            total -= weight(held[-1])
            yield held.pop()
    dice.shuffle(held)
    yield from held


def batch_evenly(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Batches of ``size``, of which the last two differ by at most one: a small one would distort its variance."""
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) == 2 * size:
            yield held[:size]
            held = held[size:]
    start = 0
    for count in balanced_batch_sizes(len(held), size):
        yield held[start : start + count]
        start += count


_LOT = 16  # items
_WEIGHT = 2**24


def _start_reading(source: Iterator[T], pool: Executor | None, weight: Callable[[T], int]) -> Iterator[T]:
    if pool is None:
        return source
    return _lots(source, pool, weight, pool.submit(_lot, source, weight))


def _lots(source: Iterator[T], pool: Executor, weight: Callable[[T], int], under_way: Future[list[T]]) -> Iterator[T]:
    while lot := under_way.result():
        under_way = pool.submit(_lot, source, weight)
        yield from lot


def _lot(source: Iterator[T], weight: Callable[[T], int]) -> list[T]:
    lot: list[T] = []
    total = 0
    for item in source:
        lot.append(item)
        total += weight(item)
        if len(lot) == _LOT or total > _WEIGHT:
            break
    return lot
