"""What the user asks of a re-estimation, and the digest that tells equal wishes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_tools.contract import (
    Estimator,
    LayerChoice,
    Precision,
    Statistics,
)
from ckpt_tools.data.labels import read_class_map
from ckpt_tools.data.preprocessing import Preprocessing
from ckpt_tools.location import Location
from ckpt_tools.redaction import without_secrets
from ckpt_tools.urls import is_url, redact_url


@dataclass(frozen=True)
class Request:
    """Everything the user asks for. ``batch_size`` None: as large as memory allows, up to 512."""

    checkpoint: Location
    data: str
    output: Location | None = None
    architecture: str | None = None
    model_kwargs: Mapping[str, object] = field(default_factory=dict)
    weights: str = "auto"
    trust: bool = False
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    estimator: Estimator = "pooled"
    layers: LayerChoice = "auto"
    statistics: Statistics = "variance"
    tolerance: float | None = None
    momentum: float = 0.1
    epochs: int = 1
    limit: int | None = None
    seed: int = 0
    precision: Precision = "fp32"
    compile: bool = False
    deterministic: bool = False  # on CUDA
    keep_outliers: bool = False
    device: str = "auto"  # CUDA if there is one, else the CPU
    batch_size: int | None = None
    workers: int | None = None
    overwrite: bool = False
    force: bool = False
    eval_data: str | None = None  # labelled, to judge the model on before and after
    class_map: Location | None = None
    calibrate: bool = False
    gate: str | None = None

    def settings_digest(self) -> str:
        """A digest of all that decides what comes out, but for the checkpoint: equal for equal results.

        Of the data it tells the place, of a class map the content. Raises DataError if that cannot be read.
        """
        said = {name: value for name, value in vars(self).items() if name not in _BESIDE}
        said["data"] = _place(self.data)
        said["eval_data"] = self.eval_data and _place(self.eval_data)
        said["class_map"] = self.class_map and _outputs(self.class_map)
        text = without_secrets(json.dumps(said, sort_keys=True, default=repr))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _place(data: str) -> str:
    """The same for every way to name it."""
    if Path(data).exists():
        return os.path.abspath(data)  # noqa: PTH100 - without ..
    return redact_url(data) if is_url(data) else data


def _outputs(class_map: Location) -> object:
    found = read_class_map(class_map)
    return sorted(found.numbers.items()), found.outputs


# What a result does not depend on; how a convolution is computed may change its last bits.
_BESIDE = frozenset(
    {"checkpoint", "output", "trust", "device", "compile", "deterministic", "workers", "overwrite", "force"}
)
