"""Several processes, one job: which of them this is, and how they act as one.

torchrun tells every process its rank. Batches are dealt out like cards, rank r takes number r, r + world, …; what was
learned is exchanged in rounds. Whatever could come out differently from machine to machine (free memory, when to
stop) is rank 0's decision, and an error on one rank is raised on all.
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

__all__ = ["ALONE", "Processes", "Ranks", "Team", "connected", "joined"]

T = TypeVar("T")

_JOINING = timedelta(minutes=10)
# Between two rounds lies a pass, as long as the slowest rank needs for it. A rank that died is noticed at once, by
# its closed connections; nobody waits for this.
_PATIENCE = timedelta(days=7)
_FAILED, _SAID = "failed", "said"  # keys of the store


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is: in the whole job, and on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun said; one process alone where nobody said anything. Raises UsageError for nonsense."""
        if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
            return cls()
        said = {name: os.environ.get(name, default) for name, default in _VARIABLES.items()}
        try:
            found = cls(*map(int, said.values()))
        except ValueError:
            found = cls(-1)
        if not (0 <= found.rank < found.world and 0 <= found.local_rank < found.local_world <= found.world):
            raise UsageError(
                f"the environment says {', '.join(f'{name}={value}' for name, value in said.items())}; expected ranks "
                "from 0 and sizes above them. Start with torchrun, or unset RANK for one process."
            )
        return found


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


class Team:
    """The processes of one job, seen from one of them. This one is alone: what it does, all do."""

    rank = 0
    world = 1

    @property
    def alone(self) -> bool:
        """Whether nobody needs to be asked."""
        return self.world == 1

    @property
    def speaks(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    @property
    def interrupted(self) -> bool:
        """Whether some rank has failed, so that nobody need go on."""
        return False

    def all(self, work: Callable[[], T]) -> list[T]:
        """Every rank does it; everybody gets all results, in the order of ranks.

        If it fails on any rank, the error of the first one is raised on all. Raises RankError if a rank is gone.
        Results go through pickle.
        """
        return [work()]

    def each(self, work: Callable[[], T]) -> T:
        """Every rank does it and keeps its own result, which need not be picklable; errors as in ``all``."""
        kept: list[T] = []
        self.all(lambda: kept.append(work()))
        return kept[0]

    def first(self, work: Callable[[], T]) -> T:
        """Rank 0 does it, and all have its result, or its error."""
        results = self.all(lambda: work() if self.rank == 0 else None)
        return cast(T, results[0])

    def gather(self, part: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape and type."""
        return [part]

    def tally(self, what: str, amount: int) -> int:
        """Add to a count that all ranks share, without waiting for anybody; what it is now."""
        return amount


ALONE = Team()


@dataclass(frozen=True)
class _Answer:
    """What a rank has to say in an exchange."""

    result: object
    error: CkptToolsError | None


class Processes(Team):
    """The processes of a group of torch.distributed.

    Words go over gloo, whatever the group is: it notices a dead process at once. Tensors on a GPU go over nccl where
    the group has it, right after words have shown that everybody is there.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._store = group, group.get_group_store()
        self._nccl = "nccl" in dist.get_backend_config()

    @property
    def interrupted(self) -> bool:
        """Whether some rank has failed; asks the store, which takes 0.1 ms."""
        with _rank_errors():
            return bool(self._store.check([_FAILED]))

    def all(self, work: Callable[[], T]) -> list[T]:
        """As of every Team."""
        failure: Exception | None = None
        answer = _Answer(None, None)
        try:
            answer = _Answer(work(), None)
        except Exception as error:  # noqa: BLE001 - every rank must learn of it
            failure, answer = error, _Answer(None, self._told(error))
            with _rank_errors():
                self._store.set(_FAILED, "")
        answers = self._exchanged(answer)
        failed = next((rank for rank, one in enumerate(answers) if one.error is not None), None)
        if failed is None:
            return [cast(T, one.result) for one in answers]
        told = answers[failed].error
        assert told is not None
        raise failure if failure is not None and failed == self.rank else told

    def gather(self, part: Tensor) -> list[Tensor]:
        """As of every Team; the tensors are on the CPU unless they came over nccl."""
        nccl = part.is_cuda and self._nccl
        sent = part if nccl else part.cpu()
        parts = [torch.empty_like(sent) for _ in range(self.world)]
        with _rank_errors():
            dist.all_gather(parts, sent, group=None if nccl else self._group)
        return parts

    def tally(self, what: str, amount: int) -> int:
        """As of every Team."""
        with _rank_errors():
            return int(self._store.add(what, amount))

    def say(self) -> None:
        """Tell the others that what there was to say has been printed."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_SAID, "")

    def hear(self) -> None:
        """Wait a little until ``say`` was called: whoever leaves first may take the speaker down with it."""
        with contextlib.suppress(RuntimeError):
            self._store.wait([_SAID], timedelta(seconds=10))

    def _exchanged(self, answer: _Answer) -> list[_Answer]:
        answers: list[_Answer] = [answer] * self.world
        with _rank_errors():
            dist.all_gather_object(answers, answer, group=self._group)
        return answers

    def _told(self, error: Exception) -> CkptToolsError:
        if isinstance(error, CkptToolsError):
            return error
        what = without_fragments(f"{type(error).__name__}: {error}")
        return RankError(
            f"rank {self.rank} failed with {what}. This is a bug of ckpt-fix, or of the code that makes the data."
        )


@contextlib.contextmanager
def _rank_errors() -> Iterator[None]:
    """What torch.distributed raises, as RankError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RankError(
            f"a process of this job is gone or cannot be reached ({reason}). See what torchrun says about the first "
            "failure, and start again."
        ) from error


@contextlib.contextmanager
def connected(ranks: Ranks, *, cuda: bool) -> Iterator[Team]:
    """The team that torchrun has started, with a process group of its own for as long as the block lasts.

    ``cuda``: this rank computes on the GPU with its local number. Raises RankError.
    """
    if ranks.world == 1:
        yield ALONE
        return
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
    with _rank_errors():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_JOINING)
    try:
        with joined() as team:
            yield team
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """The team of the process group that exists; everyone in it must come here. Raises UsageError if there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError(
            "distributed=True needs a process group, and there is none. Call torch.distributed.init_process_group "
            "first, in every process."
        )
    if dist.get_world_size() == 1:
        yield ALONE
        return
    with _rank_errors():
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # as of everyone who is a member
    try:
        yield Processes(group)
    finally:
        dist.destroy_process_group(group)
