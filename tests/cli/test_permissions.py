"""Nobody may read an output who may not read its source: all writers, modes, shards, groups, access lists."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import nets
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_tools.cli import main
from ckpt_tools.storage.output.atomic_write import write_atomically
from ckpt_tools.storage.output.checkpoint_writer import save
from ckpt_tools.storage.output.permissions import _shared_bits
from ckpt_tools.storage.reading import read_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="other permissions")
STATE = {"a.weight": torch.ones(3, 2), "b.weight": torch.zeros(2, 2)}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture(autouse=True)
def umask() -> None:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0o600, 0o600),
        (0o400, 0o600),
        (0o640, 0o640),
        (0o644, 0o644),
        (0o666, 0o644),
        (0o777, 0o644),
        (0o604, 0o604),
    ],
)
def test_modes(tmp_path: Path, suffix: str, given: int, expected: int) -> None:
    source = tmp_path / f"in.{suffix}"
    torch.save(STATE, source) if suffix == "pt" else save_file(STATE, source)
    source.chmod(given)
    save(tmp_path / "out.safetensors", read_checkpoint(source), {}, provenance={})
    assert mode(tmp_path / "out.safetensors") == expected


def test_every_command_that_has_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nets.DenseNet().state_dict(), "m.pt")
    Path("m.pt").chmod(0o600)
    again = ["--overwrite", "-o", "b.safetensors"]
    for arguments in (
        ["convert", "m.pt", "-o", "a.safetensors"],
        ["init-rewrite", "m.pt", "--arch", "nets:DenseNet", "--input-size", "3,8,8", "-o", "b.safetensors"],
        ["convert", "a.safetensors", *again],  # patched, over an earlier output that all may read
    ):
        Path("b.safetensors").exists() and Path("b.safetensors").chmod(0o666)
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert {mode(path) for path in tmp_path.glob("*.safetensors")} == {0o600}


def test_the_strictest_shard_counts(tmp_path: Path) -> None:
    for name, (key, tensor) in zip(("0.safetensors", "1.safetensors"), STATE.items(), strict=True):
        save_file({key: tensor}, tmp_path / name)
    index = '{"weight_map": {"a.weight": "0.safetensors", "b.weight": "1.safetensors"}}'
    (tmp_path / "m.safetensors.index.json").write_text(index)
    (tmp_path / "0.safetensors").chmod(0o640)
    (tmp_path / "1.safetensors").chmod(0o604)
    save(tmp_path / "out.safetensors", read_checkpoint(tmp_path), {}, provenance={})
    assert mode(tmp_path / "out.safetensors") == 0o600


MODES = st.integers(0, 0o777)


@given(source=MODES, in_source=st.booleans(), in_output=st.booleans(), same=st.booleans())
def test_nobody_gains(source: int, in_source: bool, in_output: bool, same: bool) -> None:
    """By the rules of POSIX: a member of the group has the group's bits alone, anybody else the others'."""
    there = os.stat_result((source, 0, 0, 1, 0, 7, 0, 0, 0, 0))
    bits = _shared_bits(there, 7 if same else 8)
    before = source >> 3 if in_source else source
    after = bits >> 3 if (in_source if same else in_output) else bits
    assert not after & 0o6 & ~before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize(
    ("given", "expected"), [(0o640, (0o640, 1234)), (0o644, (0o644, 0)), (0o604, (0o600, 0))]
)
def test_a_file_for_a_group_keeps_it(tmp_path: Path, given: int, expected: tuple[int, int]) -> None:
    torch.save(STATE, tmp_path / "in.pt")
    os.chown(tmp_path / "in.pt", -1, 1234)
    (tmp_path / "in.pt").chmod(given)
    save(tmp_path / "out.safetensors", read_checkpoint(tmp_path / "in.pt"), {}, provenance={})
    output = tmp_path / "out.safetensors"
    assert (mode(output), output.stat().st_gid) == expected


def test_a_group_that_cannot_be_handed_on_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    source = tmp_path / "in"
    source.touch()
    source.chmod(0o640)
    stat = Path.stat

    def other_group(path: Path, **more: object) -> os.stat_result:
        found = stat(path, **more)
        return os.stat_result([*found[:5], found.st_gid + 1, *found[6:]]) if path == source else found

    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(Path, "stat", other_group)
    with write_atomically(tmp_path / "out", overwrite=False, sources=[source]) as temporary:
        temporary.touch()
    assert mode(tmp_path / "out") == 0o600


def access_list(named: int, mask: int) -> bytes:
    """Owner rw-, one user by number r--, group ---, others ---; in the binary form of Linux's acl.h, v2."""
    entries = [(1, 6, -1), (2, named, 4242), (4, 0, -1), (16, mask, -1), (32, 0, -1)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


def test_access_lists(tmp_path: Path) -> None:
    source, folder = tmp_path / "in.pt", tmp_path / "out"
    torch.save(STATE, source)
    folder.mkdir()
    try:
        os.setxattr(source, "system.posix_acl_access", access_list(4, 4))
        os.setxattr(folder, "system.posix_acl_default", access_list(6, 6))
    except (OSError, AttributeError):
        pytest.skip("no access lists here")
    assert mode(source) == 0o640, "the mask stands where the group's bits do, and the group has none"
    save(folder / "a.safetensors", read_checkpoint(source), {}, provenance={})
    os.removexattr(source, "system.posix_acl_access")
    source.chmod(0o640)
    save(folder / "b.safetensors", read_checkpoint(source), {}, provenance={})
    assert (mode(folder / "a.safetensors"), mode(folder / "b.safetensors")) == (0o600, 0o640)
    for output in folder.iterdir():
        with pytest.raises(OSError, match="No data available"):
            os.getxattr(output, "system.posix_acl_access")
