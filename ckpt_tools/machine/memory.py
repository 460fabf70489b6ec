"""How much memory a new allocation can count on, and how large a batch fits into it."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")  # where a container finds its limits (control groups, version 2)
_FALLBACK_BYTES = 4 * 2**30  # macOS and Windows have no /proc/meminfo
_NO_LIMIT = 2**62

# The bias of the estimator `pooled` falls like 1/batch. Beyond this size, sampling error dominates.
LARGEST_BATCH_SIZE = 512
# The part of the free memory that activations may take. Convolution workspaces and the slack of the
# allocator come on top of them.
_ACTIVATION_SHARE = 0.25

_processes = 1  # so many share the machine's memory


def share_memory(processes: int) -> None:
    """Let this process count on its part of the memory: so many like it run on this machine."""
    global _processes
    _processes = processes


def available_bytes() -> int:
    """Return how many bytes of main memory this process may take.

    That is what is free, or can be freed, within the limit of the container, divided by the number
    of processes that share it.
    """
    return max(0, min(_machine_bytes(), _container_bytes())) // _processes


def _machine_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return _FALLBACK_BYTES
    # "MemAvailable:   12345 kB": free memory, and caches that the kernel would give up.
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes else _FALLBACK_BYTES


def _container_bytes() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = (_CGROUP / "memory.current").read_text().strip()
        return int(limit) - int(used)
    except (OSError, ValueError):  # there is no container, or its limit is "max"
        return _NO_LIMIT


def fitting_batch_size(bytes_per_sample: int, device: str, sharing: int = 1) -> int:
    """Return a batch size whose activations take up to a quarter of the free memory.

    It is a power of two from 2 to 512, so that a little more or less free memory does not change
    the result.

    Args:
        bytes_per_sample: memory of the activations of one sample that are alive at one time.
        device: where the batch is run.
        sharing: how many processes have such a batch each on that device. Together they take half
            of its free memory at most.
    """
    if bytes_per_sample <= 0:
        return LARGEST_BATCH_SIZE
    share = min(_ACTIVATION_SHARE, 0.5 / sharing)
    fitting = min(LARGEST_BATCH_SIZE, int(share * free_bytes(device)) // bytes_per_sample)
    # The largest power of two up to there; at least 2, because one sample cannot show a variance.
    return 1 << max(2, fitting).bit_length() - 1


def free_bytes(device: str) -> int:
    """Return the memory in bytes that a new allocation on ``device`` can count on."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()
