"""A caller's ``torch.autocast`` around our functions: the stated precision holds all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools.model.preserving import preserve_models

X = torch.randn(96, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Dropout(0.3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 6), nn.BatchNorm1d(6), nn.Linear(6, 2),
    ).eval()  # fmt: skip


def ambient(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def reestimated(**options: Any) -> dict[str, Tensor]:
    model = net()
    ckpt_tools.reestimate_bn(model, X.split(32), **options)
    return model.state_dict()


CALLS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "ratio": lambda: reestimated(estimator="ratio"),
    "exact": lambda: reestimated(estimator="exact"),
    "ema": lambda: reestimated(estimator="ema"),
    "mean+variance": lambda: reestimated(statistics="mean+variance"),
    "no data": lambda: ckpt_tools.corrected_state_dict(net(), input_shape=(3, 6, 6)),
    "bf16": lambda: reestimated(precision="bf16"),
    "fp16": lambda: reestimated(precision="fp16"),
    "rewrite_init": lambda: rewritten(),
}


def rewritten() -> dict[str, Tensor]:
    model = net()
    ckpt_tools.rewrite_init(model, X[:4], rule="propagated")
    return model.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_result_is_that_without_it(call: Callable[[], dict[str, Tensor]], dtype: torch.dtype) -> None:
    expected = call()
    with ambient(dtype):
        inside = call()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == dtype
        assert (X[:2].flatten(1) @ torch.ones(108, 2)).dtype == dtype
    assert all(torch.equal(value, inside[key]) for key, value in expected.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_callers_copies_of_weights_keep_their_gradients(precision: Any) -> None:
    """autocast keeps casts of weights, and those of a pass without gradients must not be among them."""
    model = net()
    with ambient(torch.bfloat16):
        ckpt_tools.reestimate_bn(model, X.split(32), precision=precision)
        model(X[:4]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_casts_of_the_callers_dtype_are_not_used() -> None:
    model = net()
    expected = copy.deepcopy(model)
    ckpt_tools.reestimate_bn(expected, X.split(32), precision="bf16")
    with ambient(torch.float16):
        model(X[:4])  # the weights are now kept in float16
        ckpt_tools.reestimate_bn(model, X.split(32), precision="bf16")
    assert torch.equal(model[2].running_var, expected[2].running_var)


def test_autocast_of_the_model_itself_is_part_of_the_model() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    seen: list[Tensor] = []
    model = Own()
    model.inner[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ckpt_tools.reestimate_bn(model, X.split(32))
    # autocast has no part in the walk, whose tensors are on the meta device.
    assert {x.dtype for x in seen if not x.is_meta} == {torch.bfloat16}


def test_settings_come_back_when_the_call_raises() -> None:
    seen: list[bool] = []

    def fail(model: nn.Module, batch: object) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))
        raise ZeroDivisionError

    with ambient(torch.float16):
        with pytest.raises(ckpt_tools.CkptToolsError):
            ckpt_tools.reestimate_bn(net(), X.split(32), forward=fail)
        assert torch.is_autocast_enabled("cpu")
    assert not any(seen)
    with ambient(torch.float16), preserve_models(net()), ambient(torch.bfloat16):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
