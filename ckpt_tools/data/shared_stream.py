"""One stream of batches for several readers: each batch is decoded once and goes to every reader in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from torch import Tensor
from torch.utils._pytree import tree_map

from ckpt_tools.data.stream import Batch, BatchStream, SkippedSample

__all__ = ["Job", "read_together"]

Job = Callable[[BatchStream], None]
"""Reads a stream: a whole pass, a part of one, or several."""


def read_together(stream: BatchStream, jobs: Sequence[Job], watch: Callable[[int], None] | None = None) -> None:
    """Run jobs that read the same stream, pass by pass, as if each had it for itself; one job computes at a time.

    A job may stop within a pass, start further ones, and fail: the others go on, and what it raised is raised at
    the end. An error of the stream is raised in all that were reading. ``watch`` is told the samples of every batch
    that was handed out.
    """
    readers = [_Reader(stream, job) for job in jobs]
    try:
        for reader in readers:
            reader.resume_job(None)
        while waiting := [reader for reader in readers if reader.asks]:
            _pass(stream, waiting, watch)
    finally:
        for reader in readers:
            reader.abandon()
    for error in (reader.error for reader in readers if reader.error is not None):
        raise error


def _pass(stream: BatchStream, readers: Sequence[_Reader], watch: Callable[[int], None] | None) -> None:
    try:
        for batch in stream:
            for reader in readers:
                reader.resume_job(batch if len(readers) == 1 else _copy(batch))
            if watch is not None:
                watch(len(batch) if isinstance(batch, Tensor) else 0)
            readers = [reader for reader in readers if reader.asks == "batch"]
            if not readers:
                return
    except Exception as error:  # noqa: BLE001 - whatever the stream raised belongs to its readers
        end: object = error
    else:
        end = _END
    for reader in readers:
        reader.resume_job(end)


class _Reader:
    """A job in a thread of its own, and the stream it reads: it computes only while ``go_on`` waits for it."""

    def __init__(self, stream: BatchStream, job: Job) -> None:
        self.asks: Literal["pass", "batch"] | None = "pass"  # what the job waits for; None: it has ended
        self.error: BaseException | None = None
        self._stream = stream
        self._turn, self._rest = threading.Semaphore(0), threading.Semaphore(0)
        self._handed: object = None
        self._thread = threading.Thread(target=self._work, args=(job,), daemon=True)

    def resume_job(self, handed: object) -> None:
        """Hand over a batch, the end of a pass or an error, and wait until the job asks for more or has ended."""
        self._handed = handed
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        self._rest.acquire()

    def abandon(self) -> None:
        """End a job that has not ended, which takes it to its next batch."""
        if self._thread.ident is None:
            return
        self._handed = _Abandoned()
        self._turn.release()
        self._thread.join()

    def _work(self, job: Job) -> None:
        try:
            job(self)
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001 - raised where the jobs were started
            self.error = error
        finally:
            self.asks = None
            self._rest.release()

    def _wait(self, asks: Literal["pass", "batch"]) -> object:
        self.asks = asks
        self._rest.release()
        self._turn.acquire()
        handed = self._handed
        if isinstance(handed, BaseException):
            raise handed
        return handed

    @property
    def count(self) -> int | None:
        """Samples in one pass."""
        return self._stream.count

    @property
    def batch_count(self) -> int | None:
        """Batches in one pass."""
        return self._stream.batch_count

    @property
    def transform(self) -> str:
        """What is done to a stored sample, in words."""
        return self._stream.transform

    @property
    def skipped_samples(self) -> tuple[SkippedSample, ...]:
        """Samples that no pass so far could read."""
        return self._stream.skipped_samples

    def sample_name(self, batch: int, row: int) -> str:
        """What people call a sample of the pass under way."""
        return self._stream.sample_name(batch, row)

    def __iter__(self) -> Iterator[Batch]:
        """Takes part in the next pass."""
        handed = self._wait("pass")
        while handed is not _END:
            yield handed  # type: ignore[misc]
            handed = self._wait("batch")


_END = object()


class _Abandoned(BaseException):
    """Ends a job whose result nobody waits for any more."""


def _copy(batch: Batch) -> Batch:
    """Its own for each reader: a model may change its input in place."""
    copied: Batch = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
    return copied
