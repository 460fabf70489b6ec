"""A Ray cluster: reached or started, and measured. Ray is imported here and nowhere else."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import ClusterError, UsageError
from ckpt_tools.jobs.many.ray_loopback import (
    loopback_cluster,
    read_authentication,
    require_loopback,
    temporary_environment,
)
from ckpt_tools.redaction import remember_secret

__all__ = ["ClusterCapacity", "connect_to_ray", "measure_capacity", "require_ray"]

_ANSWER = 10.0  # seconds in which an address must accept a connection and greet
_PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
)  # of HTTP/2, with settings (RFC 9113, 3.4)
_SETTINGS = 4  # the type of the frame that answers
_THREADS = 8  # CPUs of a task where the nodes have them: as many as decode images by default


@dataclass(frozen=True)
class ClusterCapacity:
    """What a task takes, and how many such tasks fit at once.

    ``tasks`` fit into the cluster, ``tasks_of_a_node`` into its largest node.
    """

    cpus: int
    gpus: int
    tasks: int
    tasks_of_a_node: int


@contextlib.contextmanager
def connect_to_ray(address: str | None) -> Iterator[Any]:
    """Connect Ray to ``address``, else to RAY_ADDRESS, else to a cluster that is started on this
    machine.

    A connection that the process has already is used and left alone. Ours is closed at the end, and
    a cluster that was started here is ended. Raises as ``require_ray`` does, and ClusterError if
    Ray does not start or something else answers.
    """
    ray = require_ray(address)
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    # By default Ray sends statistics of its use to its makers.
    usage_statistics = os.environ.get("RAY_USAGE_STATS_ENABLED", "0")
    with contextlib.ExitStack() as stack:
        stack.callback(read_authentication)  # last, when the environment is as it was
        stack.enter_context(temporary_environment(RAY_USAGE_STATS_ENABLED=usage_statistics))
        stack.callback(ray.shutdown)
        with _keep_sigterm_handler():
            if address == "local":
                _start(ray)
            else:
                _connect(ray, address)
        yield ray


def require_ray(address: str | None) -> Any:
    """Import Ray without connecting it.

    Raises UsageError if it is not installed or ``address`` is of another form, ClusterError if
    nobody answers there.
    """
    ray = _import_ray()
    if address := address or os.environ.get("RAY_ADDRESS"):
        # An address of Ray holds no password, but somebody may think that it does.
        remember_secret(address.rpartition("@")[0])
        _require_answer(address)
    return ray


def _import_ray() -> Any:
    try:
        with temporary_environment():
            return importlib.import_module("ray")
    except ImportError as error:
        raise UsageError(
            f"--engine ray: expected Ray to run on, found none ({error}). Run: pip install 'ckpt-tools[ray]'"
        ) from error


def _require_answer(address: str) -> None:
    """Raise ClusterError if nobody answers at an address. Ray itself would wait for minutes."""
    if address in ("local", "auto"):
        return
    if "://" in address:
        raise UsageError(
            f"--ray-address {address}: expected host:port or auto; a client's connection cannot "
            "stream results. Run ckpt-fix on a node of the cluster (ray job submit), or give "
            "the address of its head (port 6379)."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--ray-address {address}: expected host:port, such as 10.0.0.1:6379, or auto.")
    try:
        _greet(host.strip("[]"), int(port))
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"--ray-address {address}: expected the head of a Ray cluster to answer, found: "
            f"{error}. ray start --head prints its address."
        ) from error


def _greet(host: str, port: int) -> None:
    """Raise OSError unless a server of gRPC, which Ray's head is, answers.

    In TLS nothing is asked.
    """
    with socket.create_connection((host, port), timeout=_ANSWER) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        connection.sendall(_PREFACE)
        with connection.makefile("rb") as answer:
            if answer.read(9)[3:4] != bytes([_SETTINGS]):
                raise ConnectionError("a server that is not Ray's head")


def _start(ray: Any) -> None:
    """Start a cluster for this run, which nobody but this user of this machine can reach.

    Raises ClusterError.
    """
    with loopback_cluster():
        _connect(ray, "local")
    require_loopback(ray)


def _connect(ray: Any, address: str) -> None:
    # Ray puts the driver's current folder first on the path of its workers, where it would serve
    # every import, unless the job counts as one of a client. Workers find the user's code there as
    # the driver does.
    hide_folder = str(Path.cwd()) not in sys.path and "" not in sys.path
    job = ray.job_config.JobConfig(_client_job=hide_folder)
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address, job_config=job, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        state = "to start on this machine" if address == "local" else f"to be running at {address}"
        reason = str(error).rstrip(".")
        raise ClusterError(
            f"expected Ray {state}, found: {reason}. ray status says what is running; for one "
            "that asks for a token, set RAY_AUTH_MODE=token."
        ) from error


@contextlib.contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Restore the handler of SIGTERM, in whose place Ray puts its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def measure_capacity(
    nodes: Sequence[Mapping[str, float]], device: str, cpus: int | None = None
) -> ClusterCapacity:
    """What a task takes of a cluster whose nodes have these resources, and how many tasks fit.

    A task takes one GPU if ``device`` wants one, else none. ``cpus``: default 8, or what the
    smallest node has (for each of its GPUs). Raises UsageError, and ClusterError for a cluster on
    which such a task could never run.
    """
    if ":" in device:
        raise UsageError(
            f"--device {device}: expected auto, cpu or cuda with --engine ray, which picks the GPU."
        )
    working = [node for node in nodes if node.get("CPU", 0) >= 1]
    with_gpu = [node for node in working if node.get("GPU", 0) >= 1]
    if device == "cuda" and not with_gpu:
        raise ClusterError(
            "--device cuda: expected nodes with a GPU in the Ray cluster, found none. Try --device auto."
        )
    gpus = int(bool(with_gpu) and device != "cpu")
    if gpus:
        working = with_gpu
    if not working:
        raise ClusterError(
            "expected nodes with a CPU in the Ray cluster, found none. ray status lists its resources."
        )
    if cpus is None:
        fewest = min(int(node["CPU"] / (node["GPU"] if gpus else 1)) for node in working)
        cpus = max(1, min(_THREADS, fewest))
    tasks = [int(node["CPU"] // cpus) for node in working]
    if gpus:
        tasks = [min(count, int(node["GPU"])) for count, node in zip(tasks, working, strict=True)]
    if not any(tasks):
        largest = max(int(node["CPU"]) for node in working)
        raise UsageError(
            f"--ray-cpus {cpus}: expected at most {largest}, the CPUs of the cluster's largest node."
        )
    return ClusterCapacity(cpus, gpus, sum(tasks), max(tasks))
