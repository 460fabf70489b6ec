from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import ArchitectureError, CheckpointError, UsageError
from ckpt_tools.identify.key_matching import common_prefix
from ckpt_tools.identify.loading import identify_model, load, load_architecture
from ckpt_tools.identify.model_kwargs import parse_model_kwargs

HERE = "test_load:Small"


class Small(nn.Module):
    """A body and a head, with a mask that is infinite on purpose and dropout of a rate given late."""

    def __init__(self, num_classes: int = 10, width: int = 4, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(width, num_classes)
        self.register_buffer("mask", torch.full((2,), -torch.inf))

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x))).mean((2, 3)))


class ZeroToThree(Small):
    def __init__(self, drop_rate: float = 0.0) -> None:
        assert drop_rate in (0.0, 0.3)
        super().__init__(drop_rate=drop_rate)


def trained(model):
    """Numbers that initialisation does not produce, also in the buffers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name != "mask":
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.01)
    return model.eval()


def checkpoint(model_or_tensors, **words):
    tensors = model_or_tensors.state_dict() if isinstance(model_or_tensors, nn.Module) else model_or_tensors
    return Checkpoint(Path("some.pt"), "pickle", dict(tensors), words=words)


def same_function(loaded, model, size=32):
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        return torch.equal(loaded.model(x), model(x))


def test_the_loaded_model_computes_what_the_saved_one_did(tmp_path):
    model = trained(torchvision.models.mobilenet_v3_small(num_classes=4))
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", "torchvision:mobilenet_v3_small")
    assert same_function(loaded, model)
    assert loaded.recipe.kwargs == {"num_classes": 4}
    assert loaded.rates == "unknown"
    assert not loaded.model.training


def test_a_timm_train_py_checkpoint_needs_nothing_said(tmp_path):
    model = trained(timm.create_model("resnet18", num_classes=6, in_chans=1))
    args = argparse.Namespace(
        model="resnet18", num_classes=6, drop=0.0, drop_path=0.1, input_size=[1, 64, 64], model_kwargs={}
    )
    torch.save(
        {"arch": "resnet18", "state_dict": model.state_dict(), "args": args, "version": 2}, tmp_path / "m.pt"
    )
    loaded = load(tmp_path / "m.pt")
    assert (loaded.recipe.architecture, loaded.rates) == ("timm:resnet18", "recorded")
    assert loaded.recipe.kwargs["drop_path_rate"] == 0.1
    assert loaded.input_spec.shape == (1, 64, 64)
    assert load(tmp_path / "m.pt", model_kwargs={"drop_rate": 0.2}).rates == "given"
    assert load(tmp_path / "m.pt", "timm:resnet18").recipe == loaded.recipe


def test_another_architecture_than_the_recorded_one_ignores_its_arguments():
    words = {"arch": "resnet34", "args": {"model": "resnet34", "drop": 0.1, "num_classes": 5}}
    loaded = identify_model(checkpoint(timm.create_model("resnet18"), **words), "timm:resnet18")
    assert loaded.rates == "unknown"
    assert loaded.recipe.kwargs["num_classes"] == 1000


@pytest.mark.parametrize("key", ["args", "hyper_parameters"])
def test_a_scripts_own_rates_count_for_a_factory(key):
    loaded = identify_model(checkpoint(Small(), **{key: {"drop_rate": 0.3, "lr": 0.1}}), HERE)
    assert loaded.rates == "recorded"
    assert loaded.model.drop.p == 0.3


def test_the_users_word_goes_before_the_checkpoints():
    loaded = identify_model(checkpoint(Small(), args={"drop_rate": 0.3}), HERE, {"drop_rate": 0.0})
    assert loaded.rates == "given"
    assert loaded.model.drop.p == 0.0


def test_the_probe_has_every_rate_switched_on():
    loaded = identify_model(checkpoint(Small(num_classes=2)), HERE)
    assert loaded.probe.drop.p == 0.2
    assert loaded.probe.head.weight.is_meta
    assert loaded.probe.head.out_features == 2
    assert loaded.model.drop.p == 0.0


def test_no_probe_where_there_is_no_rate_or_it_cannot_be_built():
    assert identify_model(checkpoint(torchvision.models.resnet18()), "torchvision:resnet18").probe is None
    assert identify_model(checkpoint(ZeroToThree()), "test_load:ZeroToThree").probe is None


def test_the_keys_decide_between_libraries():
    words = {"arch": "mobilenetv3_small_050"}
    assert identify_model(checkpoint(timm.create_model(words["arch"]), **words)).recipe.adapter == "timm"
    twin = {"arch": "densenet121", "model_kwargs": {"memory_efficient": False}}
    model = torchvision.models.densenet121(num_classes=2)
    assert identify_model(checkpoint(model, **twin)).recipe.adapter == "timm"  # both fit: the first
    with pytest.raises(ArchitectureError, match=r"--arch timm:densenet121 or --arch torchvision:densenet121"):
        identify_model(checkpoint(model, arch="densenet121", args={"drop_rate": 0.2}))


@pytest.mark.parametrize("prefix", ["model.", "net.inner."])
def test_a_model_inside_a_larger_one_is_found(prefix):
    model = trained(Small(num_classes=3))
    tensors = {"loss.weight": torch.ones(3)} | {prefix + key: t for key, t in model.state_dict().items()}
    loaded = identify_model(checkpoint(tensors), HERE)
    assert same_function(loaded, model)
    assert loaded.checkpoint.prefix == prefix
    assert list(loaded.checkpoint.tensors) == list(model.state_dict())
    assert loaded.checkpoint.left_out == ("loss (1 tensors)",)


def test_a_prefix_is_not_seen_where_there_is_none():
    assert common_prefix(["conv.weight", "layer.conv.weight"], ["conv.weight", "layer.conv.weight"]) == ""
    assert common_prefix(["a", "b", "c", "d"], ["x.a", "y.z"]) == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype):
    model = trained(Small()).to(dtype)
    loaded = identify_model(checkpoint(model), HERE)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.head.weight, model.head.weight.float())
    assert loaded.checkpoint.tensors["head.weight"].dtype == dtype


def test_checkpoints_from_before_num_batches_tracked_load():
    tensors = {key: t for key, t in Small().state_dict().items() if not key.endswith("num_batches_tracked")}
    assert identify_model(checkpoint(tensors), HERE).model.norm.num_batches_tracked == 0


def test_a_misfit_names_the_first_differences_and_both_shapes():
    tensors = Small(width=8).state_dict()
    del tensors["norm.running_var"]
    tensors["extra.bias"] = torch.zeros(5)
    with pytest.raises(ArchitectureError) as raised:
        identify_model(checkpoint(tensors), HERE)
    said = str(raised.value)
    assert f"conv.weight: {HERE} expects (4, 3, 3, 3), the checkpoint holds (8, 3, 3, 3)" in said
    assert f"norm.running_var: {HERE} expects (4,), the checkpoint lacks it" in said
    assert f"extra.bias: {HERE} has no such tensor, the checkpoint holds (5,)" in said
    assert "--model-kwargs" in said
    assert len(said.splitlines()) < 12


def test_a_file_without_words_asks_for_an_architecture():
    with pytest.raises(
        ArchitectureError, match=r"(?s)does not say which architecture it holds\..*Give --arch"
    ):
        identify_model(checkpoint(Small(), epoch=3))
    with pytest.raises(ArchitectureError, match=r"(?s)'my_net', which no adapter.*--arch"):
        identify_model(checkpoint(Small(), arch="my_net"))


@pytest.mark.parametrize("key", ["head.weight", "norm.running_var"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused(key, value):
    tensors = Small().state_dict()
    tensors[key].view(-1)[1] = value
    with pytest.raises(CheckpointError, match=rf"some\.pt: {key}: expected finite numbers, found 1 NaN"):
        identify_model(checkpoint(tensors), HERE)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_weights_that_are_no_floats_are_refused(dtype):
    tensors = Small().state_dict()
    tensors["head.bias"] = tensors["head.bias"].to(dtype)
    with pytest.raises(CheckpointError, match=f"head.bias: expected (floating-point|real) numbers.*{dtype}"):
        identify_model(checkpoint(tensors), HERE)


def test_an_architecture_alone():
    loaded = load_architecture("timm:resnet18", {"drop_rate": 0.1})
    assert (loaded.checkpoint, loaded.rates) == (None, "model")
    assert loaded.input_spec.shape == (3, 224, 224)
    assert loaded.probe is not None


def test_model_kwargs_are_python_values_or_strings():
    pairs = [
        "drop_rate=0.2",
        "block_config=(4, 4)",
        "norm=bn",
        "bias=False",
        "url=a=b",
        "none=None",
        "empty=",
    ]
    assert parse_model_kwargs(pairs) == {
        "drop_rate": 0.2, "block_config": (4, 4), "norm": "bn", "bias": False, "url": "a=b",
        "none": None, "empty": "",
    }  # fmt: skip


@pytest.mark.parametrize("pair", ["drop_rate", "=0.2", "drop-rate=1", "2x=1", ""])
def test_malformed_model_kwargs_are_a_usage_error(pair):
    with pytest.raises(UsageError, match="expected name=value"):
        parse_model_kwargs([pair])


def test_a_model_kwarg_given_twice_is_a_usage_error():
    with pytest.raises(UsageError, match="twice"):
        parse_model_kwargs(["a=1", "a=2"])
