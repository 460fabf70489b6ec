"""What is worth a warning about a result, and that ``strict`` stops at it before anything is written."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ckpt_tools import reestimate_bn
from ckpt_tools.errors import CheckFailed, UsageError
from ckpt_tools.reestimate.concerns import collect_warnings, result_warnings
from ckpt_tools.results import Effect, LayerResult, Spread

LAYER = LayerResult("bn", 8, True, "behind dropout", ratio=Spread(1.3, 1, 2), error=Spread(0.01, 0.01, 0.1))


def settled(factor: float = 1.0) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    # Without a momentum the running statistics average over all batches.
    norms = [nn.BatchNorm1d(8, momentum=None) for _ in range(2)]
    model = nn.Sequential(norms[0], nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), norms[1])
    data = list(torch.randn(8, 128, 8))
    with torch.no_grad():
        for step in range(200):
            model(data[step % 8] * factor)
    return model.eval(), data


def test_a_usual_layer_is_no_concern() -> None:
    assert collect_warnings([LAYER], Effect(100, 0.1, 0.8, 0.7, 0.3)) == ()


@pytest.mark.parametrize("median", [5.5, 1 / 5.5])
def test_a_ratio_beyond_a_factor_of_five(median: float) -> None:
    layer = replace(LAYER, ratio=Spread(median, 0.1, 9))
    (warning,) = collect_warnings([LAYER, layer], None)
    assert warning.startswith("1 BN layer was changed beyond a factor of 5")
    assert f"bn {median:.3g}" in warning
    assert collect_warnings([replace(layer, rewritten=False)], None) == ()


def test_a_standard_error_above_a_tenth() -> None:
    layer = replace(LAYER, name="deep.bn", error=Spread(0.14, 0.1, 0.3))
    (warning,) = collect_warnings([LAYER, layer, replace(layer, error=Spread(0.12, 0.1, 0.3))], None)
    assert "2 BN layers were not measured well" in warning
    assert "deep.bn, 14%" in warning


def test_a_collapse_of_the_confidence() -> None:
    (warning,) = collect_warnings([LAYER], Effect(256, 0.4, 0.27, 0.04, 2.0))
    assert "changes 40% of the predictions on 256 inputs" in warning
    assert "from 0.27 to 0.04" in warning
    assert "judge it on labelled data" in warning


def test_predictions_on_made_up_inputs_mean_nothing() -> None:
    model, data = settled()
    result = reestimate_bn(model, data, estimator="ratio")
    collapse = Effect(256, 0.9, 0.9, 0.1, 2.0)
    assert result_warnings(replace(result, effect=collapse))
    assert not result_warnings(replace(result, effect=collapse, verdict=None))


def test_strict_stops_at_a_doubt_before_anything_is_written() -> None:
    model, data = settled(0.85)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckFailed, match=r"strict: the data is in doubt: distance .*; 1 of 1 control layer"):
        reestimate_bn(model, data, strict=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert reestimate_bn(model, data).estimator == "ratio"


def test_strict_stops_at_a_warning_and_at_nothing_else() -> None:
    model, data = settled()
    assert reestimate_bn(copy.deepcopy(model), data, strict=True).rewritten
    with torch.no_grad():
        model[4].running_var *= 9
    with pytest.raises(CheckFailed, match="beyond a factor of 5"):
        reestimate_bn(model, data, strict=True, estimator="pooled")


def test_strict_and_force_contradict_each_other() -> None:
    model, data = settled()
    with pytest.raises(UsageError, match="force goes on where strict stops"):
        reestimate_bn(model, data, strict=True, force=True)


def test_a_result_tells_itself_in_short_and_in_full() -> None:
    model, data = settled()
    result = reestimate_bn(model, data)
    assert repr(result) == "<Reestimation: 1 of 2 BN layers, pooled, 1,024 samples, data: agree>"
    summary = result.summary()
    assert summary.splitlines()[1].split() == [
        *("layer", "stored/new", "variance", "standard", "error", "mismatch", "dropout", "shift")
    ]
    assert summary.splitlines()[2].startswith("4 ")
    assert "estimator: pooled (" in summary
    assert "controls: agree" in summary
