"""Several processes that work on one job: which of them this is, and how they act as one.

torchrun tells every process its rank. Batches are dealt out like cards: rank r takes the batches r,
r + world, …, and the ranks exchange what they have learned in rounds. Rank 0 decides whatever could
come out differently from machine to machine (free memory, when to stop), and an error on one rank
is raised on all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ckpt_tools.errors import CkptToolsError, RankError, UsageError
from ckpt_tools.redaction import without_fragments

__all__ = ["ALONE", "Processes", "Ranks", "Team", "join_team", "start_team"]

T = TypeVar("T")

_START_TIMEOUT = timedelta(minutes=10)
# Between two rounds lies a pass, which lasts as long as the slowest rank needs. The limit may be
# generous: a rank that died is noticed at once by its closed connections.
_ROUND_TIMEOUT = timedelta(days=7)
_FAILED, _PRINTED = "failed", "printed"  # keys of the store


@dataclass(frozen=True)
class Ranks:
    """Rank of this process and number of processes, in the job and on this machine (``local``)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read what torchrun has set; without its variables this process is alone.

        Raises UsageError for values that are no numbers or contradict each other.
        """
        if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
            return cls()
        variables = {name: os.environ.get(name, default) for name, default in _VARIABLES.items()}
        try:
            ranks = cls(*map(int, variables.values()))
        except ValueError:
            ranks = cls(-1)
        is_inside_job = 0 <= ranks.rank < ranks.world
        if not (is_inside_job and 0 <= ranks.local_rank < ranks.local_world <= ranks.world):
            settings = ", ".join(f"{name}={value}" for name, value in variables.items())
            raise UsageError(
                f"the environment says {settings}; expected ranks from 0 and sizes above them. "
                "Start with torchrun, or unset RANK for one process."
            )
        return ranks


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


class Team:
    """The processes of one job, seen from one of them.

    This base class is a process that works alone, so that callers need not tell the two cases
    apart.
    """

    rank = 0
    world = 1

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world == 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    @property
    def has_failed(self) -> bool:
        """Whether some rank has failed, so that the others may stop."""
        return False

    def all(self, work: Callable[[], T]) -> list[T]:
        """Call ``work`` on every rank, and return all results on each, in the order of ranks.

        If it fails on some ranks, the error of the first one is raised on all. Raises RankError if
        a rank is gone. Results are pickled on their way.
        """
        return [work()]

    def each(self, work: Callable[[], T]) -> T:
        """Call ``work`` on every rank and return the own result, which need not be picklable.

        Errors are raised as by ``all``.
        """
        results: list[T] = []
        self.all(lambda: results.append(work()))
        return results[0]

    def first(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0, and return its result, or raise its error, on all."""
        results = self.all(lambda: work() if self.rank == 0 else None)
        return cast(T, results[0])

    def gather(self, part: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which must have the same shape and type."""
        return [part]

    def tally(self, counter: str, amount: int) -> int:
        """Add to a counter that all ranks share, and return its new value without waiting."""
        return amount


ALONE = Team()


@dataclass(frozen=True)
class _Answer:
    """The result or the error that one rank contributes to an exchange."""

    result: object
    error: CkptToolsError | None


class Processes(Team):
    """The processes of a group of torch.distributed.

    Python objects go over gloo, whatever backend the group has, since gloo notices a dead process
    at once. Tensors on a GPU go over nccl where the group has it, right after an exchange of
    objects has shown that all ranks are there.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._store = group, group.get_group_store()
        self._nccl = "nccl" in dist.get_backend_config()

    @property
    def has_failed(self) -> bool:
        """Whether some rank has failed.

        This asks the store, which takes 0.1 ms.
        """
        with _rank_errors():
            return bool(self._store.check([_FAILED]))

    def all(self, work: Callable[[], T]) -> list[T]:
        """See Team."""
        failure: Exception | None = None
        answer = _Answer(None, None)
        try:
            answer = _Answer(work(), None)
        except Exception as error:  # noqa: BLE001 - every rank must learn of it
            failure, answer = error, _Answer(None, self._error_for_others(error))
            with _rank_errors():
                self._store.set(_FAILED, "")
        answers = self._exchange(answer)
        for rank, answer in enumerate(answers):
            if answer.error is not None:
                # The failing rank raises the original, which has the traceback.
                raise failure if failure is not None and rank == self.rank else answer.error
        return [cast(T, answer.result) for answer in answers]

    def gather(self, part: Tensor) -> list[Tensor]:
        """See Team. The tensors are on the CPU unless they came over nccl."""
        nccl = part.is_cuda and self._nccl
        part = part if nccl else part.cpu()
        parts = [torch.empty_like(part) for _ in range(self.world)]
        with _rank_errors():
            dist.all_gather(parts, part, group=None if nccl else self._group)
        return parts

    def tally(self, counter: str, amount: int) -> int:
        """See Team."""
        with _rank_errors():
            return int(self._store.add(counter, amount))

    def announce_printed(self) -> None:
        """Tell the other ranks that the error they share has been printed."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_PRINTED, "")

    def wait_until_printed(self) -> None:
        """Wait up to 10 s for ``announce_printed``.

        A rank that leaves first may take the others down.
        """
        with contextlib.suppress(RuntimeError):
            self._store.wait([_PRINTED], timedelta(seconds=10))

    def _exchange(self, answer: _Answer) -> list[_Answer]:
        answers: list[_Answer] = [answer] * self.world
        with _rank_errors():
            dist.all_gather_object(answers, answer, group=self._group)
        return answers

    def _error_for_others(self, error: Exception) -> CkptToolsError:
        """Return an error that can be pickled and means something to the other ranks."""
        if isinstance(error, CkptToolsError):
            return error
        reason = without_fragments(f"{type(error).__name__}: {error}")
        return RankError(
            f"rank {self.rank} failed with {reason}. This is a bug of ckpt-fix, or of the code that "
            "makes the data."
        )


@contextlib.contextmanager
def _rank_errors() -> Iterator[None]:
    """Raise RankError for what torch.distributed raises in the block."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RankError(
            f"a process of this job is gone or cannot be reached ({reason}). "
            "See what torchrun says about the first failure, and start again."
        ) from error


@contextlib.contextmanager
def start_team(ranks: Ranks, *, cuda: bool) -> Iterator[Team]:
    """Connect the processes that torchrun has started, for as long as the block lasts.

    ``cuda``: this rank computes on the GPU that has its local rank as its number. Raises RankError.
    """
    if ranks.world == 1:
        yield ALONE
        return
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
    with _rank_errors():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_START_TIMEOUT)
    try:
        with join_team() as team:
            yield team
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def join_team() -> Iterator[Team]:
    """Make a team of the processes in the default process group, each of which must call this.

    Raises UsageError if there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError(
            "distributed=True needs a process group, and there is none. "
            "Call torch.distributed.init_process_group first, in every process."
        )
    if dist.get_world_size() == 1:
        yield ALONE
        return
    with _rank_errors():
        group = dist.new_group(backend="gloo", timeout=_ROUND_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)  # others than members get a placeholder
    try:
        yield Processes(group)
    finally:
        dist.destroy_process_group(group)
