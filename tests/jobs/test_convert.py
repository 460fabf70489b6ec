"""``convert_checkpoint``: whatever can be read comes out as safetensors, bit for bit.

The keys and their order stay the same.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ckpt_tools.cli import main
from ckpt_tools.errors import CheckpointError, OutputError
from ckpt_tools.jobs.conversion import ConvertRequest, convert_checkpoint, keys_sharing_memory
from ckpt_tools.jobs.outputs import default_output_path
from ckpt_tools.location import Location


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def state() -> dict[str, torch.Tensor]:
    return {
        "z.weight": torch.randn(3, 4),
        "a.weight": torch.randn(2, 5).half(),
        "bn.running_var": torch.rand(3).bfloat16(),
        "bn.num_batches_tracked": torch.tensor(7),
        "nothing": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
    }


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


def as_plain(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "model.pt")
    return folder / "model.pt"


def as_legacy(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "model.pth.tar", _use_new_zipfile_serialization=False)
    return folder / "model.pth.tar"


def as_training_state(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    wrapped = {f"module.{key}": value for key, value in tensors.items()}
    torch.save(
        {"epoch": 3, "state_dict": wrapped, "optimizer": {"state": {}, "param_groups": []}}, folder / "x.ckpt"
    )
    return folder / "x.ckpt"


def as_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def as_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    (folder / "shards").mkdir()
    names = {}
    for number, key in enumerate(tensors):
        names[key] = f"model-{number % 2}.safetensors"
    for name in set(names.values()):
        part = {key: tensors[key].contiguous() for key in tensors if names[key] == name}
        save_file(part, folder / "shards" / name)
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder / "shards"


@pytest.mark.parametrize("saved", [as_plain, as_legacy, as_training_state, as_safetensors, as_shards])
def test_every_tensor_comes_out_as_it_went_in(tmp_path: Path, saved) -> None:
    tensors = state()
    source, output = saved(tmp_path, tensors), tmp_path / "out.safetensors"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ok("convert", source, "-o", output)
    require_same(load_file(output), tensors)
    assert {path: path.read_bytes() for path in before} == before
    assert "0 different" in ok("diff", source, output, "--expect", "nothing").stdout
    if saved is not as_safetensors:  # which sorts
        assert [key for key in header(output) if key != "__metadata__"] == list(tensors)
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []


def header(path: Path) -> dict[str, object]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


@given(
    st.dictionaries(
        st.text("abc.xyz_é", min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_state_dict_survives(described) -> None:
    tensors = {key: (torch.randn(shape) * 3).to(dtype) for key, (dtype, shape) in described.items()}
    tensors["net.weight"] = torch.ones(2)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tensors, Path(folder, "m.pt"))
        done = convert_checkpoint(ConvertRequest(Location(Path(folder, "m.pt"))))
        require_same(load_file(done.output.path), dict(done.checkpoint.tensors))
        assert list(done.checkpoint.tensors) == list(tensors)


def test_the_name_is_found_and_the_output_says_where_it_comes_from(tmp_path: Path) -> None:
    source = as_plain(tmp_path, state())
    result = json.loads(ok("convert", source, "--json").stdout)
    assert result["output"]["path"] == str(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        said = json.loads(file.metadata()["ckpt_tools"])
        assert file.metadata()["format"] == "pt"
    assert (said["source"], said["source_sha256"]) == ("model.pt", result["checkpoint"]["sha256"])


def test_an_entry_is_chosen(tmp_path: Path) -> None:
    raw, averaged = state(), {key: value for key, value in state().items() if key != "nothing"}
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, tmp_path / "last.pth.tar")
    for weights, expected in (("auto", averaged), ("ema", averaged), ("model", raw), ("state_dict", raw)):
        output = tmp_path / f"{weights}.safetensors"
        text = ok("convert", tmp_path / "last.pth.tar", "--weights", weights, "-o", output).stdout
        require_same(load_file(output), expected)
        assert f"left out: {'state_dict' if expected is averaged else 'state_dict_ema'}" in text
        ok("diff", tmp_path / "last.pth.tar", output, "--expect", "nothing")


def test_tied_tensors_are_written_once_each_and_named(tmp_path: Path) -> None:
    net = nn.ModuleDict({"head": nn.Linear(4, 3), "tied": nn.Linear(4, 3), "free": nn.Linear(4, 3)})
    net["tied"].weight = net["head"].weight
    torch.save(net.state_dict(), tmp_path / "tied.pt")
    result = json.loads(ok("convert", tmp_path / "tied.pt", "--json").stdout)
    assert result["shared"] == [["head.weight", "tied.weight"]]
    require_same(load_file(tmp_path / "tied.safetensors"), net.state_dict())
    assert "head.weight, tied.weight" in ok("convert", tmp_path / "tied.pt", "--overwrite").stdout


def test_shared_memory_is_told_from_neighbours() -> None:
    base = torch.arange(12.0)
    parts = {
        "left": base[:4],
        "right": base[4:8],
        "across": base[3:5],
        "copy": base.clone(),
        "none": base[:0],
    }
    assert keys_sharing_memory(parts) == (("left", "right", "across"),)
    assert keys_sharing_memory({"left": base[:6], "right": base[6:]}) == ()
    assert keys_sharing_memory({"b": base, "a": base.view(3, 4).t(), "c": base[-1:]}) == (("b", "a", "c"),)


@pytest.mark.parametrize(
    ("source", "kind", "output"),
    [
        ("model.pt", "", "model.safetensors"),
        ("model.pt", "bn", "model.bn.safetensors"),
        ("model.pt2", "", "model.safetensors"),
        ("model.pkl", "bn", "model.bn.safetensors"),
        ("model.pth.tar", "", "model.safetensors"),
        ("model.safetensors", "init", "model.init.safetensors"),
        ("pytorch_model.bin.index.json", "", "pytorch_model.safetensors"),
        ("folder", "", "folder.safetensors"),
        ("epoch=3-step=10.ckpt", "", "epoch=3-step=10.safetensors"),
        ("v1.5", "", "v1.5.safetensors"),
    ],
)
def test_names_of_outputs(tmp_path: Path, source: str, kind: str, output: str) -> None:
    assert default_output_path(tmp_path / source, kind).path == tmp_path / output


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    source = as_plain(tmp_path, state())
    copy = as_safetensors(tmp_path, state())
    (tmp_path / "text.pt").write_text("no checkpoint\n" * 100)
    for arguments, said in (
        ([copy], "another name"),
        ([source], "--overwrite"),
        ([source, "-o", source, "--overwrite"], "never"),
        ([source, "-o", tmp_path / "out.pt"], "out.safetensors"),
        ([source, "--weights", "ema", "-o", tmp_path / "new.safetensors"], "averaged"),
        ([tmp_path / "text.pt"], "a text file"),
        ([tmp_path / "missing.pt"], "nothing there"),
    ):
        before = sorted(tmp_path.iterdir())
        result = run("convert", *arguments)
        assert result.exit_code == 1, arguments
        assert said in result.stderr
        assert sorted(tmp_path.iterdir()) == before


def test_errors_are_the_packages_own(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="found none"):
        convert_checkpoint(ConvertRequest(Location(tmp_path / "empty.pt")))
    with pytest.raises(OutputError, match=r"copy\.safetensors"):
        convert_checkpoint(ConvertRequest(Location(as_safetensors(tmp_path, state()))))
