"""Recognising state dicts whose BatchNorm layers quantisation has folded away."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["missing_batch_norm"]

# What converters leave in the keys, the most specific first, how many keys must have it, and a name
# for it. One key may have a common name by accident.
_MARKS = (
    (re.compile(r"(^|\.)_packed_params(\.|$)"), 1, "PyTorch's quantised layers (_packed_params)"),
    (
        re.compile(r"\.(quant_map|absmax|nested_absmax|quant_state\.bitsandbytes__\w+|SCB)$"),
        1,
        "bitsandbytes",
    ),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), 2, "GPTQ or AWQ"),
    (
        re.compile(r"\.(weight_scale(_inv)?|input_scale|weight_packed|_data|_scale)$"),
        2,
        "float8 or packed weights",
    ),
    (
        re.compile(r"(^|\.)(zero_point|weight_zero_point|activation_post_process\.\w+)$"),
        1,
        "quantisation parameters",
    ),
)


def missing_batch_norm(keys: Iterable[str]) -> str | None:
    """Return a sentence about the quantised model that a state dict's keys show.

    This is None for a state dict with running variances, and for one whose keys show no
    quantisation.
    """
    names = list(keys)
    if any(name.endswith("running_var") for name in names):
        return None
    for pattern, least, method in _MARKS:
        matches = [name for name in names if pattern.search(name)]
        if len(matches) >= least:
            return (
                f"a quantised model without BatchNorm statistics ({matches[0]}: {method}): "
                "quantisation folds BatchNorm into the layers before it. Give the checkpoint "
                "that was quantised."
            )
    return None
