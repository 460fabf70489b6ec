"""How data agrees with stored statistics, against an oracle of hooks; what a measurement leaves behind."""

from __future__ import annotations

import copy
import random
from collections import Counter

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ckpt_tools import walk
from ckpt_tools.diagnosis.agreement import Agreement, best_candidate, measure_agreement
from ckpt_tools.errors import DataError, ModelError


def inputs(model: nn.Module, data: Tensor) -> dict[str, Tensor]:
    """Inputs of every BN layer, (C, values), in evaluation mode."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.update(
                {name: given[0].transpose(0, 1).reshape(given[0].shape[1], -1)}
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    with torch.no_grad():
        model(data)
    for hook in hooks:
        hook.remove()
    return seen


def expected(model: nn.Module, data: Tensor) -> dict[str, float]:
    distances = {}
    for name, values in inputs(model, data).items():
        layer, rows = model.get_submodule(name), values.double().numpy()
        eps = layer.eps + 3 * 0.9 ** int(layer.num_batches_tracked)
        spread = layer.running_var.double().numpy() + eps
        shift = (rows.mean(1) - layer.running_mean.double().numpy()) / np.sqrt(spread)
        deviation = np.log((rows.var(1, ddof=1) + eps) / spread)
        distances[name] = float(np.minimum(1, np.hypot(shift, deviation / np.sqrt(2))).mean())
    return distances


@pytest.mark.parametrize(
    ("model", "shape"),
    [(nets.DenseNet(0.0), (3, 8, 8)), (nets.mlp(0.0), (10,)), (nets.video(0.0), (2, 6, 6, 6))],
    ids=["densenet", "mlp", "video"],
)
def test_distances_on_stored_statistics(model: nn.Module, shape: tuple[int, ...]) -> None:
    data = nets.batches(shape)
    nets.trained(model, data)
    other = [1.3 * batch + 0.2 for batch in data]
    found = measure_agreement(model, other, walk(model, data[0]), rates_known=True)
    assert {layer.name: pytest.approx(layer.distance, rel=1e-3) for layer in found.layers} == expected(
        model, torch.cat(other)
    )
    assert found.score == pytest.approx(sum(layer.distance for layer in found.layers) / len(found.layers))
    assert found.images == 128


def test_batch_statistics_judge_every_layer_by_itself() -> None:
    data = nets.batches((10,))
    model = nets.trained(nets.mlp(0.0), data)
    found = measure_agreement(
        model, [100 * torch.cat(data)], walk(model, data[0]), rates_known=True, normalise="batch"
    )
    first, *rest = (layer.distance for layer in found.layers)
    assert first > 0.9
    assert max(rest) < 0.1


def test_dropout_at_its_rates_is_what_the_statistics_remember() -> None:
    data = nets.batches((10,), count=8, size=128)
    model = nets.trained(nets.mlp(0.5), data, 100)
    found = walk(model, data[0])
    known = measure_agreement(model, data, found, rates_known=True)
    unknown = measure_agreement(model, data, found, rates_known=False)
    assert known.score is not None
    assert known.score < 0.1
    assert [layer.deviation is None for layer in unknown.layers] == [False, True, True]
    assert unknown.score is not None
    assert unknown.score < 0.1


def test_everything_comes_back() -> None:
    data = nets.batches((3, 8, 8))
    model = nets.trained(nets.DenseNet(), data)
    model.norms[1].train()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = walk(model, data[0])
    first = measure_agreement(model, data, found, rates_known=True, seed=3)
    with pytest.raises(ModelError, match="batch 1"):
        measure_agreement(model, [data[0], data[1][:, :2]], found, rates_known=True)
    with pytest.raises(DataError, match="NaN"):
        measure_agreement(model, [data[0] * float("nan")], found, rates_known=True)
    assert measure_agreement(model, data, found, rates_known=True, seed=3) == first
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Wary(nn.Module):
    """Goes on whatever happens inside."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.calls = inside, Counter[str]()

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.inside(x)
        except Exception:  # noqa: BLE001  the point of it
            self.calls["stopped"] += 1
        self.calls["ended"] += 1
        return x


def test_a_forward_ends_at_the_last_layer_of_interest() -> None:
    data = nets.batches((3, 8, 8))
    model = Wary(nets.trained(nets.DenseNet(0.0), data)).eval()
    found = walk(model, data[0])
    model.calls.clear()
    whole = measure_agreement(model, data, found, rates_known=True)
    assert model.calls == {"ended": len(data)}
    early = measure_agreement(model, data, found, rates_known=True, layers=2)
    assert model.calls == {"ended": len(data)}
    assert early.layers == whole.layers[:2]


def test_reused_layers_and_layers_that_no_forward_reaches() -> None:
    data = nets.batches((3, 8, 8))
    model = nets.trained(nets.Reused(), data)
    for layers in (None, 2):
        found = measure_agreement(model, data, walk(model, data[0]), rates_known=True, layers=layers)
        assert [layer.name for layer in found.layers] == ["first", "shared"]


@pytest.mark.parametrize(
    ("steps", "counted", "usable"), [(0, True, False), (5, True, False), (60, False, True)]
)
def test_statistics_that_training_has_not_made_cannot_serve(steps: int, counted: bool, usable: bool) -> None:
    data = nets.batches((10,))
    model = nets.mlp(0.0).train()
    with torch.no_grad():
        for step in range(steps):
            model(data[step % 4])
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked") and not counted:
            buffer.zero_()
    found = measure_agreement(model.eval(), data, walk(model, data[0]), rates_known=True, counted=counted)
    assert (found.score is not None) == usable
    assert usable or "counters" in found.reason


def test_dead_channels_and_overflow_stay_finite() -> None:
    data = nets.batches((10,))
    model = nets.mlp(0.0)
    model[0].weight.data[:4] = 0
    model = nets.trained(model, data)
    found = walk(model, data[0])
    assert measure_agreement(model, data, found, rates_known=True).layers[0].distance < 0.1
    far = measure_agreement(model, [1e30 * batch for batch in data], found, rates_known=True)
    assert far.score is not None
    assert 0.7 < far.score <= 1


def scored(score: float | None) -> Agreement:
    return Agreement((), 256, "batch", score)


def test_the_best_candidate_is_clearly_better_than_the_next() -> None:
    assert best_candidate({"a": scored(0.1), "b": scored(0.2), "c": scored(0.3)}) == "a"
    assert best_candidate({"a": scored(0.1), "b": scored(0.1001)}) is None
    assert best_candidate({"a": scored(0.1)}) is None
    assert best_candidate({"a": scored(0.1), "b": scored(None)}) is None
