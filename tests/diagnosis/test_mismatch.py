"""The distance of data from the stored statistics, and whether data or weights have changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ckpt_tools
from ckpt_tools.diagnosis.mismatch import LayerMismatch, judge_mismatch, trail_behind_weights


def make_layer(shift: float, log_variance: float, error: float = 0.0) -> LayerMismatch:
    """A layer of eight channels that all differ alike."""
    channels = torch.ones(8, dtype=torch.float64)
    return LayerMismatch("bn", log_variance * channels, error * channels, shift * channels, error * channels)


def test_the_verdict_is_the_root_mean_square_distance():
    layers = [make_layer(0.03, 0.04 * 2**0.5), make_layer(0.0, 0.0)]
    verdict = judge_mismatch(layers, images=512)
    assert verdict.level == "doubt"
    assert verdict.score == pytest.approx((0.05**2 / 2) ** 0.5)
    assert judge_mismatch([make_layer(0.01, 0.01)], images=512).level == "agree"
    assert judge_mismatch([make_layer(0.1, 0.1, error=0.1)], images=512).level == "agree"
    assert judge_mismatch([], images=512).level == judge_mismatch(layers, images=16).level == "none"


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ((0.0, 0.04), (0.08, 0.08), True),
        ((0.1, 0.04), (0.08, 0.08), False),  # other brightness
        ((0.0, 0.20), (0.08, 0.08), False),  # other contrast, as after mixup
        ((0.0, 0.04), (0.0, 0.20), False),  # some of the classes
        ((0.0, 0.04), None, False),
    ],
)
def test_statistics_that_trail_behind_are_told_from_other_data(first, later, expected):
    layers = [make_layer(*first), *([make_layer(*later)] * 3 if later else [])]
    assert trail_behind_weights(layers) is expected
    reason = judge_mismatch(layers, images=512).reason
    assert ("trail behind the weights" in reason) is expected


@pytest.mark.parametrize("kind", ["weights", "images"])
def test_auto_takes_the_paper_s_estimate_where_the_weights_have_moved(kind):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4, 5),
    )  # fmt: skip
    batches = list(torch.randn(512, 3, 8, 8).split(64))
    with torch.no_grad():
        for batch in batches * 30:
            model(batch)
        if kind == "weights":
            for index in (4, 8):
                weight = model[index].weight
                weight += 0.3 * weight.std() * torch.randn_like(weight)
        else:
            batches = [1.5 * batch for batch in batches]
    result = ckpt_tools.reestimate_bn(model.eval(), batches)
    assert result.verdict is not None
    assert result.verdict.level == "doubt"
    assert result.estimator == ("pooled" if kind == "weights" else "ratio")
    assert ("the weights have moved, not the data" in result.estimator_reason) == (kind == "weights")
