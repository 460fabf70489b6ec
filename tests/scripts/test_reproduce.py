"""`scripts/run reproduce`: its quick ways, resuming, statistics, verdicts, and the page as committed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy import stats

from reproduce import EXPERIMENTS, figure1, figure2, figure5, find, table1
from reproduce.__main__ import main
from reproduce.estimates import Difference, mean, paired_difference
from reproduce.experiment import HOME, Experiment
from reproduce.tables import Verdict, of_differences, of_number, section, write_page


def cli(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def ok(*words: object) -> str:
    result = cli(*words)
    assert result.exit_code == 0, result.output
    return result.output


def mnist(folder: Path, count: int = 48) -> str:
    """Grey images whose brightness is their class, as torchvision's MNIST has them."""
    for name in ("train", "t10k"):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.zeros((count, 28, 28), np.uint8) + 20 * labels[:, None, None]
        sizes = b"".join(size.to_bytes(4, "big") for size in images.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + labels.tobytes())
    return f"mnist:{folder}"


def test_every_experiment_is_a_command() -> None:
    listed = ok("--help")
    for name in EXPERIMENTS:
        assert name in listed
        said = ok(name, "--help")
        assert all(option in said for option in ("--seeds", "--device", "--quick", "--out"))
        assert ("--data" in said) == bool(find(name).data)


@pytest.mark.parametrize(("experiment", "cells"), [(table1, 5), (figure1, 6), (figure5, 10), (figure2, 9)])
def test_quick(tmp_path: Path, experiment: Any, cells: int) -> None:
    one: Experiment = experiment.EXPERIMENT
    said = ok(one.name, "--quick", "--seeds", 1, "--out", tmp_path)
    assert "A quick run, which proves nothing" in said
    assert len(one.read(tmp_path)) == cells
    page = (tmp_path / "RESULTS.md").read_text()
    assert section(one, tmp_path) in page
    assert page.count("Not run yet") + page.count("not run here") >= len(EXPERIMENTS) - 1
    pictures = {path.suffix for path in (tmp_path / "results").iterdir()} - {".jsonl"}
    assert pictures == ({".svg", ".png"} if one.pictures else set())


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        ok("table1", "--quick", "--out", out)
    file = broken / "results" / "table1.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:50])
    ok("table1", "--quick", "--out", broken)
    after = file.read_bytes()
    assert after.startswith(b"".join(lines[:3]))

    def found(out: Path) -> list[tuple[object, object]]:
        return [(record.cell, record.found) for record in table1.EXPERIMENT.read(out)]

    assert found(broken) == found(whole)
    ok("table1", "--quick", "--out", broken)
    assert file.read_bytes() == after
    file.write_text('{"cell": {"depth": 3}}\n')
    assert "Move the file away" in cli("table1", "--quick", "--out", broken).output


def test_processes_share_an_experiment(tmp_path: Path) -> None:
    for seed in (1, 0):
        ok("table1", "--quick", "--only", f"seed={seed}", "--only", "activation=tanh", "--out", tmp_path)
    assert [(one.cell.activation, one.cell.seed) for one in table1.EXPERIMENT.read(tmp_path)] == [
        ("tanh", 1),
        ("tanh", 0),
    ]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_whatever_is_known_is_shown(name: str) -> None:
    """Cells may come in any order, from several processes."""
    one = find(name)
    records = one.read(HOME)
    for known in (records[:1], records[-1:], records[::7]):
        one.section(known)
        for picture in one.pictures.values():
            picture(known)


def test_figure2_by_its_full_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure2, "EPOCHS", 2)
    monkeypatch.setattr(figure2, "ACTIVATIONS", {"ELU": figure2.ACTIVATIONS["ELU"]})
    out = tmp_path / "out"
    said = ok("figure2", "--data", mnist(tmp_path), "--seeds", 2, "--out", out)
    assert "On mnist" in said
    records = figure2.EXPERIMENT.read(out)
    assert {record.cell.rate for record in records} == set(figure2.RATES)
    assert len(records) == 3 * 3 * (
        3 + 1
    )  # keeps, initialisations; all rates, and the best with a second seed
    assert all(len(record.found["train"]) == 2 for record in records)
    assert "| ELU | 0.5 |" in said
    for count in range(0, len(records), 5):  # wherever it is interrupted, the page can be written
        figure2.EXPERIMENT.section(records[: count + 1])


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "mnist"],
        ["--data", "mnist:nowhere"],
        ["--device", "cuda:99"],
        ["--out", HOME],
        ["--only", "x=1"],
        ["--only", "keep=7"],
    ],
)
def test_bad_input(words: list[object]) -> None:
    result = cli("figure2", "--quick", *words)
    assert result.exit_code in (1, 2)
    assert "expected" in result.output or "Choose another folder" in result.output
    assert "Traceback" not in result.output


def test_the_page_is_what_the_records_say(tmp_path: Path) -> None:
    """Verdicts are not typed by hand."""
    (tmp_path / "results").symlink_to(HOME / "results")
    assert write_page(tmp_path).read_text() == (HOME / "RESULTS.md").read_text()


def test_statistics() -> None:
    source = np.random.default_rng(0)
    for count in (2, 3, 5, 8, 30):
        before = source.normal(size=count)
        after = before + source.normal(0.4, 1, size=count)
        ours, truth = paired_difference(list(after), list(before)), stats.ttest_rel(after, before)
        assert ours.p == pytest.approx(truth.pvalue, rel=1e-6)
        assert ours.value / ours.error == pytest.approx(truth.statistic)
        assert mean(list(after)).error == pytest.approx(stats.sem(after))
    assert paired_difference([1.0, 2.0], [0.0, 1.0]).p == 0
    assert math.isnan(paired_difference([1.0], [0.0]).p)
    assert mean([1.0]).text() == "1.00"
    with pytest.raises(ValueError, match="at least one value"):
        mean([])


def difference(value: float, p: float) -> Difference:
    return Difference(value, 0.1, 5, p)


@pytest.mark.parametrize(
    ("judge", "verdict"),
    [
        (lambda: of_number(0.39351, "0.394"), Verdict.REPRODUCED),
        (lambda: of_number(0.4559, "0.444"), Verdict.DIRECTION),
        (lambda: of_number(0.4644, "0.216"), Verdict.NOT),
        (lambda: of_differences([difference(-1, 0.01), difference(-2, 0.049)]), Verdict.REPRODUCED),
        (lambda: of_differences([difference(-1, 0.01), difference(-2, 0.051)]), Verdict.DIRECTION),
        (lambda: of_differences([difference(-1, math.nan)]), Verdict.DIRECTION),
        (lambda: of_differences([difference(-1, 0.01), difference(2, 0.01)]), Verdict.NOT),
        (lambda: of_differences([difference(1, 0.01)], falls=False), Verdict.REPRODUCED),
        (lambda: of_differences([difference(math.nan, 0.01)]), Verdict.NOT),
        (lambda: of_differences([difference(0, 1)]), Verdict.NOT),
        (lambda: of_differences([]), Verdict.NOT),
    ],
)
def test_verdicts(judge: Callable[[], Verdict], verdict: Verdict) -> None:
    assert judge() is verdict
