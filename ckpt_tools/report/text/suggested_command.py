"""The ``bn-reestimate`` command that ``inspect`` suggests for a file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from ckpt_tools.data.preprocessing import Preprocessing
from ckpt_tools.jobs.inspection import Inspection


def reestimate_command(inspection: Inspection, *method: str) -> str:
    """Return the ``bn-reestimate`` command for this file, with the options of ``inspect``.

    DATA stands for the training data, which the user has to name if ``inspect`` was given none.
    ``method`` are further options.
    """
    # The options of this command repeat what `inspect` needed to recognise and read the file.
    request = inspection.request
    command = ["ckpt-fix", "bn-reestimate", str(request.checkpoint), "--data", request.data or "DATA"]
    if request.model.architecture is not None:
        command += ["--arch", request.model.architecture]
    for name, value in request.model.model_kwargs.items():
        command += ["--model-kwargs", f"{name}={value}"]
    for name, rate in request.model.dropout.items():
        command += ["--dropout", f"{name}={rate}"]
    if request.model.weights != "auto":
        command += ["--weights", request.model.weights]
    command += _preprocessing_options(request.preprocessing)
    if request.model.trust:
        command.append("--trust")
    return shlex.join([*command, *method])


def _preprocessing_options(options: Preprocessing) -> Iterator[str]:
    """Yield the options that the user gave, each with its value."""
    for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        value = getattr(options, name)
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            yield from (f"--{name.replace('_', '-')}", text)
