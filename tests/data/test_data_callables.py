import sys

import pytest
import torch

from ckpt_tools.data import open_source
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import DataError

MODULE = """
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

calls = []
rows = torch.arange(40.0)[:, None].repeat(1, 3)

class Pairs(Dataset):
    def __len__(self): return 40
    def __getitem__(self, i): return rows[i], list(range(i))  # labels of different lengths
class Faulty(Pairs):
    def __getitem__(self, i): raise KeyError("lost")
class Words(Pairs):
    def __getitem__(self, i): return {"x": rows[i], "mask": torch.ones(2)}

def pairs(): return Pairs()
def words(): return Words()
def faulty(): return Faulty()
def nothing_in(): return TensorDataset(torch.zeros(0, 3))
def loader(): return DataLoader(TensorDataset(rows), batch_size=16, shuffle=True)
def listed(): return [rows[:30], rows[30:]]
def generator():
    calls.append(1)
    for start in (0, 25):
        yield rows[start:start + 25], torch.zeros(min(25, 40 - start))
def dicts(): return [{"x": rows, "mask": torch.ones(40, 2), "scale": torch.tensor(2.0)}]
def failing():
    yield rows
    raise ValueError("the disk is gone")
def refusing(): raise ValueError("no data today")
def hungry(argument): return []
def one_tensor(): return rows
def nothing(): return None
def empty(): return []
def strings(): return ["a"]
def scalars(): return [torch.tensor(1.0)]
def labels_first(): return [(3, rows)]
class inner:
    @staticmethod
    def made(): return [rows]
constant = 3
class Table:  # as those of Hugging Face's datasets: of no class of torch's, with columns
    column_names = ("image", "label")
    def __len__(self): return 40
    def __getitem__(self, i): return {"image": torch.full((3, 4), float(i)), "label": i % 3}
    def __iter__(self): return map(self.__getitem__, range(40))
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_batches.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    (tmp_path / "my_needy.py").write_text("import a_package_nobody_has")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("my_batches", "my_broken", "my_needy"):
        sys.modules.pop(name, None)


def stream(name, *, batch_size=16, workers=0, **options):
    return open_source(f"my_batches:{name}", **options).batches(
        None, Reading(batch_size=batch_size, workers=workers)
    )


def first_column(batches):
    inputs = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
    return torch.cat([batch[:, 0] for batch in inputs]).int().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_is_batched_in_random_order_without_labels(workers):
    source = open_source("my_batches:pairs", seed=1)
    assert (source.kind, source.count, source.sample_shape, source.is_preprocessed) == (
        "callable",
        40,
        None,
        True,
    )
    batches = source.batches(None, Reading(batch_size=16, workers=workers))
    first, second = list(batches), list(batches)
    assert [len(batch) for batch in first] == [14, 13, 13]
    assert sorted(first_column(first)) == list(range(40)) != first_column(first)
    assert first_column(first) == first_column(second)
    assert (batches.count, batches.batch_count, batches.skipped_samples) == (40, 3, ())
    assert first_column(stream("pairs", seed=1, limit=10)) == first_column(first)[:10]


def test_a_dataset_of_dicts_keeps_them():
    batch = next(iter(stream("words", batch_size=40)))
    assert (batch["x"].shape, batch["mask"].shape) == ((40, 3), (40, 2))


def test_a_shuffling_loader_repeats_its_order_with_the_seed_and_leaves_the_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches = stream("loader", seed=3)
    first = first_column(batches)
    assert torch.equal(before, torch.get_rng_state())
    assert first == first_column(batches) == first_column(stream("loader", seed=3))
    assert first != first_column(stream("loader", seed=4))
    assert (batches.count, batches.batch_count) == (None, None)


def test_iterables_come_as_they_are_and_iterators_are_made_anew():
    assert first_column(stream("listed")) == list(range(40))
    batches = stream("generator")
    assert first_column(batches) == first_column(batches) == list(range(40))
    assert all(isinstance(batch, tuple) for batch in batches)
    assert len(sys.modules["my_batches"].calls) == 3
    assert first_column(stream("inner.made")) == list(range(40))


@pytest.mark.parametrize(("limit", "sizes"), [(10, [30]), (30, [30]), (33, [30, 10]), (99, [30, 10])])
def test_limit_takes_the_first_batches_of_an_iterable_and_cuts_none(limit, sizes):
    batches = stream("listed", limit=limit)
    assert [len(batch) for batch in batches] == [len(batch) for batch in batches] == sizes


def test_a_source_knows_whether_the_rows_of_its_batches_are_samples():
    assert stream("pairs").rows_are_samples
    assert not stream("listed").rows_are_samples
    assert not stream("dicts").rows_are_samples


@pytest.mark.parametrize(
    ("name", "word", "cause"),
    [
        ("my_batches:refusing", "ValueError: no data today", ValueError),
        ("my_batches:hungry", "without arguments raised TypeError", TypeError),
        ("my_broken:x", "ZeroDivisionError", ZeroDivisionError),
        ("my_needy:x", "a_package_nobody_has.*Install", ModuleNotFoundError),
        ("my_missing:x", "'my_missing' is not in", ModuleNotFoundError),
        ("my_batches.sub:x", "'my_batches.sub' is not in", ModuleNotFoundError),
        ("my_batches:pears", r"Did you mean my_batches:pairs\?", AttributeError),
        ("my_batches:constant", "found int", None),
        ("my_batches:one_tensor", "returned Tensor", None),
        ("my_batches:nothing", "returned NoneType", None),
        ("my_batches:nothing_in", "empty", None),
    ],
)
def test_callables_that_do_not_work(name, word, cause):
    with pytest.raises(DataError, match=word) as caught:
        open_source(name)
    assert isinstance(caught.value.__cause__, cause or type(None))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("failing", "ValueError: the disk is gone"),
        ("faulty", "KeyError: 'lost'"),
        ("empty", "found none"),
        ("strings", "batch 0 is a str"),
        ("scalars", r"a tensor of shape \(\)"),
        ("labels_first", r"a tuple of \['int', 'Tensor'\]"),
    ],
)
def test_batches_that_do_not_work(name, word):
    with pytest.raises(DataError, match=word):
        list(stream(name))


def test_a_workers_exception_is_told_in_one_line():
    with pytest.raises(DataError, match=r"reading raised KeyError: 'lost'\.$") as caught:
        list(stream("faulty", workers=1))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_table_of_samples_is_batched_like_a_dataset():
    batches = list(stream("Table"))
    assert [len(batch["image"]) for batch in batches] == [14, 13, 13]
    assert sorted(torch.cat([batch["image"][:, 0, 0] for batch in batches]).tolist()) == list(range(40))
    labels = torch.cat([batch["label"] for batch in batches]).tolist()
    assert sorted(labels) == sorted(number % 3 for number in range(40))
