"""Large temporary files: where they go, and what killed processes left of them."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
from pathlib import Path

__all__ = ["abandoned", "new_name", "roomy_folder", "sweep"]

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_NAME = re.compile(rf"\.?ckpt-tools-{_HOST}-(\d+)-(\d+)-[0-9a-f]+(\.tmp)?")


def roomy_folder() -> Path:
    """Where large temporary files go: /tmp often is memory, of which there is none left by then."""
    large = Path("/var/tmp")
    usable = "TMPDIR" not in os.environ and os.access(large, os.W_OK)
    return large if usable else Path(tempfile.gettempdir())


def sweep(root: Path) -> None:
    """Remove the folders that killed processes of this machine have left."""
    for path in root.glob("ckpt-tools-*"):
        if abandoned(path.name):
            shutil.rmtree(path, ignore_errors=True)


def new_name() -> str:
    """A name that tells the process that made it."""
    process = os.getpid()
    return f"ckpt-tools-{_HOST}-{process}-{_started(process) or 0}-{secrets.token_hex(4)}"


def abandoned(name: str) -> bool:
    """Whether a file or folder was made by a process of this machine that is no more."""
    match = _NAME.fullmatch(name)
    return match is not None and not _alive(int(match[1]), int(match[2]))


def _alive(process: int, started: int) -> bool:
    """Whether the process that started then is there; numbers are given again, soonest in containers."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is somebody else's
    return _started(process) in (started, None)


def _started(process: int) -> int | None:
    """When a process started, in ticks since the machine did; None where the system does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
