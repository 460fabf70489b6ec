"""Correct a trained net in every way, and score it on the test images each time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import ckpt_tools
from bench.evidence.cell_records import Cell, Measurement, Record, Way
from bench.evidence.correction_inputs import (
    AS_IN_TRAINING,
    NO_DATA,
    PLAIN,
    POOR_INPUTS,
    PROBES,
    Batches,
    probe_inputs,
    training_inputs,
)
from bench.evidence.image_data import ImageData
from bench.evidence.net_training import Training
from bench.evidence.wrong_images import WRONG_INPUTS
from ckpt_tools import Walk
from ckpt_tools.errors import CheckFailed

AS_TRAINED, POOLED, RATIO, AUTO, PROBE = "as trained", "pooled", "ratio", "auto", "probe"
BASE: Way = (AS_TRAINED, NO_DATA)
IDEAL: Way = (POOLED, AS_IN_TRAINING)
# What the bars of the summary need, then what completes the tables, then random inputs of other kinds.
WAYS: dict[str, tuple[Way, ...]] = {
    "bars": (BASE, IDEAL, (POOLED, PLAIN), (AUTO, PLAIN), (AUTO, NO_DATA)),
    "inputs": (
        (RATIO, PLAIN),
        (RATIO, NO_DATA),
        *((correction, inputs) for inputs in POOR_INPUTS for correction in (POOLED, RATIO)),
        (RATIO, AS_IN_TRAINING),
    ),
    "wrong": tuple((RATIO, name) for name in WRONG_INPUTS),
    "probes": tuple((PROBE, name) for name in PROBES),
}
REFUSED = "refused"  # `auto` may refuse the data; the net stays as it was trained


def measure(cell: Cell, training: Training, model: nn.Module, ways: Sequence[Way]) -> Record:
    """Score a net after each of the corrections."""
    data = training.load_images()
    inputs: dict[str, Batches | None] = {NO_DATA: None, **training_inputs(training, data)}
    inputs |= probe_inputs(training, data)
    walk = ckpt_tools.walk(model, torch.zeros(2, *data.shape))
    return Record(
        cell, {way: _measure_way(way, model, data, inputs[way[1]], walk) for way in ways if way[1] in inputs}
    )


def _measure_way(
    way: Way, model: nn.Module, data: ImageData, batches: Batches | None, walk: Walk
) -> Measurement:
    if way == BASE:
        return Measurement(*score(model, data))
    corrected = copy.deepcopy(model)
    options: dict[str, Any] = {"walk": walk}
    if way[0] == POOLED:
        options["force"] = True
    if batches is None:
        options["input_shape"] = data.shape
    estimator = RATIO if way[0] == PROBE else way[0]
    try:
        result = ckpt_tools.reestimate_bn(corrected, batches, estimator=estimator, **options)
    except CheckFailed:
        return Measurement(*score(model, data), REFUSED)
    distance = None if result.verdict is None else result.verdict.score
    return Measurement(*score(corrected, data), result.estimator, distance)


def score(model: nn.Module, data: ImageData) -> tuple[float, float]:
    """Test error in percent and NLL in nats, in evaluation mode."""
    with torch.no_grad():
        logits = torch.cat([model(data.normalise(images)) for images in data.test_images.split(100)])
    wrong = (logits.argmax(1) != data.test_labels).double().mean()
    nll = F.cross_entropy(logits.double(), data.test_labels)
    return 100 * float(wrong), float(nll)
