"""What is appended to or replaced untold must be this tool's own: manifests, reports and pictures."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_facts import facts, records

from ckpt_tools.cli import main
from ckpt_tools.errors import CkptToolsError, OutputError, UsageError
from ckpt_tools.location import Location
from ckpt_tools.remote.mirror import open_mirror
from ckpt_tools.report.marks import add_mark, is_own_report
from ckpt_tools.report.pages import signals_figure
from ckpt_tools.report.records.manifest import Manifest, check_manifest
from ckpt_tools.report.report_files import check_reports, write_report
from ckpt_tools.storage.files.input_files import files_of_checkpoint

SUFFIXES = (".html", ".md", ".json")
RECORD: dict[str, Any] = {
    **{
        "checkpoint": "runs/a.pt",
        "status": "done",
        "output": "fixed/a.bn.safetensors",
        "error": None,
        "exit_code": 0,
    },
    **{"seconds": 1.5, "source_sha256": "a" * 64, "settings": "b" * 16, "metrics": None, "report": {}},
}
NEWER = {"output_sha256": "c" * 64, "output_bytes": 9, "replaced": None}


def line(**more: object) -> bytes:
    return json.dumps({**RECORD, **NEWER, **more}).encode() + b"\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", torch.cat(nets.batches((3, 8, 8))).numpy())
    Path("runs").mkdir()
    for name in ("a", "b"):
        torch.save(nets.DenseNet().state_dict(), f"runs/{name}.pt")
    return tmp_path


def cli(*more: str) -> Result:
    data = ["--data", "data.npy", "--arch", "nets:DenseNet", "--batch-size", "16", "--force", "-q"]
    return CliRunner().invoke(main, ["bn-reestimate", *data, *more])


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All that is below a folder, links as what they hold, with the times of the last change."""
    return {
        str(path.relative_to(folder)): (
            bytes(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b"",
            path.lstat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


# --- what stands in the way ---------------------------------------------------------------------------------


def put(kind: str, path: Path, own: bytes) -> None:
    """Something of that name that must stay as it is; ``own`` is what this tool itself would have written."""
    other = path.parent / "other"
    if kind == "link to a file of our own":
        other.write_bytes(own)
        path.symlink_to(other)
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "second name":
        other.write_bytes(own)
        path.hardlink_to(other)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"notes on ckpt-tools\n")


KINDS = [
    "link to a file of our own",
    "dangling link",
    "link to itself",
    "second name",
    "folder",
    "pipe",
    "notes",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reports(tmp_path: Path, kind: str, suffix: str) -> None:
    write_report(tmp_path / f"own{suffix}", facts())
    path = tmp_path / f"out{suffix}"
    put(kind, path, (tmp_path / f"own{suffix}").read_bytes())
    before = tree(tmp_path)
    for act in (lambda: check_reports([path]), lambda: write_report(path, facts())):
        with pytest.raises(OutputError, match="--report"):
            act()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_manifests(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ckpt-fix.jsonl"
    put(kind, path, line())
    before = tree(tmp_path)
    for act in (lambda: check_manifest(path), lambda: Manifest(path)):
        with pytest.raises(OutputError, match="--manifest"):
            act()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "more",
    [
        ["runs", "--output-dir", "fixed", "--manifest", "link"],
        ["runs", "--output-dir", "fixed", "--report", "notes.md"],
        ["runs", "--output-dir", "fixed", "--report", "new.md", "--report", "notes.md", "--overwrite"],
        ["runs", "--output-dir", "fixed", "--report", "none/new.md"],
        ["runs", "--output-dir", "fixed", "--report", "fixed/below/new.md"],
        ["runs", "--output-dir", "fixed", "--manifest", "fixed/a.bn.safetensors"],
        ["runs", "--output-dir", "fixed", "--manifest", "m.md", "--report", "m.md"],
        ["runs", "--manifest", "folder/../data.npy"],
        ["runs/a.pt", "--report", "notes.md", "--overwrite"],
        ["runs/a.pt", "--report", "other.json", "--class-map", "other.json"],
    ],
)
def test_a_run_that_is_refused_has_written_nothing(root: Path, more: list[str]) -> None:
    Path("folder").mkdir()
    Path("notes.md").write_text("# Notes\nMade with ckpt-tools.\n")
    Path("other.json").write_text('["a", "b"]')
    Path("link").symlink_to("notes.md")
    before = tree(root)
    result = cli(*more)
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    assert tree(root) == before
    assert not Path("fixed").exists()


def test_what_a_folder_brings_along_is_left_alone(root: Path) -> None:
    """The manifest's place is in the folder that was given, which may be somebody else's."""
    Path("runs/ckpt-fix.jsonl").symlink_to(root / "new.txt")
    assert cli("runs").exit_code == 1
    assert not Path("new.txt").exists()
    assert not list(Path("runs").glob("*.safetensors"))
    assert cli("runs", "--manifest", "m.jsonl", "--report", "r.md").exit_code == 0
    assert cli("runs", "--manifest", "m.jsonl", "--report", "r.md").exit_code == 0


def test_inputs_are_told_by_the_file_not_by_the_name(tmp_path: Path) -> None:
    """A second path to a folder is not seen in names: a link here, a mount elsewhere."""
    (tmp_path / "hub").mkdir()
    for name in ("model.safetensors", "config.json", "notes.md"):
        (tmp_path / "hub" / name).touch()
    (tmp_path / "also").symlink_to("hub")
    for checkpoint in (tmp_path / "hub", tmp_path / "hub" / "model.safetensors"):
        inputs = files_of_checkpoint(checkpoint)
        with pytest.raises(UsageError, match="of its own"):
            check_reports([tmp_path / "also" / "config.json"], inputs)
        check_reports([tmp_path / "also" / "notes.md"], inputs)
    with pytest.raises(UsageError, match="of its own"):
        check_reports([tmp_path / "hub" / "new.md", tmp_path / "also" / "new.md"])


def test_a_file_that_comes_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in (False, True):
        path = tmp_path / f"{first}.md"
        if first:
            write_report(path, facts())

        def slow(facts: Any, path: Path = path) -> str:
            path.unlink(missing_ok=True)
            path.write_text("notes")
            return "report\n"

        monkeypatch.setattr("ckpt_tools.report.report_files.checkpoint_markdown", slow)
        with pytest.raises(OutputError, match="another file"):
            write_report(path, facts())
        assert path.read_text() == "notes"
        monkeypatch.undo()


# --- what counts as a manifest ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        line(),
        line()[:-1],
        line() + line(status="done before"),
        json.dumps(RECORD).encode() + b"\n" + line(),  # of version 0.1.0, and of this one
        line()[:40],
        line() + line()[:20],
        line() + line()[:20] + b"\n" + line(),
        b"{",
        b'{"check',
    ],
)
def test_earlier_manifests_are_appended_to(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    Manifest(path).add_record({**RECORD, **NEWER})
    assert path.read_bytes().startswith(content)
    assert path.read_bytes().removeprefix(content).lstrip(b"\n") == line()
    check_manifest(path)


@pytest.mark.parametrize(
    "content",
    [
        b'{"model_type": "mine"}',
        b'{"checkpoint": "a.pt"}\n',
        b'{"checkpoint": "a.pt", "loss": 0.1}\n{"checkpoint": "b.pt", "loss": 0.2}\n',
        b"# notes\n" + line(),
        line() + b"and my notes\n",
        line() + b"and my notes",
        line() + b'{"mine": 1}\n',
        line(more=1),
        line(seconds="1"),
        line(report=[]),
        b"[" + line()[:-1] + b"]\n",
        json.dumps({**RECORD, **NEWER}, indent=1).encode(),
        b"PK\x03\x04" + line(),
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_other_files_are_not(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="another file"):
        Manifest(path)
    assert path.read_bytes() == content


def test_a_manifest_that_is_exchanged_after_the_first_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"my notes")
    monkeypatch.setattr("ckpt_tools.report.records.manifest.read_own_file", lambda path, kind: line())
    with pytest.raises(OutputError, match="another file"):
        Manifest(path)
    assert path.read_bytes() == b"my notes"


def test_a_manifest_that_is_exchanged_meanwhile(tmp_path: Path) -> None:
    path, other = tmp_path / "m.jsonl", tmp_path / "other"
    other.write_text("precious")
    for exchange in (
        lambda: path.symlink_to(other),
        lambda: path.hardlink_to(other),
        lambda: path.write_text("x"),
    ):
        path.unlink(missing_ok=True)
        log = Manifest(path)
        path.rename(tmp_path / "moved")
        exchange()
        with pytest.raises(OutputError):
            log.add_record(RECORD)
        assert other.read_text() == "precious"
    path.unlink()
    log.add_record(RECORD)  # somebody has removed it: it begins anew
    log.add_record(RECORD)
    assert len(path.read_bytes().splitlines()) == 2


# --- what counts as a report --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [facts(), records()], ids=["one", "folder"])
def test_only_an_unchanged_report_is_replaced(tmp_path: Path, suffix: str, content: Any) -> None:
    path = tmp_path / f"out{suffix}"
    write_report(path, content)
    whole = path.read_bytes()
    write_report(path, content)
    assert path.read_bytes() == whole
    noted = {
        ".json": whole[:-3] + b',\n  "notes": "mine"\n}\n',
        ".md": whole.replace(b"\n## ", b"\nMy own notes.\n\n## ", 1),
        ".html": whole.replace(b"<main>", b"<main><p>My own notes.</p>", 1),
    }[suffix]
    assert noted != whole
    for changed in (noted, whole + b"And notes.\n", b"Notes.\n" + whole):
        path.write_bytes(changed)
        with pytest.raises(OutputError, match="another file"):
            write_report(path, content)
        assert path.read_bytes() == changed


@pytest.mark.parametrize(
    "content",
    [
        b'{"tools": ["ckpt-tools"], "accuracy": [0.91, 0.92]}\n',
        b'{"tool": "ckpt-tools", "checkpoint": {}}\n',
        b'{"tool": {"name": "ckpt-tools", "version": "0.1.0"}}\n',
        b'{"tool": {"name": "ckpt-tools", "version": "0.1.0"}, "accuracy": 0.9}\n',
        b'{"tool": {"name": "ckpt-tools", "version": "0.1.0", "x": 1}, "checkpoints": []}\n',
        b'{"tool": {"name": "ckpt-tools", "version": "0.1.0"}, "checkpoints": [], "notes": ""}\n',
        b'[{"tool": {"name": "ckpt-tools", "version": "0.1.0"}, "checkpoints": []}]\n',
        b'{"tool": {"name": "ckpt-tools", "version": "0.1.0"}, "checkpoints": []} and notes\n',
        b'{"tool": {"name": "ckpt-tools", "version": "' + b"[" * 100_000,
        b'{"tool": {"name": "ckpt-tools", "version": ""}, "checkpoints": ' + b"[" * 100_000,
    ],
)
def test_json_that_mentions_the_tool_is_no_report(content: bytes) -> None:
    assert not is_own_report(content, ".json")


@given(text=st.binary(max_size=200), more=st.binary(min_size=1, max_size=60), data=st.data())
def test_a_mark_vouches_for_what_stands_before_it_alone(
    text: bytes, more: bytes, data: st.DataObject
) -> None:
    suffix = data.draw(st.sampled_from([".md", ".html", ".svg", ".pdf", ".png"]))
    whole = add_mark(text, suffix)
    assert is_own_report(whole, suffix)
    at = data.draw(st.integers(0, len(whole)))
    flipped = bytearray(whole)
    flipped[at % len(whole)] ^= data.draw(st.integers(1, 255))
    for changed in (whole[:at] + more + whole[at:], whole[: at % len(whole)], bytes(flipped), text):
        assert not is_own_report(changed, suffix) or changed == whole


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn = io.BytesIO()
    Image.new("RGB", (3, 2)).save(drawn, "PNG")
    content = {".png": drawn.getvalue(), ".svg": b"<svg/>", ".pdf": b"%PDF-1.4"}

    class Drawing:
        def savefig(self, path: Path, format: str, dpi: int) -> None:
            path.write_bytes(content[f".{format}"])

    monkeypatch.setattr(signals_figure, "_draw_figure", lambda before, after: Drawing())
    for suffix in content:
        path = tmp_path / f"own{suffix}"
        for _ in range(2):
            signals_figure.write_signals_figure(path, [], [], only_own=True)
        for name, other in (("photo", content[suffix]), ("edited", b"a line" + path.read_bytes())):
            (tmp_path / f"{name}{suffix}").write_bytes(other)
            with pytest.raises(OutputError, match="another file"):
                signals_figure.write_signals_figure(tmp_path / f"{name}{suffix}", [], [], only_own=True)
            assert (tmp_path / f"{name}{suffix}").read_bytes() == other
    with Image.open(tmp_path / "own.png") as picture:
        picture.load()
        assert picture.info["Comment"].startswith("ckpt-tools sha256:")


def test_pictures_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("photo.png").write_bytes(b"a photo")
    command = [
        "init-rewrite",
        "--arch",
        "nets:DenseNet",
        "--input-size",
        "3,8,8",
        "--overwrite",
        "-o",
        "o.safetensors",
    ]
    result = CliRunner().invoke(main, [*command, "--report", "photo.png"])
    assert (result.exit_code, "another file" in result.output) == (1, True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"photo.png": b"a photo"}


# --- behind URLs --------------------------------------------------------------------------------------------


def test_behind_urls() -> None:
    store = MemoryFileSystem()
    store.store.clear()
    store.pipe_file("/bucket/notes.md", b"Made with ckpt-tools.\n")
    store.pipe_file("/bucket/m.jsonl", b'{"checkpoint": "a.pt"}\n')
    with open_mirror():
        with pytest.raises(OutputError, match="another file"):
            write_report(Location.of("memory://bucket/notes.md"), facts())
        with pytest.raises(OutputError, match="another file"):
            Manifest(Location.of("memory://bucket/m.jsonl"))
        for _ in range(2):
            write_report(Location.of("memory://bucket/own.md"), facts())
            log = Manifest(Location.of("memory://bucket/own.jsonl"))
            log.add_record({**RECORD, **NEWER})
            log.publish()
        log = Manifest(Location.of("memory://bucket/own.jsonl"))
        store.pipe_file("/bucket/own.jsonl", b"notes")
        log.add_record({**RECORD, **NEWER})
        with pytest.raises(CkptToolsError, match="another file"):
            log.publish()
    assert store.cat_file("/bucket/notes.md") == b"Made with ckpt-tools.\n"
    assert store.cat_file("/bucket/m.jsonl") == b'{"checkpoint": "a.pt"}\n'
    assert store.cat_file("/bucket/own.jsonl") == b"notes"
    store.store.clear()


def test_no_system_calls_are_needed_that_others_lack() -> None:
    """On Windows there are neither links that are not followed nor locks; nothing may fail at import."""
    script = (
        "import os, sys; "
        "[delattr(os, name) for name in ('O_NOFOLLOW', 'O_NONBLOCK', 'O_CLOEXEC', 'getxattr')]; "
        "sys.modules['fcntl'] = None; "
        "import ckpt_tools.storage.output.own_files, ckpt_tools.storage.output.permissions; "
        "from pathlib import Path; import tempfile; "
        "from ckpt_tools.storage.output.atomic_write import write_atomically; "
        "folder = Path(tempfile.mkdtemp()); target = folder / 'x'\n"
        "with write_atomically(target, overwrite=False) as path: path.touch()\n"
        "print([one.name for one in folder.iterdir()])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['x']"
