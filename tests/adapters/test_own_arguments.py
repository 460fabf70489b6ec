"""Arguments that a file records reach the user's own class, as far as they can do no harm."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from ckpt_tools.contract import LoadedModel
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify.loading import load

ARCH = "test_own_arguments:Module"
BUILT: list[dict[str, object]] = []


class Module(nn.Module):
    """What people write for Lightning."""

    def __init__(
        self,
        lr: float,
        widths: tuple[int, ...] = (4,),
        act: str = "relu",
        size: Literal["Small", "Large"] = "Small",
        bias: bool = True,
        dropout: float = 0.1,
        backbone: str = "",
        data_dir: str = "data",
        square: int = 1,
    ) -> None:
        super().__init__()
        BUILT.append({key: value for key, value in locals().items() if key not in ("self", "__class__")})
        sizes = [3, *widths]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, bias), nn.BatchNorm1d(outputs), nn.Dropout(dropout)]
        self.net = nn.Sequential(*layers, *(nn.Identity() for _ in range(square**2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.net(x)
        return output


def load_with(
    folder: Path, recorded: object, *, key: str = "hyper_parameters", **built: object
) -> LoadedModel:
    """Load a file of a model that was built with some arguments and records others."""
    arguments: dict[str, object] = {"lr": 0.1, **built}
    content = {"state_dict": Module(**arguments).state_dict(), key: recorded}  # type: ignore[arg-type]
    torch.save(content, folder / "x.ckpt")
    BUILT.clear()
    return load(folder / "x.ckpt", ARCH)


@pytest.mark.parametrize("cli", [False, True])
def test_all_that_a_training_module_records(tmp_path: Path, cli: bool) -> None:
    arguments: dict[str, object] = {"widths": [8, 6], "act": "gelu", "size": "Small", "bias": False}
    recorded: dict[str, object] = {"lr": 0.1, **arguments, "dropout": 0.4, "seed": 5}
    content = {"class_path": "os.system", "init_args": recorded} if cli else recorded
    loaded = load_with(tmp_path, content, widths=[8, 6], bias=False)
    assert loaded.rates == "recorded"
    assert {key: BUILT[0][key] for key in arguments} == arguments
    assert [module.p for module in loaded.model.modules() if isinstance(module, nn.Dropout)] == [0.4, 0.4]


def test_model_kwargs_of_a_script(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {"lr": 1, "widths": [5]}, key="model_kwargs", widths=[5])
    assert loaded.rates == "unknown"  # the file does not say them
    assert BUILT[0]["widths"] == [5]


@pytest.mark.parametrize("word", ["../net.pt", "os.system", "someone/net", "resnet50", "__import__"])
def test_names_are_for_the_user_to_give(tmp_path: Path, word: str) -> None:
    with pytest.raises(ArchitectureError, match=r"backbone=.*--model-kwargs backbone="):
        load_with(tmp_path, {"lr": 0.1, "backbone": word})
    assert not BUILT


@pytest.mark.parametrize(
    "more",
    [
        {"data_dir": "/etc/passwd"},
        {"widths": [10**9]},
        {"widths": [1] * 1000},
        {"act": {"class": "Evil"}},
        {"square": float("nan")},
    ],
)
def test_what_says_nothing_of_the_model_is_left_out(tmp_path: Path, more: dict[str, object]) -> None:
    load_with(tmp_path, {"lr": 0.1, **more})
    key = next(iter(more))
    assert {str(built[key]) for built in BUILT} == {
        {"data_dir": "data", "widths": "(4,)", "act": "relu"}.get(key, "1")
    }


class Inner(nn.Sequential):
    """A network of its own, which takes an argument of the same name as the module around it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(nn.Linear(3, 4, bias), nn.BatchNorm1d(4))


def test_arguments_that_do_not_fit_are_not_used(tmp_path: Path) -> None:
    content = {"state_dict": Inner().state_dict(), "hyper_parameters": {"bias": False}}
    torch.save(content, tmp_path / "x.ckpt")
    loaded = load(tmp_path / "x.ckpt", "test_own_arguments:Inner")
    assert (loaded.recipe.kwargs, loaded.rates) == ({}, "unknown")


def test_the_cost_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="registers more than"):
        load_with(tmp_path, {"lr": 0.1, "square": 64, "widths": [64]}, widths=[64])
