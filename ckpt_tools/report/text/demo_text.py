"""The result of ``demo`` as text for a terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ckpt_tools.demo.train import DemoResult, Score
from ckpt_tools.report.columns import align_columns


def demo_text(results: Sequence[DemoResult]) -> str:
    """Return every network's test error and NLL as trained and corrected, and the mean changes."""
    rows: list[tuple[str, ...]] = [
        ("network", "test error before", "after", "without data", "NLL before", "after", "without data")
    ]
    for number, result in enumerate(results):
        scores = (result.before, result.after, result.without_data)
        errors, nlls = (f"{score.error:.2f} %" for score in scores), (f"{score.nll:.3f}" for score in scores)
        rows.append((str(number), *errors, *nlls))
    after = _mean_changes([(result.before, result.after) for result in results])
    alone = _mean_changes([(result.before, result.without_data) for result in results])
    return f"{align_columns(rows)}\n\nwith the training data: {after}\nwithout any data:       {alone}"


def _mean_changes(pairs: Sequence[tuple[Score, Score]]) -> str:
    error_change = _mean([after.error - before.error for before, after in pairs], 2)
    nll_change = _mean([after.nll - before.nll for before, after in pairs], 3)
    return f"change of test error: {error_change} points; of NLL: {nll_change} nats"


def _mean(values: Sequence[float], digits: int) -> str:
    """Return the mean with its standard error, which a single value does not have."""
    mean = f"{statistics.fmean(values):+.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"
