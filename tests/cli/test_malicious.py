"""Every trick of malicious.py and malicious_files.py by every command: no canary, no crash, no traceback."""

from __future__ import annotations

import copyreg
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from malicious import CANARY, CODE_PICKLES, PICKLES, TENSORS, Net
from malicious_files import FILES, as_archive, as_legacy
from slow_files import SLOW

from ckpt_tools.cli import main
from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.reading import read_checkpoint

ALL: dict[str, Callable[[], bytes]] = {
    **PICKLES,
    **{
        f"{label}, archive": (lambda make=make: as_archive(make()))
        for label, make in (CODE_PICKLES | TENSORS).items()
    },
    **{f"{label}, legacy": (lambda make=make: as_legacy(make())) for label, make in CODE_PICKLES.items()},
    **FILES,
}
COMMANDS = [
    ["inspect", "state.pt", "--json"],
    ["bn-reestimate", "state.pt", "--data", "images.npy", "--arch", "malicious:Net"],
    ["diff", "state.pt", "other.pt"],
    ["diff", "other.pt", "state.pt"],
    ["init-rewrite", "state.pt", "--arch", "malicious:Net"],
    ["convert", "state.pt"],
    ["inspect", "state.pt", "--arch", "malicious:Net"],
    ["evaluate", "state.pt", "--data", "labelled.npz", "--arch", "malicious:Net"],
    ["evaluate", "other.pt", "--before", "state.pt", "--data", "labelled.npz", "--arch", "malicious:Net"],
    ["bn-reestimate", "runs", "--data", "images.npy", "--arch", "malicious:Net", "-q"],
    ["bn-reestimate", "other.pt", "--data", "state.pt", "--arch", "malicious:Net"],
    ["bn-reestimate", "other.pt", "--data", "cifar100:sets", "--arch", "malicious:Net"],
    ["convert", "distributed"],
]
FORBIDDEN = frozenset(
    {"import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.putenv"}
)
FORBIDDEN |= {
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
    "os.remove",
    "shutil.rmtree",
    "marshal.loads",
}


class Watch:
    """Takes down what no reader may do, and files opened for writing.

    An audit hook cannot be removed again.
    """

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(args[1], str) and not set(args[1]).isdisjoint("wax+")
        if event in FORBIDDEN or writes:
            self.seen.append(f"{event} {args!r:.200}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.seen, self.on = [], True
        try:
            yield
        finally:
            self.on = False


WATCH = Watch()


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What we import on first use is imported before anything is watched."""
    path = tmp_path_factory.mktemp("good") / "good.pt"
    torch.save({"w": torch.ones(3)}, path)
    read_checkpoint(path)


@pytest.fixture(autouse=True)
def _canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    called: list[object] = []
    monkeypatch.setattr(copyreg, "_inverted_registry", {0xF0: ("os", "system"), 0xF0F1: ("os", "system")})
    monkeypatch.setattr(
        copyreg, "_extension_cache", {0xF0: called.append, 0xF0F1: called.append, 0xF0F1F2: called.append}
    )
    before = set(sys.modules)
    yield
    assert not called
    assert not list(tmp_path.rglob(f"*{CANARY}*"))
    assert CANARY not in os.environ
    assert not {"this", "antigravity", "evil", "idlelib", "pdb"} & (set(sys.modules) - before)


def test_the_corpus_is_large() -> None:
    assert len(PICKLES) + len(FILES) >= 250
    assert len({make() for make in PICKLES.values()}) == len(PICKLES)
    assert len(CODE_PICKLES) >= 60


@pytest.mark.parametrize(
    "label", ["builtins.eval", "functools.partial", "INST", "OBJ", "protocol 4 of pickle itself"]
)
def test_the_canary_would_sing(tmp_path: Path, label: str) -> None:
    pickle.loads(PICKLES[label]())
    (tmp_path / CANARY).unlink()


@pytest.mark.parametrize("label", ALL)
def test_reading_does_nothing(tmp_path: Path, label: str) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(ALL[label]())
    modules = set(sys.modules)
    found: dict[str, torch.Tensor] = {}
    with suppress(CheckpointError), WATCH.watching():
        found = dict(read_checkpoint(path).tensors)
    assert WATCH.seen == []
    assert set(sys.modules) == modules
    for tensor in found.values():
        assert type(tensor) is torch.Tensor
        assert tensor.numel() <= 4
        assert tensor.tolist() == [1, 2, 3, 4][: tensor.numel()]


def run(folder: Path, label: str, commands: list[list[str]]) -> None:
    content = ALL[label]()
    places = ("state.pt", "runs/a/state.pt", "sets/cifar-100-python/train", "distributed/.metadata")
    for place in places:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)
    torch.save(Net().state_dict(), folder / "other.pt")
    torch.save(Net().state_dict(), folder / "runs" / "b.pt")
    np.save(folder / "images.npy", np.zeros((4, 4), "f4"))
    np.savez(folder / "labelled.npz", images=np.zeros((4, 4), "f4"), labels=np.arange(4))
    for command in commands:
        result = CliRunner().invoke(main, command)
        assert result.exit_code in (0, 1, 3, 4), (command, result.output)
        assert isinstance(result.exception, SystemExit | None), (command, result.exc_info)
        assert "Traceback" not in result.output


@pytest.mark.parametrize(("at", "label"), list(enumerate([*PICKLES, *FILES])))
def test_commands_answer_with_an_error(tmp_path: Path, at: int, label: str) -> None:
    run(tmp_path, label, [COMMANDS[at % len(COMMANDS)]])


@pytest.mark.zoo
@pytest.mark.parametrize("label", [*PICKLES, *FILES])
def test_every_command_answers_with_an_error(tmp_path: Path, label: str) -> None:
    run(tmp_path, label, COMMANDS[:: 1 if label not in SLOW else 3])
