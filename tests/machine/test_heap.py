"""Freed memory is kept during a pass, and only then."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from ckpt_tools.machine import heap
from ckpt_tools.machine.heap import keep_freed_memory

needs_glibc = pytest.mark.skipif(heap._tunable_glibc() is None, reason="another libc, or a tuned malloc")

MEASURE = """
import resource
from pathlib import Path

import torch

from ckpt_tools.machine.heap import keep_freed_memory

PAGES = 64 * 2**20 // resource.getpagesize()


def faults():
    "Page faults that a tensor of 64 MB costs at best: not every block of its size fits an aligned one."

    def once():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(16 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return min(once() for _ in range(30))


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

"""


def in_a_new_process(script: str) -> None:
    """What other tests have left in the heap would serve a tensor without a fault."""
    done = subprocess.run([sys.executable, "-c", MEASURE + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_glibc
def test_kept_memory_is_not_faulted_in_again():
    in_a_new_process("""
assert faults() > PAGES / 2
with keep_freed_memory():
    assert faults() < PAGES / 20
    with keep_freed_memory():
        assert faults() < PAGES / 20
    assert faults() < PAGES / 20
""")


@needs_glibc
def test_what_was_kept_is_given_back():
    in_a_new_process("""
before = resident()
with keep_freed_memory():
    torch.zeros(64 * 2**20)
    assert resident() > before + 3 * PAGES
assert resident() < before + PAGES
""")


def run(*, fail: bool = False) -> None:
    with keep_freed_memory():
        torch.zeros(2**20)
        if fail:
            raise RuntimeError


def test_an_error_and_other_threads_leave_nothing_behind():
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    with pytest.raises(RuntimeError):
        run(fail=True)
    for thread in threads:
        thread.join()
    assert heap._users == 0


def test_a_tuned_malloc_is_left_alone(monkeypatch):
    monkeypatch.setitem(os.environ, "MALLOC_TRIM_THRESHOLD_", "1")
    heap._tunable_glibc.cache_clear()
    try:
        assert heap._tunable_glibc() is None
        with keep_freed_memory():
            pass
    finally:
        monkeypatch.undo()
        heap._tunable_glibc.cache_clear()
