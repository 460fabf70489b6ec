"""Writing: only what was replaced differs, bit for bit; all or nothing; the source is never touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError, OutputError
from ckpt_tools.storage.compare import compare_checkpoints
from ckpt_tools.storage.output import atomic_write, checkpoint_writer, safetensors_writer
from ckpt_tools.storage.output.checkpoint_writer import save, write_safetensors
from ckpt_tools.storage.provenance import checkpoint_provenance, output_metadata
from ckpt_tools.storage.reading import checkpoint_sha256, read_checkpoint

VARIANCE = "1.running_var"


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 3)).half()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Checkpoint]:
    """A checkpoint on disk; afterwards it must be as it was, and no temporary file may lie about."""
    path = tmp_path / "source.pt"
    torch.save({"state_dict": model().state_dict(), "epoch": 3}, path)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    yield read_checkpoint(path)
    if path.exists():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert not list(tmp_path.rglob("*.tmp"))


def new_variance() -> dict[str, Tensor]:
    return {VARIANCE: torch.tensor([0.25, 2.0, 3.0, 1e-3], dtype=torch.float64)}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- an independent reader of safetensors: no project code, no library --------------------------------------


def raw_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {
        key: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for key, entry in header.items()
    }


def raw_state(state: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    names = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
    return {key: (names[x.dtype], tuple(x.shape), x.numpy().tobytes()) for key, x in state.items()}


def test_independent_check_of_the_bytes(tmp_path: Path, source: Checkpoint) -> None:
    save(tmp_path / "out.safetensors", source, new_variance(), provenance={})
    before = raw_state(torch.load(tmp_path / "source.pt", weights_only=True)["state_dict"])
    after = raw_tensors(tmp_path / "out.safetensors")
    assert list(after) == list(before)  # the order too
    assert [key for key in before if before[key] != after[key]] == [VARIANCE]
    assert after[VARIANCE] == ("F16", (4,), struct.pack("<4e", 0.25, 2.0, 3.0, 1e-3))


# --- round trips --------------------------------------------------------------------------------------------


def test_returns_the_digest_and_says_where_it_comes_from(tmp_path: Path, source: Checkpoint) -> None:
    target = tmp_path / "out.safetensors"
    digest = save(
        target, source, new_variance(), provenance={"images": 3, "bad": float("nan"), "path": tmp_path}
    )
    assert digest == hashlib.sha256(target.read_bytes()).hexdigest()
    written = read_checkpoint(target)
    assert written.metadata["format"] == "pt"
    found = checkpoint_provenance(written)
    assert found is not None
    assert found.pop("version")
    assert found == {
        "images": 3,
        "bad": None,
        "path": str(tmp_path),
        "source": "source.pt",
        "source_sha256": checkpoint_sha256(tmp_path / "source.pt"),
        "weights": "state_dict",
        "prefix": "",
    }


def test_an_output_as_source_keeps_metadata_and_history(tmp_path: Path) -> None:
    save_file(model().state_dict(), tmp_path / "a.safetensors", {"format": "pt", "licence": "MIT"})
    digest = save(
        tmp_path / "b.safetensors", read_checkpoint(tmp_path / "a.safetensors"), {}, provenance={"step": 1}
    )
    save(tmp_path / "c.safetensors", read_checkpoint(tmp_path / "b.safetensors"), {}, provenance={"step": 2})
    last = read_checkpoint(tmp_path / "c.safetensors")
    assert last.metadata["licence"] == "MIT"
    found = checkpoint_provenance(last)
    assert found is not None
    assert (found["step"], found["source_sha256"]) == (2, digest)
    assert isinstance(found["earlier"], dict)
    assert found["earlier"]["step"] == 1


def test_an_output_without_a_source_names_none(tmp_path: Path) -> None:
    target = tmp_path / "new.safetensors"
    write_safetensors(target, model().state_dict(), metadata=output_metadata(None, {"seed": 0}))
    written = read_checkpoint(target)
    assert written.metadata["format"] == "pt"
    found = checkpoint_provenance(written)
    assert found is not None
    assert found.keys() == {"seed", "version"}


def test_tied_strided_and_odd_tensors(tmp_path: Path) -> None:
    big = torch.randn(6, 8)
    state = {
        "tied.a": big,
        "tied.b": big,
        "transposed": big.t(),
        "part": big[2:4],
        "overlap": big[3:5],
        "columns": big[:, 1:3],
        "last": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).weight.detach(),
        "expanded": torch.ones(1).expand(5),
        "empty": big[0:0],
        "scalar": torch.tensor(7),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "brain": big.bfloat16(),
        "eight": big.to(torch.float8_e4m3fn),
        "bool": big > 0,
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        'quote"\\\n\u2028é': torch.ones(1),
    }
    torch.save(state, tmp_path / "x.pt")
    save(tmp_path / "y.safetensors", read_checkpoint(tmp_path / "x.pt"), {}, provenance={})
    after = read_checkpoint(tmp_path / "y.safetensors")
    assert list(after.tensors) == list(state)
    for key, tensor in load_file(tmp_path / "y.safetensors").items():
        torch.testing.assert_close(tensor, state[key].resolve_conj(), rtol=0, atol=0, equal_nan=True)
    assert not compare_checkpoints(read_checkpoint(tmp_path / "x.pt"), after).unexpected_differences(
        "nothing"
    )


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
TENSORS = st.builds(
    lambda shape, dtype, flip, seed: (
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        .to(dtype)
        .permute(tuple(range(len(shape)))[:: -1 if flip else 1])
    ),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 9),
)


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), TENSORS, max_size=6
    )
)
def test_any_state_dict_comes_back(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]
) -> None:
    target = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_safetensors(target, state, metadata={"format": "pt"}, overwrite=True)
    found = load_file(target)
    assert list(raw_tensors(target)) == list(state)
    assert all(
        torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in state.items()
    )


def test_timm_loads_the_output(tmp_path: Path) -> None:
    import timm

    torch.save(
        {"state_dict": timm.create_model("test_resnet", num_classes=5).state_dict()}, tmp_path / "t.pth.tar"
    )
    source = read_checkpoint(tmp_path / "t.pth.tar")
    key = next(key for key in source.tensors if key.endswith("running_var"))
    new = torch.rand_like(source.tensors[key]) + 1
    save(tmp_path / "t.safetensors", source, {key: new}, provenance={})
    loaded = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(tmp_path / "t.safetensors"))
    assert torch.equal(loaded.state_dict()[key], new)
    loaded.load_state_dict(load_file(tmp_path / "t.safetensors"), strict=True)


def test_shards_become_one_file(tmp_path: Path) -> None:
    state = model().state_dict()
    shard_of = {key: f"{i % 2}.safetensors" for i, key in enumerate(state)}
    for name in ("0.safetensors", "1.safetensors"):
        save_file({key: state[key] for key in state if shard_of[key] == name}, tmp_path / name)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    source = read_checkpoint(tmp_path)
    save(tmp_path / "out.safetensors", source, new_variance(), provenance={})
    assert [key for key, x in load_file(tmp_path / "out.safetensors").items() if not x.equal(state[key])] == [
        VARIANCE
    ]
    for name in ("0.safetensors", "m.safetensors.index.json"):
        with pytest.raises(OutputError, match="source"):
            save(tmp_path / name, source, new_variance(), provenance={}, overwrite=True)


def test_a_trusted_source_is_not_executed_again(tmp_path: Path) -> None:
    torch.save(model(), tmp_path / "whole.pt")
    source = read_checkpoint(tmp_path / "whole.pt", trust=True)
    save(tmp_path / "out.safetensors", source, new_variance(), provenance={})
    assert (
        compare_checkpoints(source, read_checkpoint(tmp_path / "out.safetensors")).unexpected_differences(
            "variance"
        )
        == ()
    )


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replacements", "message"),
    [
        ({"1.running_varr": torch.ones(4)}, r"1\.running_varr: expected a key"),
        ({VARIANCE: torch.ones(5)}, r"stored shape \(4,\), found \(5,\)"),
        (
            {VARIANCE: torch.tensor([1.0, 70_000.0, 1.0, 1.0])},
            r"found 70000 in element 1, which is inf as float16",
        ),
        ({VARIANCE: torch.tensor([1.0, 1.0, float("nan"), 1.0])}, r"found nan in element 2"),
        ({"1.num_batches_tracked": torch.tensor(float("inf"))}, r"num_batches_tracked: expected finite"),
    ],
)
def test_replacements_that_do_not_fit(
    tmp_path: Path, source: Checkpoint, replacements: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(OutputError, match=message):
        save(tmp_path / "out.safetensors", source, replacements, provenance={})
    assert files(tmp_path) == {"source.pt"}


def test_existing_output(tmp_path: Path, source: Checkpoint) -> None:
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        save(target, source, new_variance(), provenance={})
    assert target.read_text() == "precious"
    save(target, source, new_variance(), provenance={}, overwrite=True)
    assert read_checkpoint(target).tensors.keys() == source.tensors.keys()


@pytest.mark.parametrize("links", [True, False])
def test_output_that_appears_meanwhile(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    target = tmp_path / "out.safetensors"

    def late(path: Path) -> None:
        target.write_text("precious")

    monkeypatch.setattr(atomic_write, "sync_to_disk", late)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OutputError, match="--overwrite"):
        save(target, source, new_variance(), provenance={})
    assert target.read_text() == "precious"


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_file_system_without_links(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    save(tmp_path / "out.safetensors", source, new_variance(), provenance={})
    assert files(tmp_path) == {"source.pt", "out.safetensors"}
    monkeypatch.setattr(os, "replace", no_links)
    with pytest.raises(OutputError, match="not permitted"):
        save(tmp_path / "two.safetensors", source, new_variance(), provenance={})
    assert files(tmp_path) == {"source.pt", "out.safetensors"}


@pytest.mark.parametrize("way", ["same", "symlink", "hard link", "relative"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_the_target(
    tmp_path: Path, source: Checkpoint, way: str, overwrite: bool
) -> None:
    target = tmp_path / ("source.pt" if way == "same" else "alias.pt")
    if way == "symlink":
        target.symlink_to(source.path)
    elif way == "hard link":
        target.hardlink_to(source.path)
    elif way == "relative":
        target = tmp_path / ".." / tmp_path.name / "source.pt"
    with pytest.raises(OutputError, match="never"):
        save(target, source, new_variance(), provenance={}, overwrite=overwrite)


def test_targets_that_cannot_be_written(tmp_path: Path, source: Checkpoint) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for target, message in (
        (tmp_path / "no" / "out.safetensors", "folder"),
        (tmp_path, "found a folder"),
        (tmp_path / "source.pt" / "out", "folder"),
        (tmp_path / "dangling", "--overwrite"),
        (tmp_path / ("x" * 300), "cannot be written|expected to write"),
        (Path("/proc/out.safetensors"), "expected to write"),
    ):
        with pytest.raises(OutputError, match=message):
            save(target, source, new_variance(), provenance={})
    assert files(tmp_path) == {"source.pt", "dangling"}


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_read_only_folder_and_full_disk(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors_writer, "save_file", fail)
    with pytest.raises(OutputError, match=str(error.args[-1])[:20]):
        save(tmp_path / "out.safetensors", source, new_variance(), provenance={})
    assert files(tmp_path) == {"source.pt"}


def test_really_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match=r"400,000 bytes.*too large"):
            write_safetensors(tmp_path / "out.safetensors", {"a": torch.ones(100_000)}, metadata={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    "place",
    [
        (safetensors_writer, "save_file"),
        (safetensors_writer, "sync_to_disk"),
        (safetensors_writer, "load_safetensors"),
        (checkpoint_writer, "checkpoint_sha256"),
    ],
    ids=["save_file", "sync_to_disk", "load_safetensors", "checkpoint_sha256"],
)
def test_interrupt_leaves_nothing(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch, place: tuple[object, str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out.safetensors", source, new_variance(), provenance={})
    assert files(tmp_path) == {"source.pt"}


def test_types_that_safetensors_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"a: expected a type .* found torch\.complex128"):
        write_safetensors(tmp_path / "out", {"a": torch.ones(2, dtype=torch.complex128)}, metadata={})
    assert files(tmp_path) == set()


def test_a_write_that_reads_back_differently(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file({**tensors, "0.bias": tensors["0.bias"] + 1}, path, metadata)

    monkeypatch.setattr(safetensors_writer, "save_file", flip)
    with pytest.raises(OutputError, match=r"0\.bias reading back differently"):
        save(tmp_path / "out.safetensors", source, new_variance(), provenance={})
    assert files(tmp_path) == {"source.pt"}


def test_tensors_changed_in_memory_or_on_disk(tmp_path: Path, source: Checkpoint) -> None:
    source.tensors["0.bias"].add_(1)
    with pytest.raises(OutputError, match=r"0\.bias changed"):
        save(tmp_path / "out.safetensors", source, new_variance(), provenance={})
    source.tensors["0.bias"].sub_(1)
    moved = (tmp_path / "source.pt").rename(tmp_path / "moved.pt")
    with pytest.raises(CheckpointError, match="nothing there"):
        save(tmp_path / "out.safetensors", source, new_variance(), provenance={})
    assert files(tmp_path) == {moved.name}
