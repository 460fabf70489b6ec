"""BN layers that a forward runs several times: both inputs of a siamese net, ghost batches, a recursion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paired_oracle import dropout_shift
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools.reestimate.estimators import _moving_average_error

MOMENTUM = 0.3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Siamese(nn.Module):
    """Two inputs, which differ in mean and scale, run through the same layers."""

    def __init__(self, rate: float = 0.4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(6, 10), nn.Dropout(rate), nn.BatchNorm1d(10), nn.ReLU(),
            nn.Linear(10, 8), nn.BatchNorm1d(8),
        )  # fmt: skip

    def forward(self, pair: Tensor) -> Tensor:
        return F.cosine_similarity(self.encoder(pair[:, 0]), self.encoder(2 * pair[:, 1] + 1))


class Ghost(nn.Module):
    """Each batch is cut into virtual batches of sixteen, which are normalised by themselves."""

    def __init__(self, rate: float = 0.4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 8)
        self.drop, self.norm1, self.norm2 = nn.Dropout(rate), nn.BatchNorm1d(10), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ghost(self.norm1, self.drop(self.first(x)))
        return self.ghost(self.norm2, self.second(x.relu())).sum(1)

    @staticmethod
    def ghost(norm: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([norm(part) for part in x.split(16)])


class Recursive(nn.Module):
    """One block three times; the longer the sequence, the more often."""

    def __init__(self, rate: float = 0.4) -> None:
        super().__init__()
        self.step, self.drop, self.norm = nn.Linear(6, 6), nn.Dropout(rate), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        state = x[:, 0]
        for step in range(x.shape[1]):
            state = torch.tanh(self.norm(self.drop(self.step(state)))) + x[:, step]
        return state


NETS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "siamese": (Siamese, normal(64, 2, 6)),
    "ghost batches": (Ghost, normal(128, 6)),
    "recursive": (Recursive, normal(64, 3, 6)),
}


def norms_of(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


def make(name: str, rate: float = 0.4) -> tuple[Any, Tensor]:
    """A net whose statistics are those of so long a training, and one batch."""
    kind, x = NETS[name]
    torch.manual_seed(0)
    model = kind(rate)
    for norm in norms_of(model):
        norm.momentum = None
    with torch.no_grad():
        for _ in range(300):
            model(x)
    for norm in norms_of(model):
        norm.momentum = MOMENTUM
    return model.eval(), x


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("statistics", ["variance", "mean+variance"])
def test_ema_updates_once_a_call_as_training_does(name: str, statistics: Any) -> None:
    model, x = make(name)
    peer = copy.deepcopy(model)
    ckpt_tools.reestimate_bn(
        model, x.split(32), estimator="ema", momentum=MOMENTUM, statistics=statistics, layers="all"
    )
    for module in peer.modules():
        module.training = isinstance(module, nn.BatchNorm1d)
    with torch.no_grad():
        for batch in x.split(32):
            peer(batch)
    for mine, theirs in zip(norms_of(model), norms_of(peer), strict=True):
        torch.testing.assert_close(mine.running_var, theirs.running_var, rtol=1e-4, atol=0)
        if statistics == "mean+variance":
            torch.testing.assert_close(mine.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("calls", [1, 3])
def test_the_error_of_a_moving_average_knows_how_often_it_was_updated(calls: int) -> None:
    """Batches are independent, and the calls within one are taken for one."""
    batches, weights = 10, []
    for batch in range(batches):
        later = [(1 - MOMENTUM) ** (calls * batch + call) for call in range(calls)]
        weights.append(MOMENTUM * sum(later))
    total = torch.tensor(weights).double()
    truth = float((batches * total.square().sum()).sqrt() / total.sum())
    assert _moving_average_error(batches, calls, MOMENTUM) == pytest.approx(truth)


@pytest.mark.parametrize("name", NETS)
def test_without_noise_the_two_conditions_are_the_same(name: str) -> None:
    """What the calls of a layer differ in as a whole must not be taken for noise."""
    model, x = make(name, rate=1e-9)
    result = ckpt_tools.reestimate_bn(model, [x], estimator="pooled")  # dropout is above zero, so it runs
    assert result.images
    model, x = make(name, rate=1e-9)
    with pytest.raises(ckpt_tools.CkptToolsError, match="nothing to do: with dropout on and off"):
        ckpt_tools.reestimate_bn(model, [x], estimator="ratio")


@pytest.mark.parametrize("name", NETS)
def test_the_paired_measurement_agrees_with_variances_within_calls(name: str) -> None:
    model, x = make(name)
    stored = [norm.running_var.clone() for norm in norms_of(model)]
    shifts = dropout_shift(model, x, draws=150)
    result = ckpt_tools.reestimate_bn(model, [x] * 20, estimator="ratio")
    mismatches = [layer.mismatch for layer in result.layers if layer.mismatch]
    assert mismatches
    # Nothing differs under training conditions; that all batches are equal costs up to one in 128.
    assert [mismatch.median for mismatch in mismatches] == pytest.approx([1] * len(mismatches), abs=0.03)
    for norm, before, (shift, _) in zip(norms_of(model), stored, shifts.values(), strict=True):
        torch.testing.assert_close(before / norm.running_var, shift.float(), rtol=0.06, atol=0)


@pytest.mark.parametrize("sizes", [(16, 48), (48, 16), (16, 16, 80)])
@pytest.mark.parametrize("estimator", ["pooled", "exact"])
def test_every_call_counts_whatever_the_first_batch_was(estimator: Any, sizes: tuple[int, ...]) -> None:
    """A batch that makes a single virtual batch must not end the forwards of larger ones early."""
    model, x = make("ghost batches")
    seen: list[int] = []
    norm2 = model.norm2

    class Counted(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            output = super().forward(input)
            seen.append(len(input))
            return output

    norm2.__class__ = Counted
    total = sum(sizes)
    result = ckpt_tools.reestimate_bn(model, x[:total].split(sizes), estimator=estimator, force=True)
    assert result.images == total
    truth = copy.deepcopy(model).eval()
    inputs: list[Tensor] = []
    truth.norm2.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    with torch.no_grad():
        truth(x[:total])
    if estimator == "exact":
        torch.testing.assert_close(
            model.norm2.running_var, torch.cat(inputs).var(0).float(), rtol=2e-3, atol=0
        )


def test_exact_has_no_bias_on_virtual_batches() -> None:
    model, x = make("ghost batches")
    copies = {name: copy.deepcopy(model) for name in ("pooled", "exact")}
    bias = {}
    for name, corrected in copies.items():
        estimator: Any = name
        ckpt_tools.reestimate_bn(corrected, [x], estimator=estimator, force=True)
        inputs: list[Tensor] = []
        corrected.norm2.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0].double()))
        with torch.no_grad():
            corrected(x)
        bias[name] = float((corrected.norm2.running_var / torch.cat(inputs).var(0) - 1).abs().median())
    assert bias["exact"] < 1e-3 < bias["pooled"]
