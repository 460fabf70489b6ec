"""Keep the memory of freed activations for the next batch, where malloc is glibc's.

By default glibc hands every large tensor back to the kernel as soon as it is freed. A forward pass
then spends a quarter of its time on page faults (ResNet-50, 32 images, 2 cores: 480,000 of them).

This tunes the allocator of the whole process, so it belongs to the command line and to the workers
of a cluster, whose processes are ours. No library call may enter it: the process is the caller's.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# Parameters of mallopt(3), https://man7.org/linux/man-pages/man3/mallopt.3.html
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_MMAP_MAX = 65536
# On 64 bits glibc raises its own mmap threshold up to here as large blocks are freed; the trim
# threshold is twice that.
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_lock = threading.Lock()
_users = 0


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory with the process for the block, and give it back to the kernel at its end.

    Blocks may be nested and may overlap in several threads: the last one to end gives the memory
    back. Afterwards glibc's thresholds no longer move by themselves; they stay where a few freed
    tensors would have brought them. Nothing happens without glibc, or where the environment tunes
    its malloc.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _stop_returning_memory()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _return_memory()


def _stop_returning_memory() -> None:
    glibc = _tunable_glibc()
    if glibc is None:
        return
    # mallopt freezes glibc's moving thresholds where they stand; one freed block brings them to
    # their end first.
    glibc.free(glibc.malloc(_LARGEST_MMAP_THRESHOLD))
    glibc.mallopt(_MMAP_MAX, 0)
    glibc.mallopt(_TRIM_THRESHOLD, -1)


def _return_memory() -> None:
    glibc = _tunable_glibc()
    if glibc is None:
        return
    glibc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
    glibc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
    glibc.malloc_trim(0)


@cache
def _tunable_glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc and the user has not tuned its malloc; None otherwise."""
    is_tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if is_tuned or platform.libc_ver()[0] != "glibc":
        return None
    glibc = ctypes.CDLL(None)
    # ctypes takes results for int by default, which would cut a pointer to 32 bits.
    glibc.malloc.restype, glibc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    glibc.free.restype, glibc.free.argtypes = None, [ctypes.c_void_p]
    return glibc
