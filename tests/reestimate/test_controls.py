"""Control layers are judged by their own error bars, and a refusal names the numbers that decided."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from ckpt_tools import reestimate_bn
from ckpt_tools.errors import CheckFailed


def settled(factor: float = 1.0, shift: float = 0.0) -> tuple[nn.Sequential, list[Tensor]]:
    """A control layer and a layer behind dropout, trained on ``factor`` times the data plus ``shift``."""
    torch.manual_seed(0)
    # Without a momentum the running statistics average over all batches.
    norms = [nn.BatchNorm1d(8, momentum=None) for _ in range(2)]
    model = nn.Sequential(norms[0], nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), norms[1])
    data = list(torch.randn(8, 256, 8))
    with torch.no_grad():
        for step in range(200):
            model(data[step % 8] * factor + shift)
    return model.eval(), data


def test_layers_that_did_not_move_agree() -> None:
    model, data = settled()
    controls = reestimate_bn(model, data, estimator="pooled").controls
    assert (controls.verdict, controls.reason, controls.worst_layer) == ("agree", "", "0")
    assert controls.worst_ratio is not None
    assert controls.worst_ratio.median == pytest.approx(1, abs=4 * controls.worst_ratio.error)


@pytest.mark.parametrize("estimator", ["pooled", "ratio"])
def test_a_layer_beyond_its_error_bars_is_a_doubt(estimator: str) -> None:
    model, data = settled(0.85)
    controls = reestimate_bn(model, data, estimator=estimator).controls
    assert controls.verdict == "doubt"
    assert "1 of 1 control layer(s) moved (worst: 0, stored / measured variance 0.7" in controls.reason
    assert "augmentation" in controls.reason
    assert controls.worst == pytest.approx(-2 * torch.tensor(0.85).log().item(), abs=0.1)


def test_the_same_distance_on_few_samples_is_none() -> None:
    model, data = settled(0.85)
    assert reestimate_bn(model, [data[0][:24]], estimator="pooled").controls.verdict == "agree"


def test_channels_that_go_up_and_down_are_no_average_of_one() -> None:
    model, data = settled()
    with torch.no_grad():
        model[0].running_var *= torch.tensor([1.5, 1 / 1.5] * 4)
    controls = reestimate_bn(model, data, estimator="pooled").controls
    assert controls.verdict == "doubt"
    assert "off by a factor of 1." in controls.reason


@pytest.mark.parametrize(
    ("factor", "shift", "named", "kept"),
    [
        (2.0, 0.0, "the stored variance is off by a factor of", "running mean"),
        (1.0, 1.0, "the running mean is off by", "stored variance"),
        (2.0, 2.0, "the stored variance is off by a factor of", None),
    ],
)
def test_a_refusal_names_what_decided_and_nothing_else(
    factor: float, shift: float, named: str, kept: str | None
) -> None:
    model, data = settled(factor, shift)
    with pytest.raises(CheckFailed, match=named) as refusal:
        reestimate_bn(model, data, estimator="pooled")
    message = str(refusal.value)
    assert kept is None or kept not in message
    # Every number stands beside the limit that it broke.
    pairs = re.findall(
        r"by (?:a factor of )?([\d.]+)(?: standard deviations)? \(at most ([\d.]+) expected\)", message
    )
    assert len(pairs) == (1 if kept else 2)
    assert all(float(number) > float(limit) for number, limit in pairs)


def test_the_ratio_depends_on_no_control_layer() -> None:
    model, data = settled(2.0)
    assert reestimate_bn(model, data, estimator="ratio").controls.verdict == "disagree"


def test_made_up_inputs_are_judged_by_no_layer() -> None:
    model, _ = settled()
    controls = reestimate_bn(model, input_shape=(8,)).controls
    assert (controls.verdict, controls.names, controls.reason) == ("none", (), "the inputs are synthetic")


@pytest.mark.parametrize("factor", [1.0, 0.85])
def test_counters_of_zero_beside_statistics_hide_nothing(factor: float) -> None:
    """Converted models count no batches. Their statistics show that they were trained."""
    model, data = settled(factor)
    expected = reestimate_bn(copy.deepcopy(model), data, estimator="pooled").controls
    for norm in (model[0], model[4]):
        norm.num_batches_tracked.zero_()
    controls = reestimate_bn(model, data, estimator="pooled").controls
    assert (controls.verdict, controls.worst) == (expected.verdict, expected.worst)
