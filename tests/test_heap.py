"""Freed memory is kept during a pass, and only then."""

import os
import resource
import threading

import pytest
import torch

from ckpt_tools.reestimate import heap
from ckpt_tools.reestimate.heap import kept_heap

PAGES = 64 * 2**20 // resource.getpagesize()

needs_glibc = pytest.mark.skipif(heap._glibc() is None, reason="another libc, or a tuned malloc")


def faults() -> int:
    """Page faults that a tensor of 64 MB costs, made, filled and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@needs_glibc
def test_kept_memory_is_not_faulted_in_again():
    assert faults() > PAGES / 2
    with kept_heap():
        for _ in range(4):  # an aligned block does not always fit where one of its size was
            faults()
        assert faults() < PAGES / 20
        with kept_heap():
            assert faults() < PAGES / 20
        assert faults() < PAGES / 20
    assert faults() > PAGES / 2


@needs_glibc
def test_what_was_kept_is_given_back():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    before = resident()
    with kept_heap():
        torch.zeros(64 * 2**20)
        assert resident() > before + 3 * PAGES
    assert resident() < before + PAGES


def test_an_error_and_other_threads_leave_nothing_behind():
    def run() -> None:
        with kept_heap():
            torch.zeros(2**20)

    with pytest.raises(RuntimeError), kept_heap():
        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        raise RuntimeError
    assert heap._users == 0


def test_a_tuned_malloc_is_left_alone(monkeypatch):
    monkeypatch.setitem(os.environ, "MALLOC_TRIM_THRESHOLD_", "1")
    heap._glibc.cache_clear()
    try:
        assert heap._glibc() is None
        with kept_heap():
            pass
    finally:
        monkeypatch.undo()
        heap._glibc.cache_clear()
