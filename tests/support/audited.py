"""What test_audit starts: every hostile or odd file of the suite through the commands, in a watched process.

Prints a JSON list of what happened that may not happen. The current folder is empty at first.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import format_files
import hostile_contents
import hostile_folders
import malicious
import numpy as np
import torch
import torchmetrics  # noqa: F401 - brings matplotlib, which looks for fonts with a program when it is first imported
from audit_recorder import Recorder
from click.testing import CliRunner
from malicious import CANARY
from malicious_files import FILES, as_archive
from slow_files import SLOW

from ckpt_tools.cli import main

ROOT = Path(__file__).parents[2]
WORK, OUTSIDE = Path("work").absolute(), Path("outside").absolute()
ARCH = ("--arch", "malicious:Net")
PLAIN = ("--device", "cpu", "--batch-size", "4", "-q", "--overwrite", "-o", "../out/x.safetensors")
TAKES_LONG = (
    "a key of many prefixes",
    "a list of parameters without an end",
    "a million memo entries",
    "a module in thousands of places",
    "complex keys with one hash",
    "keys of an OrderedDict with one hash",
    "modules that unfold without end",
    "states merged again and again",
)
UNKNOWN_CLASSES = (
    "a class by its dotted name",
    "a class by a path",
    "a class that is no model",
    "a class of ours",
)
FORMATS = [
    maker
    for maker in format_files.FORMATS
    if not maker.__name__.startswith(("exported", "scripted", "traced", "hugging"))
]

Case = tuple[str, str, list[list[str]]]  # the file, how it is called in a finding, and the commands


def recorder() -> Recorder:
    """For reading: checkpoints, data, what is installed, this tree. For writing: outputs, temporary files."""
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    own = (
        "ckpt_tools",
        "adapters",
        "tests",
        "ckpt_tools.egg-info",
    )  # the last is written by an editable installation
    places = [sys.prefix, sys.base_prefix, *(ROOT / part for part in own)]
    return Recorder(
        readable=[WORK, *installed, *map(Path, places)],
        writable=[WORK / "out", Path(tempfile.gettempdir())],
        strangers=WORK,
        canary=CANARY,
    )


def commands(
    path: str, arch: tuple[str, ...] = (), images: str = "images.npy", labelled: str = "labelled.npz"
) -> list[list[str]]:
    """The five commands on a checkpoint."""
    return [
        ["inspect", path, *arch],
        ["convert", path, "-o", "../out/c.safetensors", "--overwrite"],
        ["diff", path, "../other.pt"],
        ["evaluate", path, "--data", f"../{labelled}", *arch, "--device", "cpu"],
        ["bn-reestimate", path, "--data", f"../{images}", *arch, *PLAIN],
    ]


def files() -> Iterator[Case]:
    """The malicious files, as the checkpoint, as its metadata, and as data."""
    makers: dict[str, Callable[[], bytes]] = {**malicious.PICKLES, **FILES, **hostile_contents.FILES}
    for number, (label, make) in enumerate(makers.items()):
        content = make()
        Path("state.pt").write_bytes(content)
        todo = commands("state.pt", ARCH)
        if label in SLOW or label in TAKES_LONG:  # each command reads it alike
            todo = [todo[number % len(todo)]]
        elif label in malicious.CODE_PICKLES:
            todo += elsewhere(content, number)
        yield label, "state.pt", todo
    for number, (label, make) in enumerate(malicious.TENSORS.items()):
        Path("state.pt").write_bytes(as_archive(make()))
        yield f"{label}, in an archive", "state.pt", [commands("state.pt", ARCH)[number % 5]]


def elsewhere(content: bytes, number: int) -> list[list[str]]:
    """A pickle in other places that one is read from: metadata, and two kinds of data."""
    for place in ("distributed/.metadata", "sets/cifar-100-python/train"):
        Path(place).parent.mkdir(parents=True)
        Path(place).write_bytes(content)
    data = ("state.pt", "cifar100:sets")[number % 2]
    return [
        ["convert", "distributed", "-o", "../out/c.safetensors"],
        ["bn-reestimate", "../other.pt", "--data", data, *ARCH, *PLAIN],
    ]


def arrays() -> Iterator[Case]:
    """Data that lies about itself."""
    for label, (file, make) in hostile_contents.ARRAYS.items():
        Path(file).write_bytes(make())
        yield label, file, [["bn-reestimate", "../other.pt", "--data", file, *ARCH, *PLAIN]]
    for label, fill in hostile_folders.DATA.items():
        data = fill(Path(), OUTSIDE)
        yield label, data, [["bn-reestimate", "../other.pt", "--data", data, *ARCH, *PLAIN]]


def folders() -> Iterator[Case]:
    """Folders in the layout of Hugging Face, indices, and words of the checkpoint that lead elsewhere."""
    for label, fill in hostile_folders.FOLDERS.items():
        Path("hub").mkdir()
        fill(Path("hub"), OUTSIDE)
        todo = commands("hub", images="pictures.npy", labelled="pictures.npz")
        if any(
            words in label for words in UNKNOWN_CLASSES
        ):  # a second to say which classes have similar names
            todo.remove(todo[3])
        yield label, "hub", todo
    for label, words in hostile_folders.WORDS.items():
        torch.save({"state_dict": hostile_folders.STATE, **words(OUTSIDE)}, "said.pt")
        yield (
            f"words, {label}",
            "said.pt",
            commands("said.pt", images="pictures.npy", labelled="pictures.npz"),
        )


def manifests() -> Iterator[Case]:
    """Records of an earlier run that name files elsewhere, where a run of a folder resumes."""
    for number, (label, records) in enumerate(hostile_folders.MANIFESTS.items()):
        torch.save(malicious.Net().state_dict(), "a.pt")
        out = Path("../out", str(number))
        out.mkdir()
        lines = [json.dumps({"ckpt_tools": "0.1.0", **record}) for record in records(OUTSIDE)]
        (out / "ckpt-fix.jsonl").write_text("".join(f"{line}\n" for line in lines))
        command = [
            "bn-reestimate",
            ".",
            "--data",
            "../images.npy",
            *ARCH,
            "--output-dir",
            str(out),
            "--device",
            "cpu",
            "-q",
        ]
        yield f"manifest, {label}", str(out / "ckpt-fix.jsonl"), [command]


def formats() -> Iterator[Case]:
    """Sound files of every format, which are odd enough."""
    model = format_files.trained()
    for maker in FORMATS:
        path = maker(model, Path.cwd())
        arch = ("--arch", "format_files:Net", "--input-size", "3,8,8")
        yield maker.__name__, path.name, commands(path.name, arch, "small.npy", "small.npz")


def prepare() -> list[Path]:
    """The files that all commands share, and the secrets."""
    for folder in (WORK, OUTSIDE, WORK / "out"):
        folder.mkdir()
    torch.manual_seed(0)
    torch.save(malicious.Net().state_dict(), WORK / "other.pt")
    rng = np.random.default_rng(0)
    for name, shape in {"images": (8, 4), "pictures": (8, 3, 32, 32), "small": (8, 3, 8, 8)}.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        np.save(WORK / f"{name}.npy", values)
        np.savez(WORK / f"{name.replace('images', 'labelled')}.npz", images=values, labels=np.arange(8) % 4)
    return hostile_folders.fill_outside(OUTSIDE)


def controls(watch: Recorder) -> None:
    """Deeds that must be found, lest an empty list means nothing."""
    import ctypes
    import importlib
    import pickle
    import socket
    import subprocess

    os.chdir(WORK)
    Path("theirs.py").write_text("")
    deeds: dict[str, Callable[[], object]] = {
        "open": lambda: (OUTSIDE / "secret.pt").read_bytes(),
        "open through a link": lambda: Path("link").read_bytes(),
        "write beside the checkpoint": lambda: Path("note").write_text(""),
        "a socket": lambda: socket.create_connection(("127.0.0.1", 9), 1),
        "a process": lambda: subprocess.run(["true"], check=False),
        "a shell": lambda: os.system("true"),
        "a fork": os.fork,
        "an import": lambda: importlib.import_module("theirs"),
        "an execution": lambda: exec(compile("1", "theirs.py", "exec")),
        "a pickle": lambda: pickle.loads(pickle.dumps(Path)),
        "a library": lambda: ctypes.CDLL(str(OUTSIDE / "evil.py")),
        "a removal": lambda: Path("theirs.py").unlink(),
        "a listing": lambda: list(OUTSIDE.iterdir()),
        "a prompt": lambda: input(),
    }
    Path("link").symlink_to(OUTSIDE / "secret.pt")
    sys.path.append(str(Path.cwd()))
    for label, deed in deeds.items():
        before = len(watch.findings)
        with watch.watching([label], "control"):
            try:
                deed()
            except (OSError, EOFError, RuntimeError):
                continue
            finally:
                assert len(watch.findings) > before, f"not seen: {label}"
    sys.path.remove(str(Path.cwd()))
    watch.findings.clear()


def run(watch: Recorder, label: str, file: str, todo: list[list[str]]) -> None:
    """The commands on one file; after each, whether its code has run or its folder has become importable."""
    for command in todo:
        with watch.watching(command, f"{label} ({file})"):
            result = CliRunner().invoke(main, command)
            if CANARY in os.environ or list(Path().rglob(f"*{CANARY}*")):
                watch.note("the canary", os.environ.pop(CANARY, ""))
            if result.exit_code not in (0, 1, 2, 3, 4) or "Traceback" in result.output:
                watch.note("the end", (result.exit_code, result.output[-300:]))


def in_fresh_folders(make: Callable[[], Iterator[Case]]) -> Iterator[Case]:
    """The cases, each made in a current folder of its own."""
    cases = make()
    for number in itertools.count():
        folder = WORK / f"{make.__name__}-{number}"
        folder.mkdir()
        os.chdir(folder)
        case = next(cases, None)
        if case is None:
            return
        yield case


def main_of_the_audit() -> None:
    """Print the findings, and on stderr how much was done."""
    secrets = prepare()
    watch = recorder()
    controls(watch)
    for (
        secret
    ) in secrets:  # even where access times are kept seldom (relatime), the next reading changes this one
        os.utime(secret, (0, secret.stat().st_mtime))
    runs = 0
    for make in (files, arrays, folders, manifests, formats):
        for label, file, todo in in_fresh_folders(make):
            run(watch, label, file, todo)
            runs += len(todo)
    if access_times_are_kept():
        for secret in secrets:
            if secret.stat().st_atime != 0:
                watch.note("read, as its time of access says", str(secret))
    sys.stderr.write(f"{runs} commands\n")
    sys.stdout.write(watch.as_json())


def access_times_are_kept() -> bool:
    """Some file systems are mounted without."""
    probe = WORK / "probe"
    probe.write_text("x")
    os.utime(probe, (0, probe.stat().st_mtime))
    probe.read_text()
    return probe.stat().st_atime != 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main_of_the_audit()
