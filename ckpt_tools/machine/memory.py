"""Memory that a new allocation can count on."""

from __future__ import annotations

from pathlib import Path

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
