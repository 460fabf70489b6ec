"""Jobs in threads: in order, ahead by a bounded number, and nothing of them left behind."""

import threading

import pytest
import torch

from ckpt_tools.data.prefetch import read_ahead


def groups(sizes, job=lambda number: number):
    number = 0
    for size in sizes:
        yield [lambda number=number + i: job(number) for i in range(size)]
        number += size


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("sizes", [[], [1], [3, 2, 2], [1] * 20, [7, 1, 1, 7]])
def test_results_come_in_order_and_in_their_groups(workers, sizes):
    found = list(read_ahead(groups(sizes), workers))
    assert [len(group) for group in found] == sizes
    assert [number for group in found for number in group] == list(range(sum(sizes)))


@pytest.mark.parametrize("size", [1, 4])
def test_the_next_group_is_under_way_and_not_everything(size):
    asked = []

    def counted():
        for group in groups([size] * 50):
            asked.append(1)
            yield group

    reading = read_ahead(counted(), 2)
    next(reading)
    assert max(2, 1 + 4 // size) <= len(asked) <= 8 // size + 2
    reading.close()
    assert len(asked) < 10


def test_without_workers_nothing_is_read_ahead():
    done = []
    reading = read_ahead(groups([2, 2], done.append), 0)
    next(reading)
    assert done == [0, 1]


@pytest.mark.parametrize("left", ["at the end", "half-way", "by an error"])
def test_threads_end_with_the_pass_and_leave_torchs_thread_count(left):
    def job(number):
        if left == "by an error" and number == 5:
            raise KeyError(number)
        return torch.get_num_threads()

    reading = read_ahead(groups([2] * 10, job), 2)
    if left == "by an error":
        with pytest.raises(KeyError):
            list(reading)
    elif left == "half-way":
        assert next(reading) == [1, 1]
        reading.close()
    else:
        assert {count for group in reading for count in group} == {1}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ckpt-tools-reader")]
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [torch.get_num_threads()]
