"""Mix samples that arrive in the order of their storage, without reading all of them first."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

from ckpt_tools.data.sample_order import balanced_batch_sizes

__all__ = ["batch_evenly", "interleave_sources", "shuffle_within_buffer"]

T = TypeVar("T")

# A source is read ahead by a group of up to so many items, or of up to so much weight (bytes).
_GROUP_ITEMS = 16
_GROUP_WEIGHT = 2**24


def interleave_sources(
    sources: Iterable[Iterator[T]],
    together: int,
    pool: Executor | None = None,
    weight: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yield one item of each of ``together`` sources in turn; the next replaces one that ends.

    With a ``pool``, every source is read ahead in a thread, by a group of items whose total
    ``weight`` is bounded. The order is the same with and without a pool.
    """
    waiting = iter(sources)
    active = deque(
        _start_reading(source, pool, weight) for _, source in zip(range(together), waiting, strict=False)
    )
    while active:
        source = active.popleft()
        for item in source:
            active.append(source)
            yield item
            break
        else:  # this source has ended
            for next_source in waiting:
                active.appendleft(_start_reading(next_source, pool, weight))
                break


def shuffle_within_buffer(
    items: Iterable[T], seed: int, *, max_items: int, weight: Callable[[T], int], max_weight: int
) -> Iterator[T]:
    """Yield the items in a random order, as far as a buffer allows: each is drawn from the buffer.

    The buffer holds up to ``max_items`` items, or fewer if their total ``weight`` would be more
    than ``max_weight``.
    """
    generator = random.Random(seed)
    buffer: list[T] = []
    total = 0
    for item in items:
        buffer.append(item)
        total += weight(item)
        while len(buffer) > max_items or (total > max_weight and len(buffer) > 1):
            # Swapping with the last item makes removal cheap: pop() moves no other item.
            place = generator.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            total -= weight(buffer[-1])
            yield buffer.pop()
    generator.shuffle(buffer)
    yield from buffer


def batch_evenly(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield batches of ``size`` items, of which the last two differ by at most one.

    A small last batch would distort a batch variance. The number of items is not known in advance,
    so two batches are held back to be divided evenly at the end.
    """
    buffer: list[T] = []
    for item in items:
        buffer.append(item)
        if len(buffer) == 2 * size:
            yield buffer[:size]
            buffer = buffer[size:]
    start = 0
    for count in balanced_batch_sizes(len(buffer), size):
        yield buffer[start : start + count]
        start += count


def _start_reading(source: Iterator[T], pool: Executor | None, weight: Callable[[T], int]) -> Iterator[T]:
    if pool is None:
        return source
    # The first group is requested at once: a generator would wait until it is asked for an item.
    return _read_in_groups(source, pool, weight, pool.submit(_read_group, source, weight))


def _read_in_groups(
    source: Iterator[T], pool: Executor, weight: Callable[[T], int], pending: Future[list[T]]
) -> Iterator[T]:
    while group := pending.result():
        pending = pool.submit(_read_group, source, weight)
        yield from group


def _read_group(source: Iterator[T], weight: Callable[[T], int]) -> list[T]:
    group: list[T] = []
    total = 0
    for item in source:
        group.append(item)
        total += weight(item)
        if len(group) == _GROUP_ITEMS or total > _GROUP_WEIGHT:
            break
    return group
