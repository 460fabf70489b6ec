"""Figure 3: how large the first layer's gradient is while figure 4's nets train.

The trainings are those of figure 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from reproduce import figure4
from reproduce.estimates import mean, paired_difference
from reproduce.figure4 import RATES, chosen, contestants
from reproduce.pictures import COLOURS, grid, legend
from reproduce.records import Record, pair_by_seed
from reproduce.tables import of_differences, table

LEAST = 1e-12  # of a norm, for its logarithm; a diverged net's is as good as none


def logarithms(record: Record) -> list[float]:
    """log₁₀ of the gradient's norm, epoch by epoch."""
    return [math.log10(max(LEAST, norm if math.isfinite(norm) else 0.0)) for norm in record.found["gradient"]]


def level(record: Record) -> float:
    """Their mean over the training."""
    return mean(logarithms(record)).value


def section(records: Sequence[Record]) -> str:
    rows = []
    for optimizer in RATES:
        for name in contestants(records, optimizer):
            ours = chosen(records, optimizer, "ours")
            theirs = chosen(records, optimizer, name)
            levels = [
                [level(record) for record in side] for side in zip(*pair_by_seed(ours, theirs), strict=True)
            ]
            gain = paired_difference(*levels)
            cells = [mean([logarithms(record)[epoch] for record in theirs]).text() for epoch in (0, -1)]
            verdict = of_differences([gain], falls=False) if name == "He" else "–"
            compared = "–" if name == "ours" else gain.text()
            rows.append(
                [
                    optimizer,
                    name,
                    *cells,
                    mean([level(record) for record in theirs]).text(),
                    compared,
                    verdict,
                ]
            )
    head = [
        "optimizer",
        "from",
        "first epoch",
        "last epoch",
        "mean of all",
        "ours minus it",
        "ours is larger",
    ]
    return f"log₁₀ of the norm of the first layer's gradient:\n\n{table(head, rows)}"


def picture(records: Sequence[Record]) -> Figure:
    """The norm against the epoch, one line a seed."""
    figure, panels = grid(1, len(RATES), width=4.0, height=3.0)
    for panel, optimizer in zip(panels[0], RATES, strict=True):
        for name in contestants(records, optimizer):
            for number, record in enumerate(chosen(records, optimizer, name)):
                norms = [10**value for value in logarithms(record)]
                label = name if not number else None
                panel.semilogy(range(1, len(norms) + 1), norms, color=COLOURS[name], alpha=0.7, label=label)
        panel.set_title(optimizer)
        panel.set_xlabel("epoch")
    panels[0][0].set_ylabel("‖∇W¹‖")
    legend(figure, panels[0][0])
    return figure


EXPERIMENT = replace(
    figure4.EXPERIMENT,
    name="figure3",
    title="Figure 3: gradients of the VGG variant's first layer",
    paper="The corrected initialisation gives consistent gradients; from He's the first layer's vanish, "
    "for dozens of epochs.",
    section=section,
    pictures={"figure3": picture},
    records="figure4",
)
