"""A seeded thousand of `scripts/run fuzz`: damaged files are read or refused; nothing else happens."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest

from fuzz import cases
from fuzz.cases import Case, Hang, limit_time, make_files, plan_cases, run, write_files
from fuzz.readers import READERS
from fuzz.seeds import seeds

REFUSED = {("TorchScript", 2), ("npy", 5)}  # seeds without tensors, and of objects


@pytest.mark.parametrize("reader", [name for name in READERS if name != "malicious"])
def test_seeds_are_read(tmp_path: Path, reader: str) -> None:
    found = seeds(reader)
    assert found
    for number, seed in enumerate(found):
        if (reader, number) not in REFUSED:
            with warnings.catch_warnings(action="ignore"):
                READERS[reader](write_files(seed, tmp_path / "case"))


def test_a_thousand_cases(tmp_path: Path) -> None:
    thousand = plan_cases(list(READERS), 1000, seed=20)
    assert {case.reader for case in thousand} == set(READERS)
    failures = {
        str(case): result.failure for case in thousand if (result := run(case, tmp_path / "case")).failure
    }
    assert not failures


def test_a_case_is_the_same_again() -> None:
    for reader in ("torch.save", "safetensors", "images", "hub"):
        assert make_files(Case(reader, 3)) == make_files(Case(reader, 3))
        assert len({str(make_files(Case(reader, number)).files) for number in range(20)}) > 10


def test_what_goes_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise KeyError("median")

    def greedy(path: Path) -> None:
        try:
            bytearray(1 << 60)
        except MemoryError as error:
            raise cases.CkptToolsError("no memory") from error

    def slow(path: Path) -> None:
        while True:
            time.thread_time()

    monkeypatch.setattr(cases, "LIMIT", 0.1)
    readers = {"class map": broken, "npy": greedy, "npz": slow, "words": lambda path: None}
    monkeypatch.setattr(cases, "READERS", readers)
    said = {reader: run(Case(reader, 0), tmp_path / "case").failure for reader in readers}
    assert "KeyError: 'median'" in said["class map"]
    assert "no memory" in said["npy"]
    assert "Hang" in said["npz"]
    assert not said["words"]


def test_the_limit_is_lifted_afterwards() -> None:
    with limit_time():
        pass
    with pytest.raises(Hang), limit_time():
        raise Hang
