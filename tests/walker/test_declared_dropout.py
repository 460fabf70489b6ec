"""Dropout that a port has lost and the user declares, against the network that still has it."""

from __future__ import annotations

import copy
from typing import Any

import nets
import pytest
import torch
from ported_nets import FunctionallyPorted, Original, Ported
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools.errors import NothingToDo, UsageError

DATA = nets.batches((1, 12, 12))


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return nets.trained(Original(), DATA)


def port_of(original: nn.Module, kind: type[nn.Module] = Ported) -> nn.Module:
    model = kind()
    model.load_state_dict(original.state_dict())
    return model.eval()


def variances(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if name.endswith("running_var")}


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [(Ported, {"pool*": 0.25}), (FunctionallyPorted, {"conv[23]:input": 0.25})],
    ids=["output", "input"],
)
@pytest.mark.parametrize("estimator", ["ratio", "pooled", "auto"])
def test_a_port_is_corrected_as_its_original(
    original: nn.Module, kind: type[nn.Module], dropout: dict[str, float], estimator: Any
) -> None:
    expected, port = copy.deepcopy(original), port_of(original, kind)
    first = ckpt_tools.reestimate_bn(expected, DATA, estimator=estimator)
    second = ckpt_tools.reestimate_bn(port, DATA, estimator=estimator, dropout=dropout, rates="unknown")
    assert [layer.name for layer in second.rewritten] == [layer.name for layer in first.rewritten] != []
    assert second.estimator == first.estimator
    for (name, new), old in zip(variances(port).items(), variances(expected).values(), strict=True):
        torch.testing.assert_close(new, old, msg=name)


def test_the_walk_has_the_sites_and_leaves_the_model_alone(original: nn.Module) -> None:
    port = port_of(original)
    attributes = {name: set(vars(module)) for name, module in port.named_modules()}
    walk = ckpt_tools.walk(port, DATA[0], dropout={"pool1": 0.1, "pool2": 0.3})
    assert [(site.name, site.op, site.rate) for site in walk.dropout_sites if site.active] == [
        ("pool1", "dropout", 0.1),
        ("pool2", "dropout", 0.3),
    ]
    behind = [layer.downstream_of for layer in walk.batch_norms]
    assert behind == [(), ("pool1",), ("pool1", "pool2")]
    assert {name: set(vars(module)) for name, module in port.named_modules()} == attributes
    torch.testing.assert_close(port(DATA[0]), original.eval()(DATA[0]))


def test_a_walk_may_be_handed_on(original: nn.Module) -> None:
    walk = ckpt_tools.walk(port_of(original), DATA[0], dropout={"pool*": 0.25})
    expected, port = copy.deepcopy(original), port_of(original)
    ckpt_tools.reestimate_bn(expected, DATA, estimator="ratio")
    ckpt_tools.reestimate_bn(port, DATA, estimator="ratio", walk=walk)
    assert all(map(torch.equal, variances(port).values(), variances(expected).values()))
    with pytest.raises(UsageError, match=r"ckpt_tools\.walk"):
        ckpt_tools.reestimate_bn(port, DATA, walk=walk, dropout={"pool*": 0.25})


def test_later_patterns_count_and_rate_zero_is_off(original: nn.Module) -> None:
    walk = ckpt_tools.walk(port_of(original), DATA[0], dropout={"pool*": 0.25, "pool2": 0.0})
    assert [layer.downstream_of for layer in walk.batch_norms] == [(), ("pool1",), ("pool1",)]
    with pytest.raises(NothingToDo):
        ckpt_tools.reestimate_bn(port_of(original), DATA, dropout={"pool*": 0.0})


class Recurrent(nn.Module):
    """A module with a tuple for its output, in a list, which has no output at all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.LSTM(6, 5, batch_first=True)])
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks[0](x)[0].mean(1))


def test_outputs_of_any_form() -> None:
    walk = ckpt_tools.walk(Recurrent(), torch.randn(4, 3, 6), dropout={"blocks*": 0.2})
    assert all(site.name.startswith("blocks.0") for site in walk.dropout_sites)
    assert walk.batch_norms[0].downstream_of


def test_a_pattern_means_the_outermost_modules() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.BatchNorm1d(6))
    walk = ckpt_tools.walk(model, torch.randn(4, 6), dropout={"0*": 0.2})
    assert [(item.module, item.rate) for item in walk.declared_dropout] == [("0", 0.2)]
    assert [site.name for site in walk.dropout_sites] == ["0"]


@pytest.mark.parametrize("rate", [-0.1, 1.0, 25, float("nan"), "0.2", True, None])
def test_a_rate_that_is_none(rate: Any) -> None:
    with pytest.raises(UsageError, match=r"expected a drop rate.*below 1"):
        ckpt_tools.walk(Ported(), DATA[0], dropout={"pool*": rate})


def test_names_that_mean_nothing() -> None:
    with pytest.raises(UsageError, match=r"Did you mean pool1\?"):
        ckpt_tools.walk(Ported(), DATA[0], dropout={"pol1": 0.2})
    with pytest.raises(UsageError, match="none has such a name"):
        ckpt_tools.walk(Ported(), DATA[0], dropout={"*dropout*": 0.2})
    with pytest.raises(UsageError, match="runs none of pool1, pool2"):
        ckpt_tools.walk(FunctionallyPorted(), DATA[0], dropout={"conv2:input": 0.2, "pool*": 0.2})
