"""Done before is proved: whatever befalls an output, it is remade or named; no checkpoint passes for one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckpt_tools.cli import main
from ckpt_tools.jobs.earlier_output import DamagedOutput, EarlierOutput, find_earlier_output
from ckpt_tools.jobs.request import Request
from ckpt_tools.location import Location
from ckpt_tools.storage.discovery import find_checkpoints
from ckpt_tools.storage.output.checkpoint_writer import save, write_safetensors
from ckpt_tools.storage.output.integrity import FileDigest
from ckpt_tools.storage.provenance import output_metadata, read_provenance_entry
from ckpt_tools.storage.reading import read_checkpoint

STATE = {
    "weight": torch.arange(40.0),
    "bn.running_var": torch.ones(40),
    "bn.num_batches_tracked": torch.tensor(3),
}


@pytest.fixture(scope="module", params=["pt", "safetensors"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, Path]:
    """A request, and the output that was made for it: written from memory, and as a copy with patches."""
    folder = tmp_path_factory.mktemp("made")
    source = folder / f"in.{request.param}"
    torch.save(STATE, source) if request.param == "pt" else save_file(STATE, source, {"licence": "MIT"})
    asked = Request(Location(source), "data.npy")
    checkpoint = read_checkpoint(source)
    new = {"bn.running_var": torch.full((40,), 2.0)}
    save(folder / "out.safetensors", checkpoint, new, provenance={"settings": asked.settings_digest()})
    return asked, folder / "out.safetensors"


def found(made: tuple[Request, Path], content: bytes, **more: Any) -> EarlierOutput | DamagedOutput | None:
    asked, output = made
    changed = output.with_name("changed.safetensors")
    changed.write_bytes(content)
    return find_earlier_output(changed, asked, more.get("in_manifest"))


def header_of(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


# --- the output ---------------------------------------------------------------------------------------------


def test_a_whole_output_is_done(made: tuple[Request, Path]) -> None:
    content = made[1].read_bytes()
    before = found(made, content)
    assert isinstance(before, EarlierOutput)
    assert before.file == FileDigest(digest(content), len(content))
    assert read_provenance_entry(made[1]) is not None


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@settings(max_examples=150)
@given(data=st.data())
def test_no_change_passes(made: tuple[Request, Path], data: st.DataObject) -> None:
    content = made[1].read_bytes()
    start = header_of(content)
    at, to = sorted(data.draw(st.tuples(st.integers(0, len(content)), st.integers(0, len(content)))))
    header, body = content[:start], content[start:]
    changes = {
        "cut off": content[:at],
        "more": content + data.draw(st.binary(min_size=1, max_size=9)),
        "zeros": content[:at] + bytes(to - at) + content[to:],
        "other bytes": content[:at] + data.draw(st.binary(min_size=to - at, max_size=to - at)) + content[to:],
        "missing": content[:at] + content[to:],
        "another's data": header + body[::-1],
        "another name": header.replace(b"running_var", b"running_vor") + body,
        "other metadata": header.replace(b"licence", b"license").replace(b'"pt"', b'"np"') + body,
    }
    changed = changes[data.draw(st.sampled_from(sorted(changes)))]
    assume(changed != content)
    answer = found(made, changed)
    assert not isinstance(answer, EarlierOutput)
    # Only what has the very header that was written may be replaced without being told to.
    assert isinstance(answer, DamagedOutput) == (changed[:start] == content[:start])


def test_the_manifest_counts_as_well(made: tuple[Request, Path]) -> None:
    content = made[1].read_bytes()
    whole = found(made, content)
    assert isinstance(whole, EarlierOutput)
    source, asked, file = whole.source_sha256, whole.settings, whole.file
    assert found(made, content, in_manifest=whole) == whole
    assert (
        found(made, content, in_manifest=EarlierOutput(source, asked)) == whole
    )  # version 0.1.0 recorded no digest
    for other in (FileDigest("0" * 64, file.size), FileDigest(file.sha256, 1)):
        assert isinstance(
            found(made, content, in_manifest=EarlierOutput(source, asked, other)), DamagedOutput
        )
        assert found(made, content, in_manifest=EarlierOutput(source, "other settings", other)) == whole
        assert found(made, content, in_manifest=EarlierOutput("0" * 64, asked, other)) == whole


def test_digests_are_those_of_the_bytes(made: tuple[Request, Path]) -> None:
    content = made[1].read_bytes()
    start = header_of(content)
    with safe_open(made[1], "pt") as file:
        entry = json.loads(file.metadata()["ckpt_tools"])
    assert (entry["data_sha256"], entry["data_bytes"]) == (digest(content[start:]), len(content) - start)
    blank = content[8:start].replace(entry["header_sha256"].encode(), b"0" * 64)
    assert entry["header_sha256"] == digest(blank)
    assert content[start - 8 : start] == b" " * 8, "no other program pads so far"


# --- the entry ----------------------------------------------------------------------------------------------


def test_a_copied_entry_hides_no_checkpoint(made: tuple[Request, Path], tmp_path: Path) -> None:
    """Training goes on from an output and keeps metadata: the new file says what is true of the old."""
    with safe_open(made[1], "pt") as file:
        metadata = file.metadata()
    state = load_file(made[1])
    save_file(state, tmp_path / "same.safetensors", metadata)
    save_file({key: tensor + 1 for key, tensor in state.items()}, tmp_path / "trained.safetensors", metadata)
    write_safetensors(tmp_path / "ours.safetensors", state, metadata=metadata)  # which seals it anew
    assert [one.location.name for one in find_checkpoints([tmp_path])] == [
        "same.safetensors",
        "trained.safetensors",
    ]


NAMES = ["version", "settings", "source", "source_sha256", "weights", "prefix", "data_sha256", "data_bytes"]
NAMES += ["header_sha256", "expect", "scheme", "earlier", "x"]
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just("0.1.0")
    | st.just("a" * 64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=12,
)
SOURCE = {"source": "a.pt", "source_sha256": "a" * 64, "weights": "", "prefix": ""}


def is_of_0_1_0(entry: Any) -> bool:
    """What version 0.1.0 may have written, said in another way than the code does."""
    if (
        not isinstance(entry, dict)
        or entry.get("version") != "0.1.0"
        or {"data_sha256", "data_bytes"} & set(entry)
    ):
        return False
    kinds = {name: type(entry.get(name)) for name in SOURCE}
    sourced = set(kinds.values()) == {str} and len(entry["source_sha256"]) == 64
    fresh = (
        not set(SOURCE) & set(entry)
        and entry.get("expect") == "init"
        and isinstance(entry.get("scheme"), str)
    )
    return (sourced or fresh) and "header_sha256" not in entry and isinstance(entry.get("settings", ""), str)


@settings(max_examples=150)
@given(
    entry=JSON
    | st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, JSON)).map(lambda more: {**SOURCE, **more}),
    text=st.none() | st.text(max_size=20),
)
def test_no_entry_hides_a_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, entry: Any, text: str | None
) -> None:
    folder = tmp_path_factory.mktemp("any", numbered=True)
    written = json.dumps(entry) if text is None else text
    save_file(STATE, folder / "a.safetensors", {"ckpt_tools": written})
    assume(text is not None or not is_of_0_1_0(json.loads(written)))
    assert [one.location.name for one in find_checkpoints([folder])] == ["a.safetensors"]


@pytest.mark.parametrize(
    "entry",
    [
        {"version": "0.1.0"},
        {"version": "0.1.0", "settings": "x"},
        {**SOURCE, "version": "9"},
        {**SOURCE, "version": "0.1.0", "source_sha256": "A" * 64},
        {**SOURCE, "version": "0.1.0", "data_bytes": 3},
        {**SOURCE, "version": "0.1.0", "settings": ["x"]},
        {**SOURCE, "version": "0.1.0", "weights": None},
    ],
)
def test_entries_that_are_nearly_ours(tmp_path: Path, entry: object) -> None:
    save_file(STATE, tmp_path / "a.safetensors", {"ckpt_tools": json.dumps(entry)})
    assert read_provenance_entry(tmp_path / "a.safetensors") is None


def test_deep_entries(tmp_path: Path) -> None:
    deep = "[" * 500 + "]" * 500
    entry = json.dumps({**SOURCE, "version": "0.1.0"})[:-1] + f', "x": {deep}}}'
    save_file(STATE, tmp_path / "a.safetensors", {"ckpt_tools": entry})
    assert read_provenance_entry(tmp_path / "a.safetensors") is None
    save(tmp_path / "b.safetensors", read_checkpoint(tmp_path / "a.safetensors"), {}, provenance={})
    assert "earlier" not in read_provenance_entry(tmp_path / "b.safetensors")


def test_outputs_of_0_1_0_are_none_but_cannot_prove_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(STATE, "a.pt")
    asked = Request(Location(Path("a.pt")), "data.npy")
    metadata = output_metadata(
        read_checkpoint("a.pt"), {"settings": asked.settings_digest()}, digest(Path("a.pt").read_bytes())
    )
    save_file(STATE, "a.bn.safetensors", metadata)
    save_file(STATE, "init.safetensors", output_metadata(None, {"expect": "init", "scheme": "normal"}))
    assert [one.location.name for one in find_checkpoints([tmp_path])] == ["a.pt"]
    with pytest.raises(Exception, match=r"of version 0\.1\.0.*--overwrite"):
        find_earlier_output(Path("a.bn.safetensors"), asked, None)


# --- a run --------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", torch.cat(nets.batches((3, 8, 8))).numpy())
    Path("runs").mkdir()
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        torch.save(nets.DenseNet().state_dict(), f"runs/{name}.pt")
    return tmp_path


def run(*more: str) -> Result:
    command = ["bn-reestimate", "runs", "--data", "data.npy", "--arch", "nets:DenseNet", "--batch-size", "16"]
    return CliRunner().invoke(main, [*command, "--force", "-q", *more])


@pytest.mark.parametrize("place", ["fixed", "runs"])
def test_a_damaged_output_is_made_again(runs: Path, place: str) -> None:
    more = ["--output-dir", "fixed"] if place == "fixed" else []
    assert run(*more).exit_code == 0
    outputs = {path: path.read_bytes() for path in sorted(Path(place).glob("*.safetensors"))}
    damaged = min(outputs)
    whole = outputs[damaged]
    damages: dict[str, Callable[[], object]] = {
        "cut off": lambda: damaged.write_bytes(whole[:-4]),
        "zeros": lambda: damaged.write_bytes(
            whole[: header_of(whole)] + bytes(len(whole) - header_of(whole))
        ),
    }
    for number, damage in enumerate(damages.values()):
        damage()
        result = run(*more, "--json")
        assert result.exit_code == 0, result.output
        made, kept = json.loads(result.stdout)["checkpoints"]
        assert (made["status"], kept["status"], kept["replaced"]) == ("done", "done before", None)
        assert made["replaced"]
        assert {path: path.read_bytes() for path in Path(place).glob("*.safetensors")} == outputs
        lines = [json.loads(line) for line in Path(place, "ckpt-fix.jsonl").read_text().splitlines()]
        assert len(lines) == 3 + number
        assert (lines[-1]["output_sha256"], lines[-1]["output_bytes"]) == (digest(whole), len(whole))
    damages["zeros"]()
    assert "1 damaged earlier output, made again:" in run(*more).stdout


def test_what_is_not_ours_is_not_replaced(runs: Path) -> None:
    assert run("--output-dir", "fixed").exit_code == 0
    output = Path("fixed/a.bn.safetensors")
    whole = output.read_bytes()
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    save_file(
        {key: tensor + 1 for key, tensor in load_file(output).items()}, output, metadata
    )  # somebody trained on
    for content in (output.read_bytes(), b"", whole[:20], b"notes"):
        output.write_bytes(content)
        result = run("--output-dir", "fixed")
        assert (result.exit_code, "a.bn.safetensors: expected no such file" in result.output) == (1, True)
        assert output.read_bytes() == content


def test_a_damaged_output_that_is_exchanged_meanwhile(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--output-dir", "fixed").exit_code == 0
    output = Path("fixed/a.bn.safetensors")
    output.write_bytes(output.read_bytes()[:-4])

    def late(*_: object) -> None:
        output.unlink()
        output.write_text("precious")

    monkeypatch.setattr("ckpt_tools.storage.output.checkpoint_writer.require_same_stamps", late)
    assert run("--output-dir", "fixed").exit_code == 1
    assert output.read_text() == "precious"
