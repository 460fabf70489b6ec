"""The errors of this package as a tree, with the exit code of the command line for each.

CkptToolsError                  1   a failure the user can act on
├── UsageError                  2   arguments that contradict each other or mean nothing
├── CheckpointError             1   a checkpoint file that cannot be read
├── ArchitectureError           1   an unknown architecture, or one that the checkpoint does not fit
│   └── AmbiguousArchitecture   1   … or several that it fits and that differ in function
├── ModelError                  1   a model that cannot be walked or run
├── DataError                   1   training data that cannot be used
├── OutputError                 1   an output that cannot be written
├── RankError                   1   a process of a distributed job that is gone
├── RemoteError                 1   a URL behind which nothing can be read
├── ClusterError                1   a cluster that cannot be reached or used, or has lost a worker
├── NothingToDo                 3   no running variance is wrong
└── CheckFailed                 4   a check or gate said no

Every message names the thing, what was expected, what was found, and the next step.
"""

from __future__ import annotations

import errno

__all__ = [
    "AmbiguousArchitecture",
    "ArchitectureError",
    "CheckFailed",
    "CheckpointError",
    "CkptToolsError",
    "ClusterError",
    "DataError",
    "ModelError",
    "NothingToDo",
    "OutputError",
    "RankError",
    "RemoteError",
    "UsageError",
]


class CkptToolsError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class UsageError(CkptToolsError):
    """Arguments that contradict each other or mean nothing."""

    exit_code = 2


class CheckpointError(CkptToolsError):
    """A checkpoint file that cannot be read."""


class ArchitectureError(CkptToolsError):
    """An unknown architecture, or one that the checkpoint does not fit."""


class AmbiguousArchitecture(ArchitectureError):
    """Several architectures fit a checkpoint and differ in function.

    ``candidates`` are written as ``--arch`` takes them.
    """

    def __init__(self, message: str, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.candidates = candidates


class ModelError(CkptToolsError):
    """A model that cannot be walked or run."""


class DataError(CkptToolsError):
    """Training data that cannot be used."""


class OutputError(CkptToolsError):
    """An output that cannot be written."""


class RankError(CkptToolsError):
    """A process of a distributed job that is gone, failed or cannot be reached."""


class RemoteError(CkptToolsError):
    """A URL behind which nothing can be read: no file, access, network, or package for it."""


class ClusterError(CkptToolsError):
    """A cluster that cannot be reached or used, or has lost a worker too often."""


class NothingToDo(CkptToolsError):
    """No running variance is wrong: no BatchNorm, or none behind dropout."""

    exit_code = 3


class CheckFailed(CkptToolsError):
    """A check or gate said no; nothing was changed."""

    exit_code = 4


# Words of torch, of CUDA's libraries, and of the dynamic linker.
_NO_MEMORY = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED", "failed to map segment")


def is_short_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, torch, or CUDA and its libraries says that memory ran out.

    torch has a class for CUDA alone; elsewhere it raises RuntimeError, so that its words must be
    compared.
    """
    # By name, since this module imports no torch.
    if {"MemoryError", "OutOfMemoryError"} & {kind.__name__ for kind in type(error).__mro__}:
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, (RuntimeError, ImportError)) and any(words in str(error) for words in _NO_MEMORY)
