"""One stream for several readers: each sees what it would see alone, whatever the others do."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckpt_tools.data.shared_stream import read_together
from ckpt_tools.data.stream import BatchStream


class Counted:
    """A stream of five batches that counts what was made for it."""

    count, batch_count, transform, skipped = 10, 5, "none", ()

    def __init__(self, fails_at: int | None = None) -> None:
        self.made, self.fails_at = 0, fails_at

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(5):
            if number == self.fails_at:
                raise OSError("the disk is gone")
            self.made += 1
            yield torch.full((2,), float(number))


@settings(max_examples=40)
@given(plans=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=4))
def test_every_reader_sees_its_own_passes(plans: list[list[int]]) -> None:
    """A plan says how many batches a reader takes in each of its passes."""
    stream = Counted()
    seen: list[list[list[float]]] = [[] for _ in plans]

    def job(number: int, reading: BatchStream) -> None:
        for take in plans[number]:
            seen[number].append([float(batch[0]) for batch in itertools.islice(reading, take)])

    read_together(stream, [lambda reading, n=number: job(n, reading) for number in range(len(plans))])
    assert seen == [[list(map(float, range(min(take, 5)))) for take in plan] for plan in plans]


def test_a_pass_is_read_once_for_all_and_one_job_computes_at_a_time() -> None:
    stream, busy, counts = Counted(), threading.Lock(), []

    def job(reading: BatchStream) -> None:
        for _ in reading:
            assert busy.acquire(blocking=False)
            for _ in range(200):
                os.sched_yield()  # whoever else could run would
            busy.release()

    read_together(stream, [job] * 3, counts.append)
    assert stream.made == 5
    assert counts == [2] * 5


def test_one_may_change_its_batch() -> None:
    sums = []

    def job(reading: BatchStream) -> None:
        for batch in reading:
            sums.append(float(batch.sum()))
            batch.add_(100)

    read_together(Counted(), [job, job])
    assert sums == [value for number in range(5) for value in [2.0 * number] * 2]


def test_one_failure_stops_no_other_and_is_raised_at_the_end() -> None:
    seen = []

    def bad(reading: BatchStream) -> None:
        next(iter(reading))
        raise KeyError("bad")

    with pytest.raises(KeyError, match="bad"):
        read_together(Counted(), [bad, lambda reading: seen.extend(reading)])
    assert len(seen) == 5


def test_an_error_of_the_stream_reaches_all_that_read() -> None:
    caught = []

    def job(reading: BatchStream) -> None:
        try:
            list(reading)
        except OSError as error:
            caught.append(str(error))

    read_together(Counted(fails_at=2), [job, job, lambda reading: next(iter(reading))])
    assert caught == ["the disk is gone"] * 2


def test_an_interrupt_ends_all_jobs() -> None:
    ended = []

    def job(reading: BatchStream) -> None:
        try:
            for _ in reading:
                pass
        finally:
            ended.append(True)

    def interrupt(images: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_together(Counted(), [job, job], interrupt)
    assert ended == [True, True]
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]
