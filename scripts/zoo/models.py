"""The models that `scripts/run zoo` goes through, one process for each."""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ckpt_tools.contract import InputSpec
from ckpt_tools.errors import CkptToolsError
from ckpt_tools.identify import plugins

DEADLINE = 1800.0  # seconds for one model


@dataclass(frozen=True)
class Checked:
    """How the check of one model went. ``failure`` is empty if it went well."""

    architecture: str
    failure: str = ""


class Check(Protocol):
    def __call__(self, architecture: str, /) -> Checked: ...


def architectures(pattern: str) -> Iterator[str]:
    for prefix in ("timm", "torchvision"):
        for name in plugins.adapter(prefix).architectures():
            if fnmatch.fnmatch(f"{prefix}:{name}", pattern):
                yield f"{prefix}:{name}"


def build(architecture: str) -> tuple[nn.Module, InputSpec | None]:
    """The bare model, on the meta device where its constructor allows that."""
    adapter, name = plugins.resolve(architecture)
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = adapter.build(name, {})
            return model, adapter.input_spec(model, name, {})
        except (CkptToolsError, RuntimeError, NotImplementedError):
            if device == "cpu":
                raise
    raise AssertionError


def example(
    model: nn.Module, spec: InputSpec | None, samples: int = 2, make: Callable[..., Tensor] = torch.zeros
) -> object:
    """The input, or every input that the forward cannot do without (RAFT wants two images)."""
    shape = spec.shape if spec is not None else (3, 224, 224)
    required = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is parameter.empty
    ]
    named = [name for name in required if name not in ("args", "kwargs")]
    return {name: make(samples, *shape) for name in named} if len(named) > 1 else make(samples, *shape)


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:240]


def check_all(check: Check, names: list[str], jobs: int, log: Path | None) -> list[Any]:
    """Return the result of `check` for every model, sorted by name.

    With `log`, a JSON line is written for each as soon as it is there.
    """
    results = []
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(log.open("a")) if log else None
        for result in tqdm(
            _in_processes(check, names, jobs), total=len(names), unit="model", file=sys.stderr
        ):
            results.append(result)
            if lines:
                print(json.dumps(asdict(result)), file=lines, flush=True)
    return sorted(results, key=lambda result: result.architecture)


def _in_processes(check: Check, names: Iterable[str], jobs: int) -> Iterator[Checked]:
    """Run every check in a process of its own.

    A model that runs out of memory takes nothing else with it.
    """
    # Forked after the imports: a fresh interpreter a model would import torch, timm and torchvision
    # again.
    context, waiting = get_context("fork"), iter(names)
    running: dict[Connection, tuple[str, Any, float]] = {}
    while True:
        while len(running) < jobs and (name := next(waiting, None)) is not None:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(check, name, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic())
        if not running:
            return
        ready = wait(list(running), timeout=10)
        for receiver, (name, process, started) in list(running.items()):
            late = time.monotonic() - started > DEADLINE
            if receiver not in ready and not late:
                continue
            del running[receiver]
            if receiver not in ready:
                process.kill()
            yield _receive(receiver, name, process, late)


def _answer(check: Check, name: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.suppress(OSError):  # where memory runs out, this is the process to end
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        sender.send(check(name))
    except BaseException as error:
        sender.send(Checked(name, brief(error)))


def _receive(receiver: Connection, name: str, process: Any, late: bool) -> Any:
    try:
        with receiver:
            return receiver.recv()
    except EOFError:
        process.join()
        killed = " (killed, most likely for memory)" if process.exitcode == -9 else ""
        ended = f"its process ended with {process.exitcode}{killed}"
        return Checked(name, f"took more than {DEADLINE:.0f} s" if late else ended)
    finally:
        process.join(10)
        process.kill()
