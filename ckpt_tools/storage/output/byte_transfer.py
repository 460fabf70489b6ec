"""Bytes at given places of open files: read, written, and copied by the kernel."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from ckpt_tools.storage.tensor_bytes import PIECE_BYTES, ByteArray

__all__ = ["BLOCK_BYTES", "copy_range", "flush_in_background", "read_at", "write_at"]

# What the kernel moves at a time. Where source and target are apart by whole blocks, it fills large pages at once
# (1.4 times as fast on ext4), and file systems that can share blocks copy nothing.
BLOCK_BYTES = 1 << 16
_MOST = 1 << 28  # bytes a call, between which an interrupt gets through

# Answers that mean "not like this": other file systems, old kernels, containers that forbid a call.
_REFUSALS = frozenset(
    {
        errno.EXDEV,
        errno.ENOSYS,
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EBADF,
        errno.ENOTSOCK,
    }
)


def copy_range(source: int, target: int, count: int, *, at: int, to: int) -> None:
    """Copy ``count`` bytes from the place ``at`` of one open file to the place ``to`` of another.

    In the kernel, by the first way that it does not refuse, else through memory. Raises OSError.
    """
    ways = [_by_range, _by_sending, _through_memory]
    end = at + count
    while at < end:
        step = min(end - at, -at % BLOCK_BYTES or _MOST)
        moved = _try_copy(ways[0], source, target, step, at, to)
        if moved == 0 and len(ways) == 1:
            raise _truncated_file_error(at)
        if moved == 0:  # some file systems say 0 where they cannot
            ways.pop(0)
        at, to = at + moved, to + moved


def _try_copy(
    way: Callable[..., int], source: int, target: int, step: int, at: int, to: int
) -> int:
    try:
        return way(source, target, step, at, to)
    except OSError as error:
        if error.errno not in _REFUSALS or way is _through_memory:
            raise
        return 0


def _by_range(source: int, target: int, count: int, at: int, to: int) -> int:
    if not hasattr(os, "copy_file_range"):  # Linux has it
        return 0
    return os.copy_file_range(source, target, count, at, to)


def _by_sending(source: int, target: int, count: int, at: int, to: int) -> int:
    os.lseek(target, to, os.SEEK_SET)
    return os.sendfile(target, source, at, count)


def _through_memory(source: int, target: int, count: int, at: int, to: int) -> int:
    return os.pwrite(target, os.pread(source, min(count, PIECE_BYTES), at), to)


def read_at(file: int, piece: ByteArray, at: int) -> None:
    """Fill ``piece`` from an open file. Raises OSError, also if the file ends before."""
    view = piece.data
    while view:
        count = os.preadv(file, [view], at)
        if count == 0:
            raise _truncated_file_error(at)
        view, at = view[count:], at + count


def write_at(file: int, data: memoryview | bytes, at: int) -> None:
    """Write all of ``data`` into an open file. Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, at)
        view, at = view[count:], at + count


@contextmanager
def flush_in_background(file: int) -> Iterator[Callable[[], None]]:
    """Have the disk work on what an open file has so far, in a thread, at each call of the result. Raises OSError."""
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:
        yield lambda: pending.append(pool.submit(os.fsync, file))
        for future in pending:
            future.result()  # the system tells of a failure once: the last sync would know of none


def _truncated_file_error(at: int) -> OSError:
    return OSError(errno.EIO, f"a file that ends at byte {at:,}, before its header says")
