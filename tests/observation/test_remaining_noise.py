"""Noise that does not ask for the mode: it is off in the pass, or the result names it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.ops import StochasticDepth

import ckpt_tools
from ckpt_tools.errors import CheckFailed, NothingToDo
from ckpt_tools.reestimate.concerns import result_warnings
from ckpt_tools.results import Reestimation

ATEN = torch.ops.aten
Noise = Callable[[Tensor], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")


class Noisy(nn.Module):
    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise, self.bn = noise, nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.noise(x))


class DropAndSkip(nn.Module):
    """What a tracer bakes in: both ask for the mode at the time of tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.skip = nn.Dropout(0.4), StochasticDepth(0.3, "row")

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(self.drop(x))


def functional_dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.4, True)


def drop_path(x: Tensor) -> Tensor:
    return x * torch.empty_like(x[:, :1]).bernoulli_(0.75).div_(0.75)


@torch.library.custom_op("ckpt_tools_test::mask", mutates_args=())
def mask_in_operator(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) < 0.5)


@mask_in_operator.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def traced(noise: Noise) -> Noise:
    return torch.jit.trace(noise, torch.randn(3, 6), check_trace=False)


OFF: dict[str, Callable[[], Noise]] = {
    "aten overload": lambda: lambda x: ATEN.dropout.default(x, 0.5, True),
    "aten in place": lambda: lambda x: ATEN.dropout_(x.clone(), 0.5, True),
    "native": lambda: lambda x: ATEN.native_dropout(x, 0.3, True)[0],
    "feature": lambda: lambda x: ATEN.feature_dropout(x, 0.3, True),
    "aten alpha": lambda: lambda x: ATEN.alpha_dropout(x, 0.5, True),
    "feature alpha": lambda: lambda x: F.feature_alpha_dropout(x[..., None], 0.5, True)[..., 0],
    "drop path": lambda: drop_path,
    "multiplied": lambda: lambda x: torch.bernoulli(torch.zeros_like(x), 0.8) * (1 / 0.8) * x,
    "scripted function": lambda: torch.jit.script(functional_dropout),
    "traced function": lambda: traced(functional_dropout),
    "traced drop path": lambda: traced(drop_path),
    "scripted module": lambda: torch.jit.script(nn.Dropout(0.3)),
    "traced module": lambda: traced(nn.Dropout(0.3)),
    "fx": lambda: symbolic_trace(DropAndSkip()),
    "operations": lambda: make_fx(DropAndSkip())(torch.randn(64, 6)),
}


def reestimate(noise: Noise, x: Tensor) -> tuple[Reestimation, Tensor]:
    model = Noisy(noise)
    result = ckpt_tools.reestimate_bn(model, x.split(64), estimator="pooled", layers="all", force=True)
    assert model.bn.running_var is not None
    return result, model.bn.running_var


@pytest.mark.parametrize("kind", OFF)
def test_dropout_is_off_whatever_form_it_has(kind: str) -> None:
    x = torch.randn(256, 6) + 1
    result, variance = reestimate(OFF[kind](), x)
    assert not result.noise_left_on
    torch.testing.assert_close(variance, x.var(0))


@pytest.mark.parametrize("noise", [torch.rrelu, torch.rrelu_, ATEN.rrelu.default])
def test_random_slopes_are_their_mean(noise: Callable[..., Tensor]) -> None:
    x = torch.randn(256, 6) - 1
    result, variance = reestimate(lambda x: noise(x.clone(), 0.0, 1.0, True), x)
    assert not result.noise_left_on
    torch.testing.assert_close(variance, F.leaky_relu(x, 0.5).var(0))


LEFT_ON: dict[str, tuple[str, Callable[[], Noise]]] = {
    "coin": ("aten.bernoulli_", lambda: lambda x: x * torch.empty_like(x).bernoulli_()),
    "probabilities": ("aten.bernoulli", lambda: lambda x: x * torch.bernoulli(torch.full_like(x, 0.7))),
    "threshold": ("aten.rand", lambda: lambda x: x * (torch.rand(x.shape) < 0.7)),
    "gaussian": ("aten.normal_", lambda: lambda x: x + torch.empty_like(x).normal_()),
    "shuffled": ("aten.randperm", lambda: lambda x: x[torch.randperm(len(x))]),
    "traced alpha": ("aten.bernoulli_", lambda: traced(lambda x: F.alpha_dropout(x, 0.5, True))),
    "operator": ("ckpt_tools_test.mask", lambda: mask_in_operator),
}


@pytest.mark.parametrize("kind", LEFT_ON)
def test_other_noise_is_named(kind: str) -> None:
    op, make = LEFT_ON[kind]
    x = torch.randn(256, 6)
    result, _ = reestimate(make(), x)
    assert [site.op for site in result.noise_left_on] == [op]
    assert op in repr(result)
    assert op in result.summary()
    assert any(op in warning for warning in result_warnings(result))
    with pytest.raises(CheckFailed, match=op):
        ckpt_tools.reestimate_bn(
            Noisy(make()),
            x.split(64),
            estimator="pooled",
            layers="all",
            strict=True,
            statistics="mean+variance",
        )


def test_noise_that_stays_on_is_no_reason_to_say_that_there_is_none() -> None:
    model = Noisy(lambda x: x[torch.randperm(len(x))])
    with pytest.raises(NothingToDo, match=r"stays on in evaluation mode, too: \(root\) \(aten.randperm\)"):
        ckpt_tools.reestimate_bn(model, torch.randn(256, 6).split(64), estimator="ratio")


def test_scripted_submodules_with_weights() -> None:
    branch = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4))
    model = Noisy(torch.jit.script(branch)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    walk = ckpt_tools.walk(model, torch.randn(4, 6))
    assert [(site.name, site.rate) for site in walk.dropout_sites] == [("noise", 0.4)]
    result = ckpt_tools.reestimate_bn(model, torch.randn(1024, 6).split(128), estimator="ratio")
    assert result.layers[0].dropout_shift is not None
    assert result.layers[0].dropout_shift.median > 1.4
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["bn.running_var"]
    assert not any(module.training for module in model.modules())


def test_noise_has_the_name_of_its_module() -> None:
    class Jitter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    result, _ = reestimate(nn.Sequential(nn.Identity(), Jitter(), Jitter()), torch.randn(64, 6))
    assert [site.name for site in result.noise_left_on] == ["noise.1", "noise.2"]


def test_the_paired_measurement_has_noise_under_training_conditions_alone() -> None:
    x = torch.randn(2048, 6)
    model = Noisy(torch.jit.script(functional_dropout))
    model.bn.running_var = torch.full((6,), 1 / 0.6)
    result = ckpt_tools.reestimate_bn(model, x.split(256), estimator="ratio")
    shift = result.layers[0].dropout_shift
    assert shift is not None
    assert shift.median == pytest.approx(1 / 0.6, rel=0.05)
    torch.testing.assert_close(model.bn.running_var, torch.ones(6), rtol=0.1, atol=0)


def test_a_model_without_noise_runs_without_a_dispatch_mode_after_the_first_batch() -> None:
    depths = []

    def count_modes(x: Tensor) -> Tensor:
        depths.append(torch._C._len_torch_dispatch_stack())
        return x

    reestimate(count_modes, torch.randn(256, 6))
    assert depths[-4:] == [1, 0, 0, 0]
