"""What a Python caller gives in place of what is expected, and whether the answer fits the caller."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckpt_tools
from ckpt_tools.arguments import advise, caller_gives_options
from ckpt_tools.errors import CheckFailed, DataError, ModelError, NothingToDo, UsageError
from ckpt_tools.method import Method

DATA = list(torch.randn(96, 6, generator=torch.Generator().manual_seed(0)).split(32))
OPTION = re.compile(r"(?<![\w-])--[a-z]")


def net(rate: float = 0.3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(rate), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize(
    "batches",
    [3.5, True, "images/", b"images", Path("images"), np.zeros((4, 6)), max, net(), DATA[0], {"x": 1}],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_iterable_of_batches(batches: Any) -> None:
    with pytest.raises(UsageError, match=r"batches is a .*; expected an iterable of batches"):
        ckpt_tools.reestimate_bn(net(), batches)


@pytest.mark.parametrize("batch", [7, "x", np.zeros((4, 6))], ids=lambda value: type(value).__name__)
def test_batches_of_other_types(batch: Any) -> None:
    with pytest.raises(DataError, match="a batch is of type"):
        ckpt_tools.reestimate_bn(net(), [batch])


def test_no_batches_are_random_inputs() -> None:
    assert ckpt_tools.reestimate_bn(net(), None).estimator == "ratio"


@pytest.mark.parametrize("model", [None, {}, "model.pt", nn.Linear], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "call",
    [ckpt_tools.reestimate_bn, ckpt_tools.corrected_state_dict, ckpt_tools.walk, ckpt_tools.rewrite_init],
)
def test_what_is_no_model(call: Callable[..., object], model: Any) -> None:
    with pytest.raises(UsageError, match=r"model is a .*; expected a torch\.nn\.Module"):
        call(model, DATA)


def test_a_holder_of_a_model_is_told_to_give_its_attribute() -> None:
    class Loaded:
        model = net()

    with pytest.raises(UsageError, match="Pass its attribute `model`"):
        ckpt_tools.reestimate_bn(Loaded(), DATA)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["limit_batches", "max_images"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8", float("inf")])
def test_limits_are_whole_numbers_from_one_on(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name}=.*expected a whole number of at least 1"):
        ckpt_tools.corrected_state_dict(net(), DATA, **{name: value})


@pytest.mark.parametrize("limits", [{"limit_batches": np.int64(2)}, {"max_images": np.int32(33)}])
def test_limits_end_the_reading(limits: dict[str, Any]) -> None:
    results: list[ckpt_tools.Reestimation] = []
    ckpt_tools.corrected_state_dict(net(), DATA, done=results.append, **limits)
    assert results[0].batches == 2


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": None}, {"layers": 2}, {"only": 5}, {"keep": [nn.BatchNorm1d]}, {"statistics": True},
        {"tolerance": "0.1"}, {"tolerance": True}, {"precision": torch.float32}, {"momentum": None},
        {"epochs": 2.0, "estimator": "ema"}, {"epochs": True}, {"rates": 0.3}, {"forward": 1}, {"walk": {}},
        {"progress": "bar"}, {"input_shape": 6}, {"input_shape": (6.0,)}, {"input_shape": (0, 3)},
        {"estimator": "ratio", "statistics": "mean+variance"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_other_types(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"expected|Leave"):
        ckpt_tools.reestimate_bn(net(), DATA, **options)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ckpt_tools.corrected_state_dict(net(), DATA, prepare=1),  # type: ignore[arg-type]
        lambda: ckpt_tools.corrected_state_dict(net(), DATA, done=1),  # type: ignore[arg-type]
        lambda: ckpt_tools.corrected_state_dict(net(), DATA, seed=0.5),  # type: ignore[arg-type]
        lambda: ckpt_tools.walk(net(), DATA[0], forward=1),  # type: ignore[arg-type]
        lambda: ckpt_tools.rewrite_init(net(), DATA[0], seed="a"),  # type: ignore[arg-type]
        lambda: ckpt_tools.activation_moments("relu"),  # type: ignore[arg-type]
        lambda: ckpt_tools.load(net()),  # type: ignore[arg-type]
    ],
)
def test_other_entry_points(call: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match="expected"):
        call()


def broken() -> nn.Module:
    model = net()
    model[2].running_mean[0] = torch.inf  # type: ignore[index, operator]
    return model


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (NothingToDo, lambda: ckpt_tools.reestimate_bn(net(0.0), DATA)),
        (NothingToDo, lambda: ckpt_tools.reestimate_bn(net(), DATA, keep="2")),
        (UsageError, lambda: ckpt_tools.reestimate_bn(net(), DATA, only="layer9")),
        (UsageError, lambda: ckpt_tools.reestimate_bn(net(), statistics="mean+variance")),
        (UsageError, lambda: ckpt_tools.reestimate_bn(net(), estimator="pooled")),
        (ModelError, lambda: ckpt_tools.reestimate_bn(broken(), DATA)),
        (ModelError, lambda: ckpt_tools.walk(net(), torch.zeros(2, 5))),
        (CheckFailed, lambda: ckpt_tools.reestimate_bn(net(), DATA, strict=True)),
    ],
)
def test_advice_fits_the_caller(error: type[Exception], call: Callable[[], object]) -> None:
    with pytest.raises(error) as in_python:
        call()
    with caller_gives_options(), pytest.raises(error) as in_a_shell:
        call()
    assert not OPTION.search(str(in_python.value))
    assert OPTION.search(str(in_a_shell.value))
    assert not re.search(r"\w=['\w]*\)", str(in_a_shell.value))


def test_a_command_is_over_when_it_ends() -> None:
    with caller_gives_options(), pytest.raises(UsageError):
        Method(estimator="pooled").require_no_data()
    assert advise("--force", "force=True") == "force=True"
