"""What the user asks of a re-estimation, in groups that other jobs share, and a digest of the
settings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt_tools.contract import LoadedModel
from ckpt_tools.data.label_files import read_label_file
from ckpt_tools.data.labels import read_class_map
from ckpt_tools.data.preprocessing import Preprocessing
from ckpt_tools.location import Location
from ckpt_tools.method import Method
from ckpt_tools.redaction import without_secrets
from ckpt_tools.urls import is_url, redact_url
from ckpt_tools.walker.declared_dropout import resolve_declared_dropout


@dataclass(frozen=True)
class ModelChoice:
    """Which weights of a checkpoint are meant, and which architecture they belong to.

    ``architecture`` None leaves it to the checkpoint. ``trust``: load a pickle that needs code.
    ``dropout``: rates of dropout that the training had and the architecture lacks, by patterns of
    names of modules.
    """

    architecture: str | None = None
    model_kwargs: Mapping[str, object] = field(default_factory=dict)
    weights: str = "auto"
    trust: bool = False
    dropout: Mapping[str, float] = field(default_factory=dict)

    def declare_dropout(self, loaded: LoadedModel) -> LoadedModel:
        """Return the loaded model with the dropout that the user declares. Raises UsageError."""
        resolve_declared_dropout(loaded.model, self.dropout)
        return replace(loaded, dropout=self.dropout)


@dataclass(frozen=True)
class ReadingOptions:
    """Which samples are read, where the model runs, and how fast the samples get there.

    ``limit`` None: all samples. ``device`` "auto": CUDA if there is one, else the CPU.
    ``batch_size`` None: as large as memory allows, up to 512. ``workers`` None: one a core, up to
    8.
    """

    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    batch_size: int | None = None
    workers: int | None = None


@dataclass(frozen=True)
class EvaluationOptions:
    """What is asked of labelled data: which class every image is, and which output each class; a
    temperature, a gate.
    """

    class_map: Location | None = None
    labels: Location | None = None
    calibrate: bool = False
    gate: str | None = None


@dataclass(frozen=True)
class Request:
    """Everything the user asks of a re-estimation.

    ``data`` None: made-up inputs. ``output`` None: NAME.bn.safetensors beside the checkpoint.
    ``eval_data``: labelled data, to judge the model on before and after. ``deterministic``: on
    CUDA, take only kernels that give the same bits every time. ``again``: correct a file that is a
    corrected one already. ``dry_run``: measure and judge, but write nothing.
    """

    checkpoint: Location
    data: str | None = None
    output: Location | None = None
    model: ModelChoice = field(default_factory=ModelChoice)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    method: Method = field(default_factory=Method)
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    deterministic: bool = False
    overwrite: bool = False
    again: bool = False
    eval_data: str | None = None
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    dry_run: bool = False

    def settings_digest(self) -> str:
        """A digest of all that decides the result, except for the checkpoint: equal for equal
        results.

        Data counts by its place, a class map and a label file by their contents. Raises DataError if
        one cannot be read.
        """
        class_map, labels = self.evaluation.class_map, self.evaluation.labels
        # Outputs of earlier versions hold this digest: flat names, whatever the groups are.
        settings = {
            **vars(self.model),
            **vars(self.method),
            **vars(self.reading),
            **vars(self.evaluation),
            "preprocessing": self.preprocessing,
            "crop_mode": self.preprocessing.crop_mode,
            "data": self.data and _normalise_place(self.data),
            "eval_data": self.eval_data and _normalise_place(self.eval_data),
            "labels": labels and (read_label_file(labels).names, read_label_file(labels).labels),
            "class_map": class_map and _read_class_outputs(class_map),
        }
        decisive = {name: value for name, value in settings.items() if name not in _WITHOUT_EFFECT}
        for name in _YOUNGER_SETTINGS:
            # Where they are not given, the digest is that of outputs which do not know them.
            if not decisive[name]:
                del decisive[name]
        text = without_secrets(json.dumps(decisive, sort_keys=True, default=repr))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _normalise_place(data: str) -> str:
    """The same text for every way to name a file or folder."""
    if Path(data).exists():
        return os.path.abspath(data)  # noqa: PTH100 - without ..
    return redact_url(data) if is_url(data) else data


def _read_class_outputs(location: Location) -> object:
    class_map = read_class_map(location)
    return sorted(class_map.numbers.items()), class_map.outputs


# What a result does not depend on. How a convolution is computed may change its last bits, and no
# more.
_WITHOUT_EFFECT = frozenset({"trust", "device", "compile", "workers", "force", "strict"})
_YOUNGER_SETTINGS = ("only", "keep", "crop_mode", "labels", "dropout", "rows_are_samples")
