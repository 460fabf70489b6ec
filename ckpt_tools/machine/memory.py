"""Memory that a new allocation can count on."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["available_bytes", "share_memory"]

_CGROUP = Path("/sys/fs/cgroup")


_processes = 1  # that count on the same memory


def share_memory(processes: int) -> None:
    """From now on this process counts on its part only: so many like it run on this machine."""
    global _processes
    _processes = processes


def available_bytes() -> int:
    """Bytes of main memory that this process may take: free or can be freed, within the container's limit, shared."""
    return max(0, min(_of_the_machine(), _of_the_container())) // _processes


def _of_the_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4 * 2**30  # no /proc: macOS, Windows


def _of_the_container() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = (_CGROUP / "memory.current").read_text().strip()
        return int(limit) - int(used)
    except (OSError, ValueError):
        return 2**62  # no limit is set


LARGEST_BATCH_SIZE = 512  # the bias of `pooled` falls like 1/batch; beyond this, sampling error dominates


_SHARE = 0.25  # of the free memory; convolution workspaces and allocator slack come on top of activations


def fitting_batch_size(bytes_per_sample: int, device: str, sharing: int = 1) -> int:
    """The largest power of two up to 512 as batch whose live activations take a quarter of the free memory.

    A power of two, so that a little more or less free memory on ``device`` does not change the result.
    ``sharing``: processes with such a batch each on that device; together they take half of it at most.
    """
    if bytes_per_sample <= 0:
        return LARGEST_BATCH_SIZE
    share = min(_SHARE, 0.5 / sharing)
    fitting = min(LARGEST_BATCH_SIZE, int(share * free_bytes(device)) // bytes_per_sample)
    return 1 << max(2, fitting).bit_length() - 1


def free_bytes(device: str) -> int:
    """Memory that a new allocation on ``device`` can count on; for the CPU also within the container's limit."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()
