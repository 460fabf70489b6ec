"""SHA-256 in a thread of its own, beside other work on the same bytes."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from ckpt_tools.storage.output.byte_transfer import read_at
from ckpt_tools.storage.tensor_bytes import PIECE_BYTES, ByteArray

__all__ = ["hash_and_check", "hash_in_background"]

# With one buffer the thread that reads and the one that hashes would wait for each other at every
# piece.
_BUFFERS = 4


@contextmanager
def hash_in_background(file: int, digest: str = "", start: int = 0) -> Iterator[Callable[[], str]]:
    """Start hashing an open file from ``start`` on, and give a function that waits for the digest.

    If ``digest`` is given, nothing is read. Leaving the block early ends the work.
    """
    if digest:
        yield lambda: digest
        return
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(_hash_file, file, start, stop)
        try:
            yield future.result
        finally:
            # The pool waits for its thread, which would otherwise hash the file to its end.
            stop.set()


def _hash_file(file: int, at: int, stop: threading.Event) -> str:
    digest, piece = hashlib.sha256(), bytearray(PIECE_BYTES)
    while not stop.is_set() and (count := os.preadv(file, [piece], at)):
        digest.update(memoryview(piece)[:count])
        at += count
    return digest.hexdigest()


def hash_and_check(file: int, size: int, check: Callable[[int, ByteArray], None]) -> str:
    """Return the SHA-256 of an open file of ``size`` bytes.

    ``check`` gets the place and the bytes of each piece meanwhile; the bytes are overwritten later.
    The memory that this takes does not depend on the size. Raises OSError, and whatever ``check``
    raises.
    """
    digest = hashlib.sha256()
    buffers = [np.empty(min(PIECE_BYTES, size), np.uint8) for _ in range(_BUFFERS)]
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for number, start in enumerate(range(0, size, PIECE_BYTES)):
            # The oldest piece must be hashed before its buffer is filled again.
            if len(pending) == _BUFFERS - 1:
                pending.popleft().result()
            piece = buffers[number % _BUFFERS][: size - start]
            read_at(file, piece, start)
            pending.append(pool.submit(digest.update, piece.data))
            check(start, piece)
        for future in pending:
            future.result()
    return digest.hexdigest()
