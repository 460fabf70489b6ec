"""Faults from outside, injected: the output is then whole and verified, or absent; the next run cleans up."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckpt_tools.cli import error_boundary, main
from ckpt_tools.data import prefetch
from ckpt_tools.data.images import image_files
from ckpt_tools.data.images.image_folder import FolderSource
from ckpt_tools.data.prefetch import read_ahead, track_reading
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import DataError
from ckpt_tools.machine import temporary_folders
from ckpt_tools.storage.output import atomic_write, patching, safetensors_writer
from stress import trials

SHAPE = (3, 8, 8)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a checkpoint, and its training data."""
    monkeypatch.chdir(tmp_path)
    batches = nets.batches(SHAPE)
    np.save(tmp_path / "data.npy", torch.cat(batches).numpy())
    save_file(nets.trained(nets.DenseNet(), batches).state_dict(), tmp_path / "m.safetensors")
    return tmp_path


def cli(checkpoint: str = "m.safetensors", *more: str, arch: str = "nets:DenseNet") -> Result:
    data = ["--data", "data.npy", "--arch", arch, "--batch-size", "16", "-q"]
    return CliRunner().invoke(main, ["bn-reestimate", *data, *more, "--", checkpoint])


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have something happen after the pass and the checks, while the output is written."""
    verified = patching.verify_and_hash

    def late(*arguments: object) -> str:
        act()
        return verified(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(patching, "verify_and_hash", late)


# --- kills --------------------------------------------------------------------------------------------------


def test_twenty_kills(tmp_path: Path) -> None:
    jobs = tuple(
        job for job in trials.JOBS if job.name in ("one .safetensors", "overwrite, report", "convert")
    )
    book = trials.run_trials(trials.Stress(tmp_path, jobs), 20, seed=0)
    assert not book.failures, book.failures[0]
    assert book.kills.total() == 20


def test_the_folder_of_a_living_run_is_kept_and_that_of_a_killed_one_goes(root: Path) -> None:
    living = temporary_folders.create_locked_folder(root / f".{temporary_folders.new_temporary_name()}.tmp")
    (root / f".{temporary_folders.new_temporary_name()}.tmp").mkdir()
    assert cli().exit_code == 0
    assert files(root) == {"data.npy", "m.safetensors", "m.bn.safetensors", living.folder.name}
    living.remove_folder()


def test_what_a_library_was_writing_is_swept_with_its_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors has a temporary file of its own, under a name that says nothing of whose it is."""
    killed = root / f".{temporary_folders.new_temporary_name()}.tmp"
    killed.mkdir()
    (killed / ".tmpAbCdEf").touch()
    torch.save(load_file(root / "m.safetensors"), root / "m.pt")
    beside: set[str] = set()

    def watched(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        beside.update(one.name for one in path.parent.parent.iterdir() if one.is_file())
        save_file(tensors, path, metadata)

    monkeypatch.setattr(safetensors_writer, "save_file", watched)
    assert cli("m.pt").exit_code == 0
    assert beside == {"data.npy", "m.safetensors", "m.pt"}
    assert files(root) == {"data.npy", "m.safetensors", "m.pt", "m.bn.safetensors"}


# --- the disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize(
    "call",
    [(patching, "write_parts"), (patching.os, "fsync"), (atomic_write, "_move")],
    ids=["write", "fsync", "rename"],
)
def test_disk_full(
    root: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[object, str], number: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(*call, full)
        result = cli()
    assert result.exit_code == 1
    assert os.strerror(number) in result.stderr
    assert "Nothing was left behind" in result.stderr
    assert files(root) == {"data.npy", "m.safetensors"}


# --- the target, and the source -----------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "link to the source", "dangling link"])
def test_target_that_is_replaced_meanwhile(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, overwrite: bool
) -> None:
    target, source = root / "m.bn.safetensors", root / "m.safetensors"
    before = source.read_bytes()
    act = {
        "folder": target.mkdir,
        "file": lambda: target.write_text("precious"),
        "link to the source": lambda: target.symlink_to(source),
        "dangling link": lambda: target.symlink_to(root / "nowhere"),
    }[kind]
    meanwhile(monkeypatch, act)
    result = cli("m.safetensors", *["--overwrite"] * overwrite)
    assert source.read_bytes() == before
    assert files(root) == {"data.npy", "m.safetensors", "m.bn.safetensors"}
    assert result.exit_code == (0 if overwrite and kind != "folder" else 1)
    if result.exit_code == 0:
        assert not target.is_symlink()
        assert load_file(target).keys() == load_file(source).keys()
    elif kind == "file":
        assert target.read_text() == "precious"


def test_folder_that_vanishes_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "out").mkdir()
    meanwhile(monkeypatch, lambda: (root / "out").rename(root / "gone"))
    result = cli("m.safetensors", "-o", "out/x.safetensors")
    assert result.exit_code == 1
    assert "No such file" in result.stderr
    assert not (root / "out").exists()


@pytest.mark.parametrize("how", ["in place", "anew", "touched", "cut off"])
def test_source_that_is_modified_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    source = root / "m.safetensors"
    content = source.read_bytes()

    def modify() -> None:
        if how == "anew":
            source.unlink()
        if how == "touched":
            os.utime(source)
        elif how == "cut off":
            os.truncate(source, len(content) - 4096)
        else:
            with source.open("r+b" if how == "in place" else "wb") as file:
                file.write(content[:-1] + b"x")

    # while the pass runs: nothing of the source is mapped any more when the output is begun
    monkeypatch.setattr("ckpt_tools.jobs.reestimation._collect_skipped", lambda plan: modify() or ())
    result = cli()
    assert result.exit_code == 1
    assert "m.safetensors" in result.stderr
    assert "bug" not in result.stderr
    assert files(root) == {"data.npy", "m.safetensors"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_race_for_one_output(root: Path, overwrite: bool) -> None:
    assert cli("m.safetensors", "-o", "alone.safetensors").exit_code == 0
    more = ["-o", "one.safetensors", *["--overwrite"] * overwrite]
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os._exit(cli("m.safetensors", *more).exit_code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) in ([[0, 0]] if overwrite else [[0, 1]])
    assert (root / "one.safetensors").read_bytes() == (root / "alone.safetensors").read_bytes()
    assert files(root) == {"data.npy", "m.safetensors", "alone.safetensors", "one.safetensors"}


# --- readers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_decode_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(prefetch, "READ_TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(prefetch, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(prefetch, "_SHUTDOWN_SECONDS", 0.01)
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    forever, read, warm = threading.Event(), image_files._decode_image, False

    def hang(file: Path, transform: object) -> Tensor:
        if file.name == "7.png" and warm:
            forever.wait()
        return read(file, transform)  # type: ignore[arg-type]

    monkeypatch.setattr(image_files, "_decode_image", hang)
    spec = image_files.InputSpec(SHAPE, mean=(0.5,) * 3, std=(0.5,) * 3)
    stream = FolderSource.open("train", tmp_path, limit=None, seed=0).batches(
        spec, Reading(batch_size=8, workers=workers)
    )
    list(stream)  # the first image imports what decodes it
    warm = True
    try:
        with pytest.raises(DataError, match=r"^train: 7\.png: not read after .* leave it out"):
            list(stream)
        hung = [thread for thread in threading.enumerate() if thread.name.startswith("ckpt-tools-reader")]
        assert hung
        assert all(thread.daemon for thread in hung)
    finally:
        forever.set()
    for thread in hung:
        thread.join()


def test_a_reader_that_dies() -> None:
    def die() -> None:
        with track_reading("x.png"):
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(read_ahead([[die]], 2))
    assert not prefetch._current_files


# --- memory -------------------------------------------------------------------------------------------------


class Greedy(nets.DenseNet):
    """Short of memory for more samples than ``most`` at once."""

    def __init__(self, most: int = 4) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most and not x.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)


NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


def test_memory_that_runs_out(root: Path) -> None:
    result = cli(arch="test_faults:Greedy")
    assert result.exit_code == 0, result.stderr
    assert "memory" in result.stdout
    result = cli("m.safetensors", "--overwrite", "--model-kwargs", "most=0", arch="test_faults:Greedy")
    assert result.exit_code == 1
    assert "not even one sample fits into memory" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(NO_MEMORY),
    ],
)
def test_memory_that_runs_out_elsewhere(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    result = cli()
    assert result.exit_code == 1
    assert "memory ran out" in result.stderr
    assert "--batch-size" in result.stderr
    assert files(root) == {"data.npy", "m.safetensors"}


# --- names and clocks ---------------------------------------------------------------------------------------

NAMES = {
    "spaces": " a  b .pt",
    "newline": "a\nb.pt",
    "unicode": "ä→🙂.pt",
    "undecodable": os.fsdecode(b"a\xff.pt"),
    "dash": "-o.pt",
    "only an extension": ".pt",
    "as long as it can be": "x" * (255 - len(".bn.safetensors")) + ".pt",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names(root: Path, name: str) -> None:
    with (root / name).open("wb") as file:  # torch itself takes not every name
        torch.save(load_file(root / "m.safetensors"), file)
    (root / "m.safetensors").unlink()
    result = cli(name)
    assert result.exit_code == 0, result.stderr
    output = f"{name.removesuffix('.pt')}.bn.safetensors".removeprefix(".")
    assert files(root) == {"data.npy", name, output}


def test_a_name_that_is_too_long_for_an_output(root: Path) -> None:
    name = "x" * 252 + ".pt"
    (root / "m.safetensors").rename(root / name)
    result = cli(name)
    assert result.exit_code == 1
    assert "File name too long" in result.stderr
    assert cli(name, "-o", "short.safetensors").exit_code == 0


@pytest.mark.parametrize("seconds", [-(1 << 31), 0, 1 << 33], ids=["1901", "1970", "2242"])
def test_clocks(root: Path, monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "-1e9")
    for name in ("m.safetensors", "data.npy"):
        os.utime(root / name, (seconds, seconds))
    assert cli("m.safetensors", "--report", "r.json").exit_code == 0


def test_an_interrupt_that_a_library_makes_an_error_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 0)
        except KeyboardInterrupt as error:
            raise ValueError("an error of a library") from error

    meanwhile(monkeypatch, interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        assert cli().exit_code == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert files(root) == {"data.npy", "m.safetensors"}


def test_interrupt_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = cli()
    assert result.exit_code == 130
    assert "no unfinished output is left" in result.stderr
    assert files(root) == {"data.npy", "m.safetensors"}


def test_an_interrupt_as_the_command_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def late(*_: object) -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr(error_boundary, "open_mirror", late)
    assert cli().exit_code == 130
    assert files(root) == {"data.npy", "m.safetensors", "m.bn.safetensors"}


def test_an_interrupt_behind_the_command_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(error_boundary.ErrorBoundary, "invoke", interrupt)
    # Whoever starts the tests in the background makes them ignore the signal.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert CliRunner().invoke(main, ["inspect", "x.pt"]).exit_code == 130
    finally:
        signal.signal(signal.SIGINT, previous)
