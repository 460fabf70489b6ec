"""All formats that libraries save: read as saved, re-estimated as plain state dicts, refused with a word."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import format_files
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from format_files import FORMATS, ORDERED, Maker, Net, assert_holds, maker_id, trained
from safetensors.torch import load_file
from torch import Tensor, nn

from ckpt_tools.cli import main
from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.contents.averaged_copies import find_averaged_copies
from ckpt_tools.storage.output.checkpoint_writer import save
from ckpt_tools.storage.reading import checkpoint_sha256, read_checkpoint


@pytest.fixture
def model() -> nn.Module:
    return trained()


# --- every format -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", FORMATS, ids=maker_id)
def test_the_state_dict_bit_for_bit(tmp_path: Path, model: nn.Module, maker: Maker) -> None:
    path = maker(model, tmp_path)
    checkpoint = read_checkpoint(path)
    assert_holds(checkpoint, model.state_dict())
    if maker in ORDERED:
        assert list(checkpoint.tensors) == list(model.state_dict())
    assert len(checkpoint_sha256(path)) == 64
    digest = save(tmp_path / "copy.safetensors", checkpoint, {}, provenance={})
    assert digest == checkpoint_sha256(tmp_path / "copy.safetensors")
    assert_holds(read_checkpoint(tmp_path / "copy.safetensors"), model.state_dict())


@pytest.mark.parametrize("maker", FORMATS, ids=maker_id)
def test_reestimated_as_the_plain_state_dict(tmp_path: Path, model: nn.Module, maker: Maker) -> None:
    np.save(tmp_path / "data.npy", torch.randn(24, 3, 8, 8).numpy())
    outputs = [reestimated(tmp_path, m(model, tmp_path)) for m in (format_files.state_dict, maker)]
    assert {key: tensor.tolist() for key, tensor in outputs[0].items()} == {
        k: t.tolist() for k, t in outputs[1].items()
    }
    assert not torch.equal(outputs[0]["body.5.running_var"], model.state_dict()["body.5.running_var"])


def reestimated(folder: Path, checkpoint: Path) -> dict[str, Tensor]:
    arguments = [
        "bn-reestimate",
        checkpoint,
        "--data",
        folder / "data.npy",
        "--arch",
        "format_files:Net",
        "-q",
    ]
    output = folder / "out.safetensors"
    more = ["--model-kwargs", "rate=0.3", "--force", "--overwrite", "-o", output]
    result = CliRunner().invoke(main, [str(word) for word in (*arguments, *more)])
    assert result.exit_code == 0, result.output
    return load_file(output)


@pytest.mark.parametrize("maker", FORMATS, ids=maker_id)
def test_damage_is_one_clear_error(tmp_path: Path, model: nn.Module, maker: Maker) -> None:
    path = maker(model, tmp_path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    chance = random.Random(0)
    for _ in range(40):
        file = chance.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.choice([0, 1, 3])):
            at = chance.randrange(len(whole))
            damaged[at : at + 1] = bytes([chance.choice([0, 0x28, 0x2E, 0xFF])])
        file.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):  # a weight may be hit, which nobody can tell
            read_checkpoint(path)
        file.write_bytes(whole)
    assert_holds(read_checkpoint(path), model.state_dict())


# --- whole modules ------------------------------------------------------------------------------------------


def test_whole_module_says_its_class_and_rates(tmp_path: Path, model: nn.Module) -> None:
    said = read_checkpoint(format_files.whole_module(model, tmp_path)).words["module"]
    assert said == {"class": "format_files.Net", "rates": {"body.3": {"p": 0.3}}}
    said = read_checkpoint(format_files.scripted(model, tmp_path)).words["module"]
    assert said == {"class": "format_files.Net", "rates": {"body.3": {"p": 0.3}}}


def test_wrapped_module_says_what_is_inside(tmp_path: Path, model: nn.Module) -> None:
    said = read_checkpoint(format_files.data_parallel(model, tmp_path)).words
    # Paths are the file's own; the checkpoint's prefix tells what was removed from the keys.
    assert said == {
        "epoch": 3,
        "module": {"class": "format_files.Net", "rates": {"module.body.3": {"p": 0.3}}},
    }


@pytest.mark.parametrize(
    "maker", [format_files.whole_module, format_files.data_parallel, format_files.ultralytics]
)
def test_trusted_module_is_handed_on(tmp_path: Path, model: nn.Module, maker: Maker) -> None:
    path = maker(model, tmp_path)
    assert read_checkpoint(path).module is None
    checkpoint = read_checkpoint(path, trust=True)
    assert isinstance(checkpoint.module, Net)
    assert_holds(checkpoint, checkpoint.module.state_dict())
    assert_holds(checkpoint, model.state_dict())


def test_model_beside_its_average(tmp_path: Path, model: nn.Module) -> None:
    torch.save({"model": Net(), "ema": model, "epoch": 3}, tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert (checkpoint.weights, checkpoint.left_out, checkpoint.words["epoch"]) == ("ema", ("model",), 3)
    assert_holds(checkpoint, model.state_dict())
    assert read_checkpoint(tmp_path / "x.pt", weights="model").weights == "model"


def test_pair_of_state_dict_and_optimizer(tmp_path: Path, model: nn.Module) -> None:
    torch.save((model.state_dict(), format_files.optimizer_state(model)), tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert (checkpoint.weights, checkpoint.left_out) == ("0", ("1",))
    assert_holds(checkpoint, model.state_dict())
    torch.save([model.state_dict(), model], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"found 2 that could be meant: 0, 1\."):
        read_checkpoint(tmp_path / "x.pt")


class Learner:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.lr = model, 0.1


class Sealed(Learner):
    def __reduce__(self) -> object:
        return Sealed, (self.model,)


def test_object_around_a_module(tmp_path: Path, model: nn.Module) -> None:
    torch.save(Learner(model), tmp_path / "x.pkl")
    checkpoint = read_checkpoint(tmp_path / "x.pkl")
    assert (checkpoint.weights, checkpoint.words["lr"]) == ("model", 0.1)
    assert_holds(checkpoint, model.state_dict())
    torch.save({"learner": Sealed(model)}, tmp_path / "x.pkl")
    with pytest.raises(CheckpointError, match=r"found none.*--trust.*test_formats\.Sealed"):
        read_checkpoint(tmp_path / "x.pkl")


# --- Lightning ----------------------------------------------------------------------------------------------


def test_lightning_checkpoint_and_its_averaging(tmp_path: Path, model: nn.Module) -> None:
    with format_files.quietly():
        from lightning.pytorch.callbacks import EMAWeightAveraging

    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = read_checkpoint(format_files.lightning_ckpt(model, tmp_path))
    assert_holds(plain, before, "model.")
    assert plain.words["hyper_parameters"] == {"arch": "resnet18", "lr": 0.0}
    path = format_files.lightning_ckpt(model, tmp_path, EMAWeightAveraging(decay=0.5))
    raw = torch.load(path, weights_only=False)
    assert {"state_dict", "current_model_state", "averaging_state"} <= set(raw)
    for choice, name in (("auto", "state_dict"), ("ema", "state_dict"), ("model", "current_model_state")):
        checkpoint = read_checkpoint(path, weights=choice)
        assert checkpoint.weights == name
        assert_holds(checkpoint, {key: tensor.detach() for key, tensor in raw[name].items()})


COPIES = {
    "ema_model": {"": "model.", "ema": "ema_model."},
    "model_ema.module": {"": "model.", "ema": "model_ema.module."},
    "ema": {"": "", "ema": "ema."},
    "model.ema": {"": "model.net.", "ema": "model.ema."},
    "ema.ema_model": {"": "ema.online_model.", "ema": "ema.ema_model."},
}


@pytest.mark.parametrize("name", ["ema_model", "model_ema.module", "ema", "model.ema"])
def test_averaged_copy_within_a_state_dict(tmp_path: Path, model: nn.Module, name: str) -> None:
    places = COPIES[name]
    average = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    content = {places[""] + key: tensor for key, tensor in model.state_dict().items()}
    content |= {places["ema"] + key: tensor for key, tensor in average.items()}
    content |= {places["ema"].partition(".")[0] + ".n_averaged": torch.tensor(3)} if "module" in name else {}
    torch.save({"state_dict": content}, tmp_path / "x.ckpt")
    for choice in ("auto", "ema", f"state_dict.{name}"):
        checkpoint = read_checkpoint(tmp_path / "x.ckpt", weights=choice)
        assert checkpoint.weights == f"state_dict.{name}"
        assert_holds(checkpoint, average, places["ema"])
    raw = read_checkpoint(tmp_path / "x.ckpt", weights="model")
    assert_holds(raw, model.state_dict(), places[""])
    assert raw.left_out[0].endswith("tensors)")


def test_branches_with_similar_names_are_no_copies() -> None:
    branch = {"0.weight": torch.ones(2, 2), "1.running_var": torch.ones(2)}
    state = {
        f"{name}.{key}": tensor for name in ("avg_branch", "max_branch") for key, tensor in branch.items()
    }
    assert find_averaged_copies(state) == []
    without_statistics = {"ema.0.weight": torch.ones(2, 2), **branch}
    assert find_averaged_copies(without_statistics) == []


def test_timm_saver_after_reestimation_of_its_average(tmp_path: Path) -> None:
    import timm
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = timm.create_model("test_byobnet", num_classes=4)
    ema = ModelEmaV3(model)
    args = __import__("argparse").Namespace(model="test_byobnet", drop=0.1, num_classes=4)
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), 0.1), args, ema, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(1, metric=1.0)
    checkpoint = read_checkpoint(tmp_path / "last.pth.tar")
    assert checkpoint.weights == "state_dict_ema"
    assert_holds(checkpoint, ema.module.state_dict())
