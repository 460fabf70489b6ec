"""Many processes equal one: pure merging on any partition, and real ranks of torchrun on the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import ranks
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ckpt_tools import reestimate_bn
from ckpt_tools.cli import main
from ckpt_tools.data.data_source import open_source
from ckpt_tools.data.sample_order import Reading, Share
from ckpt_tools.distributed import ALONE, Ranks
from ckpt_tools.errors import UsageError
from ckpt_tools.machine.device import resolve_device
from ckpt_tools.machine.memory import fitting_batch_size
from ckpt_tools.moments import Clusters, batch_moments
from ckpt_tools.observation.evidence import Evidence, merge_all
from ckpt_tools.reestimate.shares import pack_evidence, unpack_evidence

SUPPORT = Path(__file__).parents[1] / "support"
CENTRE = torch.zeros(3, dtype=torch.float64)


def evidence(x: torch.Tensor) -> Evidence:
    seen = batch_moments(x, CENTRE, len(x))
    return Evidence(seen.moments, Clusters.of(seen.sums), Clusters.of(seen.sums.sum(1, keepdim=True)))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(2, 9)), min_size=1, max_size=12), st.integers(0, 99))
def test_any_partition_merges_to_the_whole(dealt: list[tuple[int, int]], seed: int) -> None:
    """Batches of any size, dealt to five ranks in any way: as NumPy says of all of them."""
    g = torch.Generator().manual_seed(seed)
    batches = [(rank, torch.randn(size, 3, 4, generator=g) * 3 + 1) for rank, size in dealt]
    shares = [merge_all(evidence(x) for owner, x in batches if owner == rank) for rank in range(5)]
    exchanged = [unpack_evidence(pack_evidence([share, None], [3, 2]), [3, 2]) for share in shares]
    assert all(nothing is None for _, nothing in exchanged)
    whole = merge_all(share for share, _ in exchanged)
    assert whole is not None
    values = torch.cat([x for _, x in batches]).double().numpy()
    assert whole.moments.count == values.shape[0] * 4
    np.testing.assert_allclose(whole.moments.variance(), values.var((0, 2), ddof=1), rtol=1e-6)
    np.testing.assert_allclose(whole.moments.mean, values.mean((0, 2)), rtol=1e-5, atol=1e-6)
    alone = merge_all(evidence(x) for _, x in batches)
    assert alone is not None
    assert whole.batches.count == alone.batches.count == len(batches)
    for a, b in zip(bits(whole), bits(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def bits(part: Evidence) -> list[torch.Tensor]:
    clusters = [t for kind in (part.clusters, part.batches) for t in (kind.mean, kind.comoments)]
    return [part.moments.mean, part.moments.m2, *clusters]


def test_the_exchange_loses_no_bit() -> None:
    parts = [evidence(torch.randn(7, 3, 2)), None, evidence(torch.randn(1, 3, 5))]
    back = unpack_evidence(pack_evidence(parts, [3, 4, 3]), [3, 4, 3])
    assert back[1] is None
    for before, after in zip(parts[::2], back[::2], strict=True):
        assert before is not None
        assert after is not None
        assert (before.moments.count, before.clusters.count) == (after.moments.count, after.clusters.count)
        assert all(torch.equal(a, b) for a, b in zip(bits(before), bits(after), strict=True))
    assert merge_all([None, None]) is None


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_are_a_partition(batches: int, world: int) -> None:
    shares = [list(Share(rank, world).select_items(range(batches))) for rank in range(world)]
    assert sorted(number for share in shares for number in share) == list(range(batches))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("spec", ["data.npy", "ranks:broken", "ranks:dataset"])
def test_streams_read_their_share(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ranks, "dataset", lambda: torch.utils.data.TensorDataset(torch.randn(41, 3)), raising=False
    )
    np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(size=(41, 3)).astype("float32"))
    source = open_source(str(tmp_path / spec) if spec.endswith("npy") else spec)
    options: dict[str, Any] = {"batch_size": 7, "workers": 0}
    whole = list(source.batches(None, Reading(**options)))
    for world in (2, 9):
        for rank in range(world):
            share = source.batches(None, Reading(share=Share(rank, world), **options))
            assert share.count == source.count
            mine = list(share)
            assert len(mine) == len(whole[rank::world])
            assert all(
                torch.equal(torch.as_tensor(a[0]), torch.as_tensor(b[0]))
                for a, b in zip(mine, whole[rank::world], strict=True)
            )


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks.from_environment() == Ranks()
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**said, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(3, 4, 1, 2)
    for wrong in ("4", "-1", "one"):
        monkeypatch.setenv("RANK", wrong)
        with pytest.raises(UsageError, match=f"RANK={wrong}.*torchrun"):
            Ranks.from_environment()


def test_every_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [resolve_device(said, Ranks(5, 8, 1, 4)) for said in ("auto", "cuda", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cpu",
    ]
    assert resolve_device("auto") == "cuda"
    with pytest.raises(UsageError, match="its own GPU"):
        resolve_device("cuda:0", Ranks(1, 2, 1, 2))


def test_ranks_on_one_cpu_divide_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_tools.machine.memory.free_bytes", lambda device: 8000)
    assert [fitting_batch_size(10, "cpu", sharing) for sharing in (1, 2, 4, 8)] == [128, 128, 64, 32]


def test_without_a_process_group() -> None:
    model, data = ranks.model_and_batches()
    with pytest.raises(UsageError, match="init_process_group"):
        reestimate_bn(model, data, distributed=True)


# Real processes. Each start imports torch in every one of them, so few starts do many jobs.


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a checkpoint and data, and what one process makes of every job."""
    folder = tmp_path_factory.mktemp("alone")
    prepared(folder)
    before = Path.cwd()
    torch.set_num_threads(1)
    try:
        os.chdir(folder)
        found = {name: ranks.summary(name, ALONE) for name in ranks.JOBS}
    finally:
        os.chdir(before)
    return folder, json.loads(json.dumps(found))


def prepared(folder: Path) -> None:
    model, _ = ranks.model_and_batches()
    torch.save(model.state_dict(), folder / "model.pt")
    many = torch.cat(nets.batches((3, 8, 8), 30)).numpy()
    np.save(folder / "data.npy", many[:101])
    np.save(folder / "more.npy", many)
    bad = many[:300].copy()
    bad[7] *= 100
    bad[120], bad[250] = 3, np.nan
    np.save(folder / "bad.npy", bad)


def torchrun(world: int, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(SUPPORT / part) for part in ("../..", "../../adapters", "."))
    command = [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
    ]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def same(a: object, b: object) -> bool:
    """Equal to a millionth, whatever the nesting."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return a == b


@pytest.mark.parametrize("world", [2, 3])
def test_many_equal_one(world: int, alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, one = alone
    prepared(tmp_path)
    run = torchrun(world, SUPPORT / "ranks.py", tmp_path)
    assert run.returncode == 0, run.stderr
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(world)]
    for rank in range(world):
        for name in ranks.jobs(world):
            found, expected = told[rank][name], one[name]
            if name == "tolerance":  # stops at the end of a round
                assert found["read"][3] == expected["read"][3] is True
                assert expected["read"][1] <= found["read"][1] < expected["read"][1] + world
                continue
            if name == "ratio":  # every process draws dropout of its own
                assert found["read"] == expected["read"]
                continue
            found.pop("sha256"), expected.get("sha256")
            assert same({**expected, "sha256": None}, {**found, "sha256": None}), (name, found, expected)
        assert told[rank] | {"sha256": None} == told[0] | {"sha256": None}
    for name in ranks.jobs(world):
        if name != "tolerance":
            rtol = 0.1 if name == "ratio" else 1e-6
            compared(
                load_file(tmp_path / f"{name}.safetensors"), load_file(folder / f"{name}.safetensors"), rtol
            )
    assert told[0]["outliers"]["outliers"] == [
        ["row 120", "blank"],
        ["row 250", "not finite"],
        ["row 7", "extreme"],
    ]
    library_and_errors(told[0], world)
    assert {path.name for path in tmp_path.iterdir()} == expected_files(world)


def compared(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-6) -> None:
    assert list(found) == list(expected)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=rtol, atol=0)


def library_and_errors(told: dict[str, Any], world: int) -> None:
    model, data = ranks.model_and_batches()
    reestimate_bn(model, data)
    after = [buffer for name, buffer in model.named_buffers() if name.endswith("running_var")][1:]
    assert told["uneven"] == [128, 4, world]
    assert told["late"] == [128, 4]
    assert same(told["variances"], [buffer.double().tolist() for buffer in after])
    assert told["broken"][0] == "DataError"
    assert "the disk of rank 1 is broken" in told["broken"][1]
    assert told["ema"][0] == "UsageError"
    assert "one process" in told["ema"][1]
    assert told["taken"][0] == "OutputError"


def expected_files(world: int) -> set[str]:
    outputs = {f"{name}.safetensors" for name in ranks.jobs(world)}
    return {
        "model.pt",
        "data.npy",
        "more.npy",
        "bad.npy",
        *outputs,
        *(f"rank{rank}.json" for rank in range(world)),
    }


def job(folder: Path, data: object, *more: object) -> list[object]:
    arguments = ["-m", "ckpt_tools", "bn-reestimate", folder / "model.pt", "--data", data]
    return [*arguments, "--arch", "nets:DenseNet", "--device", "cpu", *more]


def test_the_command_speaks_once(tmp_path: Path) -> None:
    prepared(tmp_path)
    arguments = job(tmp_path, tmp_path / "data.npy", "--batch-size", 30, "--json")
    (tmp_path / "torch.py").write_text("raise SystemExit('imported from the current folder')")
    command = ["--no-python", Path(sys.executable).parent / "ckpt-fix"]  # as the README has it
    run = torchrun(2, *command, *arguments[2:], folder=tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert (result["processes"], result["data"]["images"], result["data"]["batches"]) == (2, 101, 4)
    assert run.stderr.count("pass 1: 100%") == 1
    one = CliRunner().invoke(
        main, [str(part) for part in [*arguments[2:], "-q", "-o", tmp_path / "one.safetensors"]]
    )
    assert one.exit_code == 0, one.output
    compared(load_file(tmp_path / "model.bn.safetensors"), load_file(tmp_path / "one.safetensors"))


def test_an_error_on_one_rank_is_told_once(tmp_path: Path) -> None:
    prepared(tmp_path)
    run = torchrun(2, *job(tmp_path, "ranks:broken"))
    assert run.returncode == 1
    assert run.stderr.count("ckpt-fix: ") == run.stderr.count("the disk of rank 1 is broken") == 1, run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "data.npy", "more.npy", "bad.npy"}


def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    prepared(tmp_path)
    started = time.monotonic()
    run = torchrun(2, *job(tmp_path, "ranks:deadly"))
    assert run.returncode not in (0, -9)
    assert time.monotonic() - started < 60
    assert "SIGKILL" in run.stderr
    assert "written:" not in run.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "data.npy", "more.npy", "bad.npy"}
