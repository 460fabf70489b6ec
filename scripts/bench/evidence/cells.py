"""Correct a trained net in every way, and score it on the test images each time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import ckpt_tools
from bench.evidence.correction_inputs import NO_DATA, PLAIN, Batches, probe_inputs, training_inputs
from bench.evidence.cell_records import Cell, Record, Scores
from bench.evidence.image_data import ImageData
from bench.evidence.net_training import Training

AS_TRAINED, POOLED, RATIO, AUTO, PROBES = "as trained", "pooled", "ratio", "auto", "probes"
CORRECTIONS = (AS_TRAINED, POOLED, RATIO, AUTO, PROBES)


def measure(cell: Cell, training: Training, model: nn.Module, corrections: Iterable[str]) -> Record:
    """Score a net after each of the corrections."""
    data = training.load_images()
    scores: dict[str, Scores] = {}
    chosen: dict[str, str] = {}
    inputs = training_inputs(training, data)
    for correction in corrections:
        if correction == AS_TRAINED:
            scores[correction] = {NO_DATA: score(model, data)}
        elif correction == PROBES:
            probes = probe_inputs(training, data)
            scores[correction] = {name: _correct(model, data, RATIO, probes[name])[0] for name in probes}
        else:
            scores[correction] = {}
            for name, batches in _inputs_of(correction, inputs).items():
                result, estimator = _correct(model, data, correction, batches)
                scores[correction][name] = result
                if correction == AUTO:
                    chosen[name] = estimator
    return Record(cell, scores, chosen)


def _inputs_of(correction: str, inputs: Mapping[str, Batches]) -> Mapping[str, Batches | None]:
    """`pooled` needs data; what `auto` does with other inputs than these two is one of the others' columns."""
    if correction == POOLED:
        return inputs
    if correction == RATIO:
        return {**inputs, NO_DATA: None}
    return {PLAIN: inputs[PLAIN], NO_DATA: None}


def _correct(
    model: nn.Module, data: ImageData, estimator: str, batches: Batches | None
) -> tuple[tuple[float, float], str]:
    """Correct a copy of the net; return its scores and the estimator that was used."""
    corrected = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options: dict[str, Any] = {"force": True} if estimator == POOLED else {}
        if batches is None:
            options["input_shape"] = data.shape
        result = ckpt_tools.reestimate_bn(corrected, batches, estimator=estimator, **options)
    return score(corrected, data), result.estimator


def score(model: nn.Module, data: ImageData) -> tuple[float, float]:
    """Test error in percent and NLL in nats, in evaluation mode."""
    with torch.no_grad():
        logits = torch.cat([model(data.normalise(images)) for images in data.test_images.split(400)])
    wrong = (logits.argmax(1) != data.test_labels).double().mean()
    nll = F.cross_entropy(logits.double(), data.test_labels)
    return round(100 * float(wrong), 3), round(float(nll), 5)
