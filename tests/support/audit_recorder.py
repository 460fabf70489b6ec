"""Takes down what a process does beyond what it may (files, sockets, processes, code) by audit events.

The standard library's events are listed at https://docs.python.org/3/library/audit_events.html.
Code in C++ or Rust opens files without one; for those the access times of the files that nobody may read
are compared.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType

# What Python, torch, numpy and the C library read of the system itself, and no folder of anybody's.
SYSTEM = (
    "/dev/null",
    "/dev/urandom",
    "/proc/self",
    f"/proc/{os.getpid()}",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/sys/kernel/random/boot_id",
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup",
)

_PROCESSES = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "pty.spawn",
}
_NEVER = _PROCESSES | {
    "builtins.input",
    "code.__new__",
    "cpython.run_command",
    "cpython.run_file",
    "cpython.run_interactivehook",
    "cpython.run_module",
    "ftplib.connect",
    "http.client.connect",
    "imaplib.open",
    "os.kill",
    "pickle.find_class",
    "poplib.connect",
    "signal.pthread_kill",
    "smtplib.connect",
    "subprocess.Popen",
    "syslog.syslog",
    "telnetlib.Telnet.open",
    "urllib.Request",
    "webbrowser.open",
}
_HARMLESS_SOCKETS = {"socket.gethostname"}  # the name of this machine, which temporary files carry
_LOOKED_AT = {"os.listdir": (0,), "os.scandir": (0,), "os.chdir": (0,), "shutil.copyfile": (0,)}
_CHANGED = {
    "os.chflags": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.link": (0, 1),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.setxattr": (0,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.utime": (0,),
    "shutil.chown": (0,),
    "shutil.copyfile": (1,),
    "shutil.copymode": (1,),
    "shutil.copystat": (1,),
    "shutil.copytree": (1,),
    "shutil.make_archive": (0,),
    "shutil.move": (0, 1),
    "shutil.rmtree": (0,),
    "shutil.unpack_archive": (0, 1),
    "tempfile.mkdtemp": (0,),
    "tempfile.mkstemp": (0,),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forbidden(OSError):
    """Raised in place of a connection or a new process, so that a failing test does no harm."""


@dataclass(frozen=True)
class Finding:
    """One deed: the event, what it was done to, and the command and the file that were being worked on."""

    event: str
    what: str
    command: str
    file: str


class Recorder:
    """An audit hook, which cannot be removed again but is deaf outside of ``watching``.

    ``readable``, ``writable``: folders below which files may be read, and below which they may be changed.
    ``strangers``: the folder of the checkpoints, from which no code may come.
    ``canary``: a word that only code in hostile files has.
    """

    def __init__(
        self, readable: Sequence[Path], writable: Sequence[Path], strangers: Path, canary: str
    ) -> None:
        self._writable = tuple(str(folder.resolve()) for folder in writable)
        self._readable = (*self._writable, *(str(folder.resolve()) for folder in readable))
        self._strangers, self._canary = str(strangers.resolve()), canary
        self._context: tuple[str, str] | None = None
        self.findings: dict[Finding, None] = {}
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self, command: Sequence[str], file: str) -> Iterator[None]:
        """Take down what happens in the block, in all threads."""
        self._context = (" ".join(command), file)
        try:
            yield
        finally:
            self._context = None

    def note(self, event: str, what: object) -> None:
        """Add a finding to the list."""
        command, file = self._context or ("", "")
        self.findings[Finding(event, f"{what!r:.300}", command, file)] = None

    def as_json(self) -> str:
        """All findings, for the process that started this one."""
        return json.dumps([asdict(finding) for finding in self.findings])

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._context is None:
            return
        if event == "open":
            self._file(event, arguments[0], _is_written(arguments[1], arguments[2]))
        elif event in ("exec", "compile"):
            self._code(event, arguments)
        elif event == "import":
            self._import(arguments)
        elif event == "ctypes.dlopen":
            if isinstance(arguments[0], str | bytes) and os.sep in os.fsdecode(arguments[0]):
                self._file(event, arguments[0], written=False)
        elif event in _NEVER or (event.startswith("socket.") and event not in _HARMLESS_SOCKETS):
            self.note(event, arguments)
            if event.startswith("socket.") or event in _PROCESSES | {"subprocess.Popen"}:
                raise Forbidden(f"{event} while hostile files are read")
        elif event == "os.putenv" and self._canary in os.fsdecode(arguments[0]):  # type: ignore[arg-type]
            self.note(event, arguments)
        else:
            for place in _LOOKED_AT.get(event, ()):
                self._file(event, arguments[place], written=False)
            for place in _CHANGED.get(event, ()):
                self._file(event, arguments[place], written=True)

    def _file(self, event: str, path: object, written: bool) -> None:
        if (
            not isinstance(path, str | bytes | os.PathLike) or not path
        ):  # a descriptor was opened before, and seen then
            return
        name = _absolute(os.fsdecode(path))
        if _below(name, SYSTEM) and (not written or name == "/dev/null"):
            return
        real = _resolved(name)
        if not _below(real, self._writable if written else self._readable):
            self.note(f"{event}, writing" if written else event, name if name == real else f"{name} → {real}")
        elif _below(real, (self._strangers,)) and real.endswith((".py", ".pyc", ".so")):
            self.note(f"{event} of code in the checkpoint's folder", name)

    def _code(self, event: str, arguments: tuple[object, ...]) -> None:
        code = arguments[0] if event == "exec" else arguments[1]
        name = code.co_filename if isinstance(code, CodeType) else str(code or "")
        source = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
        of_a_file = bool(name) and not name.startswith(
            "<"
        )  # <string> is what dataclasses and others generate
        if self._canary in source or (of_a_file and _below(_resolved(_absolute(name)), (self._strangers,))):
            self.note(event, f"{name} {source}")

    def _import(self, arguments: tuple[object, ...]) -> None:
        name, file, path = arguments[0], arguments[1], arguments[2]
        if str(name).partition(".")[0] in ("antigravity", "evil", "this"):
            self.note("import", name)
        if isinstance(file, str):
            self._file("import", file, written=False)
        for folder in path if isinstance(path, list) else ():
            if (not folder or folder.startswith(os.sep)) and _below(
                _resolved(_absolute(folder)), (self._strangers,)
            ):
                self.note("import with the checkpoint's folder on the path", (name, folder))


def _is_written(mode: object, flags: object) -> bool:
    if isinstance(mode, str):
        return not set(mode).isdisjoint("wax+")
    return isinstance(flags, int) and bool(flags & _WRITING)


def _below(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders)


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - without following links, which Path.resolve does


@functools.lru_cache(maxsize=100_000)
def _resolved(path: str) -> str:
    return os.path.realpath(path)
