"""Which weights of a file are taken, in the layouts of frameworks that average.

The layouts were compared with files that the frameworks themselves have written: timm 1.0, Lightning 2.6,
mmengine 0.10, ultralytics 8.4, ema-pytorch 0.8, Composer 0.32, fastai 2.8, torch's AveragedModel.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.reading import read_checkpoint, reread_checkpoint

Tensors = dict[str, Tensor]


def weights(value: float) -> Tensors:
    """A small state dict, all of whose numbers with a fraction are ``value``."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return {
        key: torch.full_like(tensor, value) if tensor.is_floating_point() else tensor
        for key, tensor in model.state_dict().items()
    }


AVERAGED, RAW = 2.0, 1.0


def under(prefix: str, value: float, **more: Tensor) -> Tensors:
    return {**more, **{prefix + key: tensor for key, tensor in weights(value).items()}}


def parameters(value: float) -> Tensors:
    return {key: tensor for key, tensor in weights(value).items() if key.endswith(("weight", "bias"))}


COUNT = torch.tensor(7)
LAYOUTS = {
    "timm": {"state_dict": weights(RAW), "state_dict_ema": weights(AVERAGED)},
    "torchvision": {"model": weights(RAW), "model_ema": under("module.", AVERAGED, n_averaged=COUNT)},
    "torch, under a name that tells nothing": {
        "model": weights(RAW),
        "second": under("module.", AVERAGED, n_averaged=COUNT),
    },
    "torch, alone": under("module.", AVERAGED, n_averaged=COUNT),
    "Lightning WeightAveraging": {
        "state_dict": weights(AVERAGED),
        "callbacks": {"EMAWeightAveraging": {"latest_update_step": 4}},
        "current_model_state": weights(RAW),
        "averaging_state": {"n_averaged": COUNT},
    },
    "mmengine": {
        "meta": {"epoch": 3, "mmengine_version": "0.10.7"},
        "state_dict": weights(AVERAGED),
        "message_hub": {},
        "ema_state_dict": under("module.", RAW, steps=COUNT),
    },
    "mmengine, without all that is not weights": {
        "state_dict": weights(AVERAGED),
        "ema_state_dict": under("module.", RAW, steps=COUNT),
    },
    "a script with mmengine's names": {"state_dict": weights(RAW), "ema_state_dict": weights(AVERAGED)},
    "mmcv 1": {
        "meta": {"epoch": 3, "mmcv_version": "1.7.1"},
        "state_dict": {
            **weights(AVERAGED),
            **{f"ema_{key.replace('.', '_')}": tensor for key, tensor in parameters(RAW).items()},
        },
    },
    "mmdetection 2": {
        **weights(AVERAGED),
        **{f"ema_{key.replace('.', '_')}": tensor for key, tensor in weights(RAW).items()},
    },
    "d2go": {"model": weights(RAW), "iteration": 9, "ema_state": weights(AVERAGED)},
    "YOLOX": {"start_epoch": 2, "model": weights(AVERAGED), "optimizer": {"param_groups": []}},
    "Composer": {
        "state": {
            "model": weights(AVERAGED),
            "algorithms": [("EMA", {"ema_model": {"named_parameters_dict": parameters(RAW)}})],
        }
    },
    "ema-pytorch": {
        **under("online_model.", RAW),
        **under("ema_model.", AVERAGED, initted=torch.tensor(True), step=COUNT),
    },
    "ema-pytorch, as an entry": {
        "model": weights(RAW),
        "ema": {
            **under("online_model.", RAW),
            **under("ema_model.", AVERAGED, initted=torch.tensor(True), step=COUNT),
        },
    },
}


def value_of(folder: Path, content: object, choice: str = "auto") -> float:
    """The number of the weights that are taken."""
    torch.save(content, folder / "x.pt")
    checkpoint = read_checkpoint(folder / "x.pt", weights=choice)
    values = {
        float(value)
        for key, tensor in checkpoint.tensors.items()
        if key.endswith(("weight", "bias"))
        for value in tensor.unique()
    }
    assert len(values) == 1
    again = reread_checkpoint(folder / "x.pt", weights=checkpoint.weights, prefix=checkpoint.prefix)
    assert list(again.tensors) == list(checkpoint.tensors)
    assert sum(key.endswith("running_var") for key in checkpoint.tensors) == 1
    return values.pop()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_averaged_weights_are_taken(tmp_path: Path, layout: str) -> None:
    assert value_of(tmp_path, LAYOUTS[layout]) == AVERAGED


@pytest.mark.parametrize("layout", ["timm", "torchvision", "Lightning WeightAveraging", "mmengine", "d2go"])
def test_the_others_on_request(tmp_path: Path, layout: str) -> None:
    assert value_of(tmp_path, LAYOUTS[layout], "model") == RAW
    assert value_of(tmp_path, LAYOUTS[layout], "ema") == AVERAGED


@pytest.mark.parametrize("layout", ["mmcv 1", "mmdetection 2"])
def test_buffers_of_mmcv_are_left_out_and_can_be_asked_for(tmp_path: Path, layout: str) -> None:
    content = LAYOUTS[layout]
    torch.save(content, tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert list(checkpoint.tensors) == list(weights(AVERAGED))
    name = f"{checkpoint.weights}.ema_*".lstrip(".")
    assert value_of(tmp_path, content, name) == RAW


@pytest.mark.parametrize("name", ["ema", "shadow_ema"])
@pytest.mark.parametrize("nested", [False, True])
def test_averaged_parameters_go_with_the_statistics_of_the_model(
    tmp_path: Path, name: str, nested: bool
) -> None:
    """As in scripts whose average holds the parameters alone."""
    average = {"decay": 0.999, "shadow": parameters(AVERAGED)} if nested else parameters(AVERAGED)
    content = {"model": weights(RAW), name: average}
    assert value_of(tmp_path, content) == AVERAGED
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert checkpoint.tensors["1.running_var"].unique() == RAW


@pytest.mark.parametrize("prefix", ["", "model."])
def test_buffers_of_latent_diffusion(tmp_path: Path, prefix: str) -> None:
    flat = {f"model_ema.{key.replace('.', '')}": tensor for key, tensor in parameters(AVERAGED).items()}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": COUNT}
    content = {"state_dict": {**under(prefix, RAW), **counters, **flat}}
    assert value_of(tmp_path, content) == AVERAGED
    assert value_of(tmp_path, content, "model") == RAW


def test_an_average_that_is_not_handed_on_is_only_taken_on_request(tmp_path: Path) -> None:
    """Lightning's StochasticWeightAveraging: its BN statistics are those of the first step."""
    average = {"n_averaged": 3, "average_model_state": weights(AVERAGED)}
    content = {"state_dict": weights(RAW), "callbacks": {"StochasticWeightAveraging": average}}
    assert value_of(tmp_path, content) == RAW
    assert value_of(tmp_path, content, "ema") == AVERAGED
    assert value_of(tmp_path, content, "callbacks.StochasticWeightAveraging.average_model_state") == AVERAGED


def test_buffers_that_copy_nothing_are_the_models_own(tmp_path: Path) -> None:
    content = {**weights(RAW), "ema_scale": torch.full((3,), RAW)}
    torch.save(content, tmp_path / "x.pt")
    assert list(read_checkpoint(tmp_path / "x.pt").tensors) == list(content)
    with pytest.raises(CheckpointError, match="expected averaged"):
        read_checkpoint(tmp_path / "x.pt", weights="ema")
