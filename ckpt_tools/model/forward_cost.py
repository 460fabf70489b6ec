"""What a forward costs in arithmetic, whatever the machine."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ckpt_tools.model.calling import force_eager
from ckpt_tools.model.model_copy import copy_model, set_mode
from ckpt_tools.model.preserving import preserve_models

__all__ = ["count_affordable_inputs"]

# A ResNet-50 (8.2 GFLOP an image of 224×224) does 75 GFLOP a second on two cores, so this is about
# 20 seconds there. It is a number of operations and no time, so that equal runs give equal bytes.
_BUDGET = 1.5e12
_FEWEST = 48


def count_affordable_inputs(model: nn.Module, shape: tuple[int, ...], forwards: int, most: int) -> int:
    """Return how many inputs (*shape) of which each is run ``forwards`` times cost a bounded work.

    It is between 48 and ``most``, and ``most`` for a model that cannot be counted. Operations are
    counted on meta tensors. The model is left as it was.
    """
    try:
        with preserve_models(model), warnings.catch_warnings(action="ignore"), force_eager():
            twin = copy_model(model, meta=True)
            set_mode(twin, "evaluation")
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                twin(torch.zeros(2, *shape, device="meta"))
    except Exception:  # noqa: BLE001 - a model may need real values, or anything
        return most
    operations = counter.get_total_flops() / 2
    if not operations:
        return most
    return int(min(most, max(_FEWEST, _BUDGET / (operations * forwards))))
