"""Outputs copied from a safetensors source: byte for byte but for what was replaced, or nothing at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from ckpt_tools.errors import OutputError
from ckpt_tools.storage.output import (
    atomic_write,
    byte_transfer,
    change_detection,
    checkpoint_writer,
    hashing,
    patching,
    safetensors_layout,
    safetensors_writer,
)
from ckpt_tools.storage.output.checkpoint_writer import replace_tensors, save, write_safetensors
from ckpt_tools.storage.output.memory_mappings import FileMappings
from ckpt_tools.storage.reading import read_checkpoint

NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# --- the oracle: writes and reads the format with struct and json alone -------------------------------------


@dataclass(frozen=True)
class Raw:
    """A safetensors file taken apart."""

    start: int
    header: bytes
    entries: Mapping[str, Any]
    metadata: Mapping[str, str]
    data: bytes

    def bytes_of(self, key: str) -> bytes:
        return self.data[slice(*self.entries[key]["data_offsets"])]


def raw(path: Path) -> Raw:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    return Raw(8 + length, header, entries, metadata, content[8 + length :])


def lay(
    path: Path, state: Mapping[str, Tensor], order: list[str] | None = None, pad: int = 8, **said: str
) -> Path:
    """Write a file whose header names the tensors as ``state`` does and whose data has them in ``order``."""
    spans, data = {}, b""
    for key in order or list(state):
        content = state[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        spans[key] = [len(data), len(data) + len(content)]
        data += content
    entries = {
        key: {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": spans[key]}
        for key, tensor in state.items()
    }
    header = json.dumps({"__metadata__": said, **entries}).encode()
    header = header.ljust(len(header) + -len(header) % pad)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


# --- what the tests start from ------------------------------------------------------------------------------

VARIANCE = "bn.running_var"


def state() -> dict[str, Tensor]:
    return {
        "conv.weight": torch.randn(40, 30).half(),
        "bn.weight": torch.randn(40),
        VARIANCE: torch.rand(40),
        "bn.num_batches_tracked": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "fc.weight": torch.randn(7, 40).bfloat16(),
    }


NEW = {VARIANCE: torch.linspace(0.5, 3, 40, dtype=torch.float64)}


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A file that must be as it was afterwards, without anything temporary beside it."""
    path = lay(tmp_path / "source.safetensors", state(), licence="MIT", format="pt")
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    yield path
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written must be a copy of the source's file."""
    monkeypatch.setattr(safetensors_writer, "save_file", lambda *_, **__: pytest.fail("written from memory"))


@pytest.fixture
def piecemeal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are handled as large ones are: in pieces, with blocks, by mappings."""
    monkeypatch.setattr(hashing, "PIECE_BYTES", 96)
    monkeypatch.setattr(patching, "_STEP", 128)
    monkeypatch.setattr(patching, "_SMALL", 64)
    monkeypatch.setattr(patching, "_LARGE", 0)
    monkeypatch.setattr(change_detection, "_LARGE", 0)


def assert_faithful(before: Raw, after: Raw, replaced: Mapping[str, bytes], prefix: str = "") -> None:
    assert list(after.entries) == [key.removeprefix(prefix) for key in before.entries]
    assert list(after.entries.values()) == list(before.entries.values())
    assert len(after.data) == len(before.data)
    for key in before.entries:
        plain = key.removeprefix(prefix)
        assert after.bytes_of(plain) == replaced.get(plain, before.bytes_of(key))
    assert after.start % 8 == 0
    assert after.header.startswith(b"{")
    assert after.header.rstrip(b" ").endswith(b"}")
    assert {**before.metadata, "format": "pt"} == {
        k: v for k, v in after.metadata.items() if k != "ckpt_tools"
    }


# --- what is written ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("large", [False, True])
def test_only_the_replaced_bytes_differ(tmp_path: Path, source: Path, large: bool, request: Any) -> None:
    if large:
        request.getfixturevalue("piecemeal")
    target = tmp_path / "out.safetensors"
    digests = replace_tensors(target, read_checkpoint(source), NEW, provenance={"images": 3})
    after = raw(target)
    assert_faithful(raw(source), after, {VARIANCE: struct.pack("<40f", *NEW[VARIANCE].tolist())})
    assert digests.source == hashlib.sha256(source.read_bytes()).hexdigest()
    assert digests.output == hashlib.sha256(target.read_bytes()).hexdigest()
    said = json.loads(after.metadata["ckpt_tools"])
    assert (said["images"], said["source"], said["source_sha256"]) == (
        3,
        "source.safetensors",
        digests.source,
    )
    with safe_open(target, framework="pt") as file:
        assert file.get_tensor("bn.num_batches_tracked") == 3


@pytest.mark.usefixtures("copied", "piecemeal")
def test_large_data_lies_at_the_same_places_of_blocks(tmp_path: Path, source: Path) -> None:
    save(tmp_path / "out.safetensors", read_checkpoint(source), NEW, provenance={})
    assert (raw(tmp_path / "out.safetensors").start - raw(source).start) % 65536 == 0


VALUES = st.builds(
    lambda shape, dtype, seed: torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    ).to(dtype),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.sampled_from(list(NAMES)),
    st.integers(0, 9),
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda key: key != "n_averaged"
)


@settings(max_examples=30, deadline=None)
@given(
    tensors=st.dictionaries(KEYS, VALUES, max_size=7),
    prefix=st.sampled_from(["", "module.", "module._orig_mod."]),
    pad=st.sampled_from([1, 8, 64]),
    metadata=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.text(max_size=4), max_size=3),
    choices=st.data(),
)
def test_any_file(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, Tensor],
    prefix: str,
    pad: int,
    metadata: dict[str, str],
    choices: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("any", numbered=True)
    whole = {prefix + key: tensor for key, tensor in {"w\\é": torch.ones(3), **tensors}.items()}
    order = choices.draw(st.permutations(list(whole)))
    path = lay(folder / "in.safetensors", whole, order, pad, **metadata)
    checkpoint = read_checkpoint(path)
    removed = checkpoint.prefix
    chosen = choices.draw(st.sets(st.sampled_from(list(checkpoint.tensors))))
    new = {key: torch.ones_like(checkpoint.tensors[key]) for key in chosen}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(safetensors_writer, "save_file", lambda *_, **__: pytest.fail("written from memory"))
        patched.setattr(hashing, "PIECE_BYTES", choices.draw(st.sampled_from([24, 1 << 20])))
        patched.setattr(patching, "_LARGE", choices.draw(st.sampled_from([0, 1 << 26])))
        patched.setattr(patching, "_SMALL", choices.draw(st.sampled_from([-1, 0, 8, 1 << 20])))
        save(folder / "out.safetensors", checkpoint, new, provenance={})
    expected = {key: one(checkpoint.tensors[key].dtype) * checkpoint.tensors[key].numel() for key in chosen}
    assert removed.startswith(prefix)
    assert_faithful(raw(path), raw(folder / "out.safetensors"), expected, removed)


def one(dtype: torch.dtype) -> bytes:
    """The bits of 1, from the definitions of the types."""
    return {
        torch.float16: b"\x00\x3c",
        torch.bfloat16: b"\x80\x3f",
        torch.float32: struct.pack("<f", 1),
        torch.float64: struct.pack("<d", 1),
        torch.int64: struct.pack("<q", 1),
    }.get(dtype, b"\x01")


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_replaced_tensors_of_half_width(tmp_path: Path, dtype: torch.dtype) -> None:
    path = lay(tmp_path / "in.safetensors", {"bn.running_var": torch.rand(3).to(dtype), "x": torch.rand(2)})
    new = torch.tensor([0.25, 2, 3.5])
    save(tmp_path / "out.safetensors", read_checkpoint(path), {"bn.running_var": new}, provenance={})
    exact = [
        struct.pack("<e", x) if dtype == torch.float16 else struct.pack("<f", x)[2:] for x in new.tolist()
    ]
    assert raw(tmp_path / "out.safetensors").bytes_of("bn.running_var") == b"".join(exact)


@pytest.mark.parametrize(
    "keys",
    [
        ["module.a", "module.b", "n_averaged"],  # the counter is left out
        ["net._orig_mod.a", "net.b"],  # a prefix inside the keys goes
    ],
)
def test_what_is_no_copy_is_written_from_memory(tmp_path: Path, keys: list[str]) -> None:
    path = lay(tmp_path / "in.safetensors", {key: torch.rand(4) for key in keys})
    checkpoint = read_checkpoint(path)
    assert patching.find_copyable_source(checkpoint) is None
    save(tmp_path / "out.safetensors", checkpoint, {}, provenance={})
    before, after = raw(path), raw(tmp_path / "out.safetensors")
    for key, name in zip(keys, checkpoint.tensors, strict=False):
        assert after.bytes_of(name) == before.bytes_of(key)


@pytest.mark.usefixtures("piecemeal")
def test_strided_tensors_in_pieces(tmp_path: Path) -> None:
    big = torch.randn(13, 17)
    tensors = {"turned": big.t(), "part": big[:, 3:5], "whole": big, "none": big[:0]}
    write_safetensors(tmp_path / "out.safetensors", tensors, metadata={})
    found = raw(tmp_path / "out.safetensors")
    assert all(found.bytes_of(key) == np.ascontiguousarray(x.numpy()).tobytes() for key, x in tensors.items())


# --- the kernel's ways of copying ---------------------------------------------------------------------------


def refusing(code: int) -> Callable[..., int]:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.usefixtures("copied", "piecemeal")
@pytest.mark.parametrize("sending", [None, errno.EINVAL])
@pytest.mark.parametrize("ranges", [errno.EXDEV, errno.ENOSYS, errno.EPERM, "nothing", "short", "missing"])
def test_ways_of_copying(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, ranges: object, sending: int | None
) -> None:
    real = os.copy_file_range
    if isinstance(ranges, int):
        monkeypatch.setattr(os, "copy_file_range", refusing(ranges))
    elif ranges == "nothing":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    elif ranges == "short":
        monkeypatch.setattr(
            os, "copy_file_range", lambda a, b, count, at, to: real(a, b, min(count, 50), at, to)
        )
    else:
        monkeypatch.delattr(os, "copy_file_range")
    if sending is not None:
        monkeypatch.setattr(os, "sendfile", refusing(sending))
    save(tmp_path / "out.safetensors", read_checkpoint(source), NEW, provenance={})
    replaced = {VARIANCE: struct.pack("<40f", *NEW[VARIANCE].tolist())}
    assert_faithful(raw(source), raw(tmp_path / "out.safetensors"), replaced)


def test_a_source_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"12345")
    with (tmp_path / "short").open("rb") as short, (tmp_path / "copy").open("wb") as copy:
        with pytest.raises(OSError, match="ends at byte 5"):
            byte_transfer.copy_range(short.fileno(), copy.fileno(), 9, at=0, to=0)
        with pytest.raises(OSError, match="ends at byte 5"):
            byte_transfer.read_at(short.fileno(), np.empty(9, np.uint8), 0)


# --- all or nothing -----------------------------------------------------------------------------------------


def refused(tmp_path: Path, source: Path, match: str) -> None:
    checkpoint = read_checkpoint(source)
    with pytest.raises(OutputError, match=match):
        save(tmp_path / "out.safetensors", checkpoint, NEW, provenance={})
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EFBIG])
def test_a_copy_that_fails(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "copy_file_range", refusing(code))
    refused(tmp_path, source, os.strerror(code))


def test_a_full_disk(tmp_path: Path) -> None:
    path = lay(tmp_path / "source.safetensors", {VARIANCE: torch.ones(40), "x": torch.ones(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(tmp_path, path, r"400,160 bytes.*too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("piecemeal")
def test_a_failed_sync_is_noticed_though_the_system_tells_once(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fail_first(file: int) -> None:
        calls.append(file)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail_first)
    refused(tmp_path, source, "Input/output")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (patching, "copy_range"),
        (patching, "write_at"),
        (patching, "verify_and_hash"),
        (safetensors_layout, "hash_and_check"),
        (hashing, "read_at"),
        (os, "fsync"),
        (os, "preadv"),
        (safetensors_writer, "load_safetensors"),
        (checkpoint_writer, "require_same_stamps"),
        (atomic_write, "sync_to_disk"),
        (os, "link"),
    ],
)
def test_an_interrupt_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    checkpoint = read_checkpoint(source)
    monkeypatch.setattr(module, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out.safetensors", checkpoint, NEW, provenance={})
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize(
    ("key", "name"), [("conv.weight", "conv.weight"), (VARIANCE, r"bn\.running_var"), (None, "the header")]
)
def test_a_byte_that_reads_back_differently(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, name: str
) -> None:
    before = raw(source)
    begin = 0 if key is None else before.entries[key]["data_offsets"][0]
    real = patching.verify_and_hash

    def spoiled(file: int, size: int, wanted: safetensors_layout.Layout) -> str:
        at = 20 if key is None else size - len(before.data) + begin
        (old,) = os.pread(file, 1, at)
        os.pwrite(file, bytes([old ^ 1]), at)
        return real(file, size, wanted)

    monkeypatch.setattr(patching, "verify_and_hash", spoiled)
    refused(tmp_path, source, f"{name} reading back differently")


def test_a_longer_file_reads_back_differently(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = patching.verify_and_hash
    monkeypatch.setattr(patching, "verify_and_hash", lambda file, size, wanted: real(file, size + 1, wanted))
    refused(tmp_path, source, "bytes instead of")


# --- a source that changes ----------------------------------------------------------------------------------


def overwrite(path: Path, at: int, value: bytes) -> None:
    """Write into a file in place, some time later."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("kind", ["safetensors", "torch.save"])
def test_a_source_written_in_place_since_it_was_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "in"
    if kind == "safetensors":
        lay(path, state())
    else:
        torch.save(state(), path)
    checkpoint = read_checkpoint(path)
    overwrite(path, path.stat().st_size - 3, b"\x01")
    with pytest.raises(OutputError, match="written to since"):
        save(tmp_path / "out.safetensors", checkpoint, NEW, provenance={})
    assert [found.name for found in tmp_path.iterdir()] == ["in"]


def test_a_source_replaced_since_it_was_read(tmp_path: Path) -> None:
    path = lay(tmp_path / "in.safetensors", state())
    checkpoint = read_checkpoint(path)
    lay(tmp_path / "new.safetensors", {key: tensor + 1 for key, tensor in state().items()}).replace(path)
    with pytest.raises(OutputError, match="written to since"):
        save(tmp_path / "out.safetensors", checkpoint, NEW, provenance={})
    assert [found.name for found in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(
    ("moment", "message"), [("copy_range", "reading back"), ("verify_and_hash", "written to since")]
)
def test_a_source_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, message: str
) -> None:
    path = lay(tmp_path / "in.safetensors", state())
    checkpoint = read_checkpoint(path)
    real = getattr(patching, moment)

    def then_write(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        overwrite(path, path.stat().st_size - 3, b"\x01")
        return found

    monkeypatch.setattr(patching, moment, then_write)
    with pytest.raises(OutputError, match=message):
        save(tmp_path / "out.safetensors", checkpoint, NEW, provenance={})
    assert [found.name for found in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("large", [False, True])
def test_tensors_changed_in_memory(tmp_path: Path, source: Path, large: bool, request: Any) -> None:
    if large:
        request.getfixturevalue("piecemeal")
    checkpoint = read_checkpoint(source)
    checkpoint.tensors["bn.weight"].add_(1)
    with pytest.raises(OutputError, match=r"bn\.weight changed"):
        save(tmp_path / "out.safetensors", checkpoint, NEW, provenance={})
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


# --- memory -------------------------------------------------------------------------------------------------

LINUX = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells about mappings")


@LINUX
def test_the_same_place_of_a_file(tmp_path: Path) -> None:
    lay(tmp_path / "a", {"x": torch.ones(5000), "y": torch.ones(5000), "z": torch.ones(5000)})
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    one, again, other = (read_checkpoint(tmp_path / name).tensors for name in "aab")
    mappings = FileMappings()
    assert mappings.same_place(one["x"], again["x"])
    assert not mappings.same_place(one["x"], one["y"])
    assert not mappings.same_place(one["x"], other["x"])
    assert not mappings.same_place(one["x"], again["x"].view(torch.int32))
    assert not mappings.same_place(one["x"][::2], again["x"][::2])
    assert not mappings.same_place(one["x"].clone(), one["x"].clone())
    one["z"][0] = 2
    assert not FileMappings().same_place(one["x"], again["x"])


@LINUX
@pytest.mark.usefixtures("copied", "piecemeal")
def test_mapped_tensors_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lay(tmp_path / "in.safetensors", {VARIANCE: torch.ones(40), "x": torch.ones(100)})
    monkeypatch.setattr(change_detection, "same_bytes", lambda *_: pytest.fail("read"))
    save(tmp_path / "out.safetensors", read_checkpoint(path), NEW, provenance={})


def status(field: str) -> int:
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


@LINUX
@pytest.mark.usefixtures("copied")
def test_saving_takes_no_memory_for_what_stays(tmp_path: Path) -> None:
    size = 96 * 2**20
    path = lay(tmp_path / "in.safetensors", {VARIANCE: torch.ones(40), "x": torch.ones(size // 4)})
    checkpoint = read_checkpoint(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    save(tmp_path / "out.safetensors", checkpoint, NEW, provenance={})
    assert status("VmHWM") - before < size // 4
