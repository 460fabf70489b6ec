"""State dicts whose BatchNorm went away in quantisation."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["missing_batch_norm"]

# What the converters leave in the keys, the most specific first. One hit is an accident, unless the name is unique.
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
    """One sentence if a state dict's keys show a quantised model without running variances, else None."""
    names = list(keys)
    if any(name.endswith("running_var") for name in names):
        return None
    for pattern, least, what in _MARKS:
        found = [name for name in names if pattern.search(name)]
        if len(found) >= least:
            return (
                f"a quantised model without BatchNorm statistics ({found[0]}: {what}): quantisation folds BatchNorm "
                "into the layers before it. Give the checkpoint that was quantised."
            )
    return None
