"""Share one stream of batches among several readers.

Each batch is decoded once and handed to every reader in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from torch import Tensor
from torch.utils._pytree import tree_map

from ckpt_tools.data.stream import Batch, BatchStream, SkippedSample

__all__ = ["Job", "read_together"]

Job = Callable[[BatchStream], None]
"""A function that reads a stream: one pass, a part of one, or several."""


def read_together(
    stream: BatchStream, jobs: Sequence[Job], watch: Callable[[int], None] | None = None
) -> None:
    """Run jobs that read the same stream, as if each had a stream of its own.

    The jobs go through the stream pass by pass, and one job computes at a time. A job may stop
    within a pass, start further passes, and fail: the other jobs go on, and its error is raised at
    the end. An error of the stream is raised in all jobs that were reading. ``watch`` is called
    with the number of samples in every batch that was handed out.
    """
    readers = [_Reader(stream, job) for job in jobs]
    try:
        for reader in readers:
            reader.resume_job(None)
        while waiting := [reader for reader in readers if reader.waits_for]:
            _run_pass(stream, waiting, watch)
    finally:
        for reader in readers:
            reader.abandon()
    for error in (reader.error for reader in readers if reader.error is not None):
        raise error


def _run_pass(stream: BatchStream, readers: Sequence[_Reader], watch: Callable[[int], None] | None) -> None:
    try:
        for batch in stream:
            for reader in readers:
                # The only reader of a batch may change it.
                reader.resume_job(batch if len(readers) == 1 else _copy(batch))
            if watch is not None:
                watch(len(batch) if isinstance(batch, Tensor) else 0)
            # The others have ended, or have broken off this pass and wait for the next.
            readers = [reader for reader in readers if reader.waits_for == "batch"]
            if not readers:
                return
    except Exception as error:  # noqa: BLE001 - the error of a stream is raised in its readers
        end: object = error
    else:
        end = _END
    for reader in readers:
        reader.resume_job(end)


class _Reader:
    """A job in a thread of its own, and the stream that the job reads.

    The job computes only while ``resume_job`` waits for it.
    """

    def __init__(self, stream: BatchStream, job: Job) -> None:
        self.waits_for: Literal["pass", "batch"] | None = "pass"  # None once the job has ended
        self.error: BaseException | None = None
        self.count, self.batch_count, self.transform = stream.count, stream.batch_count, stream.transform
        self._stream = stream
        # The caller releases the first to let the job compute, the job the second when it waits.
        self._may_compute, self._is_waiting = threading.Semaphore(0), threading.Semaphore(0)
        self._message: object = None  # a batch, the end of a pass, or an error
        self._thread = threading.Thread(target=self._work, args=(job,), daemon=True)

    def resume_job(self, message: object) -> None:
        """Hand over a batch, the end of a pass or an error.

        Returns when the job waits for more, or has ended.
        """
        self._message = message
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._may_compute.release()
        self._is_waiting.acquire()

    def abandon(self) -> None:
        """End a job, if it has not ended, by raising an exception where it waits for a batch."""
        if self._thread.ident is None:
            return
        self._message = _Abandoned()
        self._may_compute.release()
        self._thread.join()

    def _work(self, job: Job) -> None:
        try:
            job(self)
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001 - raised where the jobs were started
            self.error = error
        finally:
            self.waits_for = None
            self._is_waiting.release()

    def _wait(self, waits_for: Literal["pass", "batch"]) -> object:
        self.waits_for = waits_for
        self._is_waiting.release()
        self._may_compute.acquire()
        if isinstance(self._message, BaseException):
            raise self._message
        return self._message

    @property
    def skipped_samples(self) -> tuple[SkippedSample, ...]:
        """The samples that could not be read so far."""
        return self._stream.skipped_samples

    @property
    def rows_are_samples(self) -> bool:
        """Whether the rows of a batch are independent samples."""
        return self._stream.rows_are_samples

    def sample_name(self, batch: int, row: int) -> str:
        """Return the name of a sample of the current pass as messages show it."""
        return self._stream.sample_name(batch, row)

    def __iter__(self) -> Iterator[Batch]:
        """Take part in the next pass."""
        message = self._wait("pass")
        while message is not _END:
            yield message  # type: ignore[misc]
            message = self._wait("batch")


_END = object()


class _Abandoned(BaseException):
    """Ends a job whose result is no longer needed.

    It is no Exception, so that a job which handles those does not stop it.
    """


def _copy(batch: Batch) -> Batch:
    # Every reader gets tensors of its own, because a model may change its input in place.
    copied: Batch = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
    return copied
