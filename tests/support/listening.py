"""Who listens where: the TCP servers of a process and of all that it started, from Linux's /proc."""

from __future__ import annotations

import contextlib
import ipaddress
import struct
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
_LISTEN = "0A"  # TCP_LISTEN in the kernel's include/net/tcp_states.h


def family(root: int) -> set[int]:
    """The numbers of a process and of its descendants."""
    parents: dict[int, int] = {}
    for status in PROC.glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            parents[int(fields["Pid"])] = int(fields["PPid"])
    members = {root}
    while more := {child for child, parent in parents.items() if parent in members} - members:
        members |= more
    return members


def servers(processes: set[int]) -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """The command and the address of every TCP socket on which one of the processes listens."""
    owners: dict[str, int] = {}
    for process in processes:
        with contextlib.suppress(OSError):
            for link in (PROC / str(process) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    owners[str(link.readlink())] = process
    for table in (PROC / "net/tcp", PROC / "net/tcp6"):
        for row in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = row.split()
            owner = owners.get(f"socket:[{fields[9]}]")
            if fields[3] == _LISTEN and owner is not None:
                yield (PROC / str(owner) / "comm").read_text().strip(), _address(fields[1].partition(":")[0])


def _address(digits: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The kernel prints words of 32 bits in the machine's own order of bytes."""
    words = (int(digits[at : at + 8], 16) for at in range(0, len(digits), 8))
    address = ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words))
    return getattr(address, "ipv4_mapped", None) or address
