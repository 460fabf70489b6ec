"""Temporary folders: living processes' stay, whatever else tells of them, and those of killed ones go."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tools.machine import temporary_folders
from ckpt_tools.machine.temporary_folders import (
    create_locked_folder,
    new_temporary_name,
    remove_abandoned_folders,
)
from ckpt_tools.storage.output.atomic_write import write_atomically

pytestmark = pytest.mark.skipif(temporary_folders.fcntl is None, reason="no locks on this system")


def in_child(act: Callable[[], object]) -> tuple[int, int]:
    """Run ``act`` in a forked child that then waits; its number, and what ends the wait when it is closed."""
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(done[1])
        act()
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.close(done[0])
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"x"
    os.close(ready[0])
    return child, done[1]


def ended(child: int, number: int = signal.SIGKILL) -> None:
    os.kill(child, number)
    os.waitpid(child, 0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stopped", [False, True])
def test_the_lock_of_a_process_decides(tmp_path: Path, stopped: bool) -> None:
    place = tmp_path / f".{new_temporary_name()}.tmp"

    def work() -> None:
        create_locked_folder(place)
        (place / "output").write_text("half")
        (place / "sub").mkdir()

    child, pipe = in_child(work)
    if stopped:
        os.kill(child, signal.SIGSTOP)
    os.utime(place, (0, 0))  # age tells nothing of a process on this kernel
    remove_abandoned_folders(tmp_path)
    assert names(place) == ["lock", "output", "sub"]
    ended(child)
    os.close(pipe)
    remove_abandoned_folders(tmp_path)
    assert names(tmp_path) == []


def test_a_fork_keeps_the_folder_of_its_parent(tmp_path: Path) -> None:
    claimed = create_locked_folder(tmp_path / new_temporary_name())
    child, pipe = in_child(claimed.remove_folder)  # as a child that leaves its parent's blocks does
    assert names(claimed.folder) == ["lock"]
    ended(child)
    os.close(pipe)
    remove_abandoned_folders(tmp_path)
    assert names(claimed.folder) == ["lock"]
    claimed.remove_folder()
    assert names(tmp_path) == []


def test_programs_that_a_run_starts_do_not_keep_its_folder(tmp_path: Path) -> None:
    place = tmp_path / new_temporary_name()

    def work() -> None:
        create_locked_folder(place)
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=keep[0], close_fds=False)

    keep = os.pipe()
    child, pipe = in_child(work)
    ended(child)
    remove_abandoned_folders(tmp_path)
    assert names(tmp_path) == []
    for descriptor in (*keep, pipe):
        os.close(descriptor)


def test_a_process_that_is_killed_before_it_has_its_lock_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / new_temporary_name()).mkdir()
    (tmp_path / new_temporary_name()).mkdir()
    (tmp_path / names(tmp_path)[0] / "lock").touch()
    remove_abandoned_folders(tmp_path)
    assert names(tmp_path) == []


def test_a_sweeper_that_comes_before_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the making of a folder and its lock anybody may take it for abandoned: it is made again."""
    lock_new, times = temporary_folders._lock_new, []

    def late(folder: Path) -> int | None:
        if len(times) < 3:
            times.append(1)
            remove_abandoned_folders(tmp_path)
        return lock_new(folder)

    monkeypatch.setattr(temporary_folders, "_lock_new", late)
    monkeypatch.setattr(temporary_folders, "_PAUSE", 0.0)
    claimed = create_locked_folder(tmp_path / new_temporary_name())
    remove_abandoned_folders(tmp_path)
    assert names(claimed.folder) == ["lock"]
    claimed.remove_folder()


def test_a_sweeper_that_comes_between_the_opening_of_the_lock_and_its_taking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_lock, times = temporary_folders._take_lock, []

    def late(descriptor: int) -> bool | None:
        times.append(1)
        if len(times) == 1:  # the second call is the sweeper's own
            remove_abandoned_folders(tmp_path)
        return take_lock(descriptor)

    monkeypatch.setattr(temporary_folders, "_take_lock", late)
    monkeypatch.setattr(temporary_folders, "_PAUSE", 0.0)
    claimed = create_locked_folder(tmp_path / new_temporary_name())
    assert names(claimed.folder) == ["lock"], "a lock on a file that is gone would protect nothing"
    claimed.remove_folder()


def test_many_that_claim_and_sweep_at_once(tmp_path: Path) -> None:
    def work(seed: int) -> None:
        source = random.Random(seed)
        for _ in range(60):
            claimed = create_locked_folder(tmp_path / new_temporary_name())
            (claimed.folder / "output").write_text("mine")
            for _ in range(source.randrange(3)):
                remove_abandoned_folders(tmp_path)
            assert (claimed.folder / "output").read_text() == "mine"
            if source.random() < 0.8:
                claimed.remove_folder()
            else:
                os.close(claimed.descriptor)  # as if killed

    children = []
    for seed in range(4):
        child = os.fork()
        if child == 0:
            try:
                work(seed)
            except BaseException:  # noqa: BLE001 - the parent says that it failed
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    remove_abandoned_folders(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("days", "kept"), [(0, True), (6, True), (8, False)])
def test_another_kernel_has_a_week(
    tmp_path: Path, days: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its locks may not be seen here; this machine has another identity after each start."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(temporary_folders, "_KERNEL", "f" * 16)
        place = tmp_path / new_temporary_name()
    place.mkdir()
    (place / "output").touch()
    for path in (place / "output", place):
        os.utime(path, (temporary_folders.time.time() - days * 86400,) * 2)
    remove_abandoned_folders(tmp_path)
    assert place.exists() == kept


def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary_folders, "_take_lock", lambda descriptor: None)
    claimed = create_locked_folder(tmp_path / new_temporary_name())
    remove_abandoned_folders(tmp_path)
    assert names(claimed.folder) == ["lock"]
    claimed.remove_folder()
    assert names(tmp_path) == []


def test_nothing_else_is_swept(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    found = [
        f".{new_temporary_name()}.tmp",
        new_temporary_name(),
        ".ckpt-tools-x.tmp",
        f"{new_temporary_name()}.pt",
        "ckpt-tools-1-2-3-4",
    ]
    (tmp_path / found[0]).symlink_to(precious)
    (tmp_path / found[1]).touch()
    for name in found[2:]:
        (tmp_path / name).mkdir()
    remove_abandoned_folders(tmp_path)
    assert names(tmp_path) == sorted([*found, "precious"])
    assert names(precious) == ["file"]


def test_links_in_an_abandoned_folder_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    place = tmp_path / new_temporary_name()
    place.mkdir()
    (place / "link").symlink_to(precious)
    (place / "lock").symlink_to(precious / "file")
    remove_abandoned_folders(tmp_path)
    assert names(precious) == ["file"]
    (place / "lock").unlink()
    remove_abandoned_folders(tmp_path)
    assert names(tmp_path) == ["precious"]
    assert names(precious) == ["file"]


def test_an_output_cannot_be_reached_before_it_is_whole(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "x", overwrite=False) as temporary:
        temporary.write_text("half")
        temporary.chmod(0o666)
        assert temporary.parent.parent == tmp_path
        assert temporary.parent.stat().st_mode & 0o777 == 0o700
        remove_abandoned_folders(tmp_path)
    assert names(tmp_path) == ["x"]
