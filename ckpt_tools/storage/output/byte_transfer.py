"""Reading, writing and copying bytes at given places of open files, which need not be in order."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from ckpt_tools.storage.tensor_bytes import PIECE_BYTES, ByteArray

__all__ = ["BLOCK_BYTES", "copy_range", "flush_in_background", "read_at", "write_at"]

# Where source and target are apart by a multiple of this, the kernel fills large pages at once (1.4
# times as fast on ext4), and file systems that can share blocks copy nothing.
BLOCK_BYTES = 1 << 16
_MAX_CALL_BYTES = 1 << 28  # an interrupt gets through between two calls

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

    The kernel copies them, by the first system call that it does not refuse; if it refuses all,
    they go through memory. Raises OSError, also if the source ends before.
    """
    ways = [_copy_file_range, _send_file, _copy_through_memory]
    end = at + count
    while at < end:
        step = min(end - at, -at % BLOCK_BYTES or _MAX_CALL_BYTES)
        moved = _try_copy(ways[0], source, target, step, at, to)
        if moved == 0 and len(ways) == 1:
            raise _truncated_file_error(at)
        # Some file systems answer 0, and no error, where they cannot do it.
        if moved == 0:
            ways.pop(0)
        at, to = at + moved, to + moved


def _try_copy(way: Callable[..., int], source: int, target: int, step: int, at: int, to: int) -> int:
    try:
        return way(source, target, step, at, to)
    except OSError as error:
        if error.errno not in _REFUSALS or way is _copy_through_memory:
            raise
        return 0


def _copy_file_range(source: int, target: int, count: int, at: int, to: int) -> int:
    if not hasattr(os, "copy_file_range"):  # only Linux has it
        return 0
    return os.copy_file_range(source, target, count, at, to)


def _send_file(source: int, target: int, count: int, at: int, to: int) -> int:
    os.lseek(target, to, os.SEEK_SET)
    return os.sendfile(target, source, at, count)


def _copy_through_memory(source: int, target: int, count: int, at: int, to: int) -> int:
    return os.pwrite(target, os.pread(source, min(count, PIECE_BYTES), at), to)


def read_at(file: int, piece: ByteArray, at: int) -> None:
    """Fill ``piece`` with a file's bytes from ``at`` on. Raises OSError if it ends before."""
    view = piece.data
    while view:
        count = os.preadv(file, [view], at)
        if count == 0:
            raise _truncated_file_error(at)
        view, at = view[count:], at + count


def write_at(file: int, data: memoryview | bytes, at: int) -> None:
    """Write all of ``data`` into an open file, from the place ``at`` on. Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, at)
        view, at = view[count:], at + count


@contextmanager
def flush_in_background(file: int) -> Iterator[Callable[[], None]]:
    """Give a function that starts writing an open file's content to the disk, in a thread.

    Each call is for what the file holds by then. Raises OSError at the end if one of them failed.
    """
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:
        yield lambda: pending.append(pool.submit(os.fsync, file))
        for future in pending:
            # The system reports a failure once only: a sync after this one would know of none.
            future.result()


def _truncated_file_error(at: int) -> OSError:
    return OSError(errno.EIO, f"a file that ends at byte {at:,}, before its header says")
