"""Many checkpoints on a cluster of one machine: as in one process, whatever workers are lost."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lethal
import listening
import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from ckpt_tools.cli import main
from ckpt_tools.errors import ClusterError, UsageError
from ckpt_tools.jobs.many import ray_loopback
from ckpt_tools.jobs.many.folder_items import CheckpointItem, plan_items
from ckpt_tools.jobs.many.ray_cluster import ClusterCapacity, connect_to_ray, measure_capacity
from ckpt_tools.jobs.many.ray_engine import RayEngine, _Part
from ckpt_tools.jobs.many.ray_loopback import require_loopback
from ckpt_tools.jobs.request import ModelChoice, ReadingOptions, Request
from ckpt_tools.location import Location
from ckpt_tools.remote.mirror import open_mirror
from ckpt_tools.storage.discovery import find_checkpoints

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """As the engine starts it, with two CPUs. Workers find what these tests find.

    As in the background of a shell, interrupts are ignored.
    """
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join(str(ROOT / part) for part in ("", "adapters", "tests/support"))
        )
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where a token of the user's would be
        for name in [name for name in os.environ if name.startswith("RAY_AUTH") or name == "RAY_ADDRESS"]:
            patch.delenv(name)
        variables = dict(os.environ)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        patch.chdir(tmp_path_factory.mktemp("start"))
        with connect_to_ray(None) as ray:
            signal.signal(signal.SIGINT, before)
            yield ray
        assert dict(os.environ) == variables
        assert not list(Path(os.environ["HOME"]).iterdir())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    batches = nets.batches(lethal.SHAPE)
    np.save(tmp_path / "data.npy", torch.cat(batches).numpy())
    (tmp_path / "runs").mkdir()
    for number in range(3):
        torch.manual_seed(number)
        torch.save(nets.trained(nets.DenseNet(), batches).state_dict(), tmp_path / "runs" / f"{number}.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cli(*more: str, data: str = "data.npy", arch: str = "nets:DenseNet") -> Result:
    command = [
        "bn-reestimate",
        "runs",
        "--data",
        data,
        "--arch",
        arch,
        "--batch-size",
        "16",
        "--output-dir",
        "fixed",
    ]
    return CliRunner().invoke(main, [*command, "-q", "--json", *more])


def on_ray(*more: str, **said: str) -> Result:
    return cli("--engine", "ray", "--ray-cpus", "1", *more, **said)


def without_seconds(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {name: without_seconds(value) for name, value in facts.items() if name != "seconds"}
    return [without_seconds(value) for value in facts] if isinstance(facts, list) else facts


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("fixed/ckpt-fix.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("ray")
def test_a_folder_comes_out_as_from_one_process(root: Path) -> None:
    (root / "runs" / "bad.pt").write_bytes(b"nonsense")
    here = cli()
    (root / "fixed").rename(root / "here")
    there = on_ray()
    assert here.exit_code == there.exit_code == 1
    assert without_seconds(json.loads(there.stdout)) == without_seconds(json.loads(here.stdout))
    outputs = sorted(path.name for path in (root / "here").glob("*.safetensors"))
    assert len(outputs) == 3
    assert all(
        (root / "fixed" / name).read_bytes() == (root / "here" / name).read_bytes() for name in outputs
    )


@pytest.mark.usefixtures("ray", "root")
def test_a_worker_killed_amid_its_task_is_replaced() -> None:
    result = on_ray(data="lethal:once")
    assert result.exit_code == 0, result.stderr
    assert Path("killed").exists()
    assert sorted((line["checkpoint"], line["status"]) for line in lines()) == [
        (f"runs/{number}.pt", "done") for number in range(3)
    ]


@pytest.mark.usefixtures("ray")
def test_a_checkpoint_that_kills_every_worker_fails_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_tools.jobs.many.ray_engine._ATTEMPTS", 3)  # the last one alone
    state = torch.load(root / "runs" / "1.pt")
    state["head.bias"][0] = 666
    torch.save(state, root / "runs" / "1.pt")
    result = on_ray(arch="lethal:Fragile")
    assert result.exit_code == 1
    assert "1 of 3 checkpoints failed" in result.stderr
    records = {line["checkpoint"]: line for line in lines()}
    assert [records[f"runs/{number}.pt"]["status"] for number in range(3)] == ["done", "failed", "done"]
    assert "WorkerCrashedError" in records["runs/1.pt"]["error"]
    assert len(list((root / "fixed").iterdir())) == 3  # with the manifest


@pytest.mark.usefixtures("ray")
def test_what_a_lost_worker_could_not_say_is_done_and_not_done_again(root: Path) -> None:
    items = plan_items(find_checkpoints([root / "runs"]), root / "fixed")
    reading = ReadingOptions(batch_size=16)
    request = Request(Location(Path()), "data.npy", model=ModelChoice("nets:DenseNet"), reading=reading)
    records: list[Any] = []
    RayEngine(cpus=2).run(items, request, lethal.described, records.append)
    assert sorted(record["checkpoint"] for record in records) == [str(item.checkpoint) for item in items]
    assert {record["status"] for record in records} == {"done"}
    assert [record["report"] is None for record in records].count(True) == 1


def test_after_a_second_loss_items_stand_alone() -> None:
    whole = _Part((0, 1, 2)).without_item(1)
    (again,) = whole.split_for_retry()
    assert again == _Part((0, 2), 2)
    assert list(again.split_for_retry()) == [_Part((0,), 3), _Part((2,), 3)]
    assert not list(again.without_item(0).without_item(2).split_for_retry())


def test_an_interrupt_leaves_nothing_half_done(ray: Any, root: Path) -> None:
    (root / "driver").write_text(str(os.getpid()))
    result = on_ray(data="lethal:endless")
    assert result.exit_code == 130
    assert list(root.glob("ended-*"))  # the worker's code was left in order
    assert ray.get(ray.remote(num_cpus=2)(lambda: True).remote(), timeout=30)  # both workers were
    assert not list((root / "fixed").iterdir())


@pytest.mark.usefixtures("ray", "root")
@pytest.mark.parametrize("said", [("--data", "nowhere/"), ("--eval-data", "nowhere/")])
def test_what_concerns_all_ends_the_run(said: tuple[str, ...]) -> None:
    result = on_ray(*said)
    assert result.exit_code == 1
    assert "nowhere/" in result.stderr
    assert not result.stdout


# Asks Ray's head for its keys, with the token in the environment.
# None of the names it could run code by is needed.
ASK = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=5)))
"""


def test_only_who_has_the_token_is_answered(ray: Any) -> None:
    if not hasattr(importlib.import_module("ray._raylet"), "AuthenticationTokenLoader"):
        pytest.skip("a version of Ray without tokens")
    token = ray.get(ray.remote(lambda: os.environ["RAY_AUTH_TOKEN"]).remote(), timeout=60)
    assert len(token) == 64
    assert not [path for path in listening.PROC.glob("[0-9]*/cmdline") if token.encode() in content(path)]
    address = ray.get_runtime_context().gcs_address
    for said, answered in (
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_TOKEN": "0" * 64}, False),
        ({}, True),
    ):
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **said}
        asked = subprocess.run(
            [sys.executable, "-c", ASK, address], env=environment, capture_output=True, text=True, check=False
        )
        assert (asked.returncode == 0) is answered, asked.stderr


def content(path: Path) -> bytes:
    with contextlib.suppress(OSError):  # the process may have ended
        return path.read_bytes()
    return b""


@pytest.mark.skipif(not (listening.PROC / "net/tcp").exists(), reason="no /proc to look at")
def test_servers_listen_on_this_machine_alone(ray: Any) -> None:
    assert ray.get(ray.remote(lambda: True).remote(), timeout=60)  # a worker is there, and all before it
    servers = [*listening.servers(listening.family(os.getpid()))]
    assert {"gcs_server", "raylet"} <= {command for command, _ in servers}
    assert not [server for server in servers if not server[1].is_loopback]


def test_workers_do_not_search_the_folder_that_the_run_was_started_in(ray: Any) -> None:
    folders = ray.get(ray.remote(lambda: sys.path).remote(), timeout=60)
    assert not [folder for folder in folders if folder == "" or Path(folder).name.startswith("start")]


def test_a_cluster_that_others_can_reach_is_not_used() -> None:
    open_to_all = SimpleNamespace(nodes=lambda: [{"NodeManagerAddress": "192.0.2.7"}], __version__="9.9")
    with pytest.raises(ClusterError, match=r"Ray 9\.9.*192\.0\.2\.7"):
        require_loopback(open_to_all)
    for address in ("127.0.0.1", "::1"):
        require_loopback(SimpleNamespace(nodes=lambda address=address: [{"NodeManagerAddress": address}]))


@pytest.mark.parametrize(
    ("said", "home", "expected"),
    [
        ({}, False, {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}),
        ({"RAY_AUTH_MODE": "token"}, False, {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}),
        ({"RAY_AUTH_MODE": "disabled"}, False, set()),
        ({"RAY_AUTH_TOKEN": "mine"}, False, {"RAY_AUTH_MODE"}),
        ({"RAY_AUTH_TOKEN_PATH": "mine"}, False, {"RAY_AUTH_MODE"}),
        ({}, True, {"RAY_AUTH_MODE"}),
    ],
)
def test_the_users_token_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], home: bool, expected: set[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    if home:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("mine")
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert ray_loopback._authentication().keys() == expected


def test_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAYS", "1")
    monkeypatch.setenv("REMOVED", "1")
    before = dict(os.environ)
    with contextlib.suppress(KeyError), ray_loopback.temporary_environment(STAYS="2", NEW="3"):
        os.environ["RAYS"] = "4"
        assert os.environ["STAYS"] + os.environ["NEW"] == "23"
        del os.environ["REMOVED"]
        raise KeyError
    assert dict(os.environ) == before


@pytest.mark.usefixtures("root")
def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = on_ray()
    assert result.exit_code == 2
    assert "pip install 'ckpt-tools[ray]'" in result.stderr
    assert not Path("fixed").exists()


@pytest.mark.parametrize(
    ("address", "code"),
    [("127.0.0.1:1", 1), ("127.0.0.1", 2), ("ray://127.0.0.1:10001", 2), ("127.0.0.1:x", 2)],
)
@pytest.mark.usefixtures("root")
def test_an_address_that_is_no_cluster(address: str, code: int) -> None:
    pytest.importorskip("ray")
    result = on_ray("--ray-address", address)
    assert result.exit_code == code
    assert f"--ray-address {address}" in result.stderr
    assert not Path("fixed").exists()


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
@pytest.mark.usefixtures("root")
def test_a_server_that_is_not_ray(greeting: bytes) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        threading.Thread(target=_greeted, args=(server, greeting)).start()
        result = on_ray("--ray-address", address)
    assert result.exit_code == 1
    assert f"--ray-address {address}: expected the head of a Ray cluster" in result.stderr


def _greeted(server: socket.socket, greeting: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(64)
        connection.sendall(greeting)


def test_a_checkpoint_behind_a_url_is_refused(tmp_path: Path) -> None:
    with open_mirror():
        item = CheckpointItem(Location.of("memory://bucket/a.pt"), Location(tmp_path / "a.safetensors"))
        with pytest.raises(UsageError, match=r"memory://bucket/a\.pt: expected a path"):
            RayEngine().run([item], Request(Location(Path()), "data.npy"), lethal.described, print)


@pytest.mark.usefixtures("root")
def test_an_address_is_for_ray() -> None:
    assert cli("--ray-address", "auto").exit_code == 2


@pytest.mark.parametrize(
    ("nodes", "device", "cpus", "expected"),
    [
        ([{"CPU": 2}], "auto", None, ClusterCapacity(2, 0, 1, 1)),
        ([{"CPU": 2}], "auto", 1, ClusterCapacity(1, 0, 2, 2)),
        ([{"CPU": 64}, {"CPU": 16}, {"CPU": 0}], "cpu", None, ClusterCapacity(8, 0, 10, 8)),
        ([{"CPU": 4}, {"CPU": 32, "GPU": 8}], "auto", None, ClusterCapacity(4, 1, 8, 8)),
        ([{"CPU": 4}, {"CPU": 32, "GPU": 8}], "cpu", None, ClusterCapacity(4, 0, 9, 8)),
        ([{"CPU": 4, "GPU": 8}], "cuda", None, ClusterCapacity(1, 1, 4, 4)),
    ],
)
def test_tasks_fill_the_cluster(
    nodes: list[dict[str, float]], device: str, cpus: int | None, expected: ClusterCapacity
) -> None:
    assert measure_capacity(nodes, device, cpus) == expected


def test_tasks_that_no_node_could_run() -> None:
    with pytest.raises(UsageError, match="at most 4"):
        measure_capacity([{"CPU": 4}], "cpu", 5)
    with pytest.raises(ClusterError, match="GPU"):
        measure_capacity([{"CPU": 4}], "cuda")
    with pytest.raises(ClusterError, match="CPU"):
        measure_capacity([{"CPU": 0}], "auto")
    with pytest.raises(UsageError, match="cuda:1"):
        measure_capacity([{"CPU": 4, "GPU": 2}], "cuda:1")
