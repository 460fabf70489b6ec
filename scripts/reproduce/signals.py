"""The nets of Figures 1 and 5, and how their signals spread: 20 ReLU layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ckpt_tools.initialize.verify import measure_signals
from reproduce.estimates import mean
from reproduce.initialisations import Initialise
from reproduce.pictures import grid, legend
from reproduce.records import Record, select, values
from reproduce.tables import Verdict

WIDTHS = (500,) * 15 + (250,) * 5  # of Figure 1
SAMPLES = 200
STABLE = (0.5, 2.0)  # of what it was; beyond 10 or below 0.1 of it is a blow-up or a decay
EXPLODES, VANISHES = 10.0, 0.1


@dataclass(frozen=True)
class Cell:
    """One net, freshly initialised."""

    keep: float
    initialisation: str
    seed: int


class OnlyMasks(torch.autograd.Function):
    """Identity whose backward multiplies with p.

    Behind inverted dropout, errors are then masked and not scaled.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: float) -> Tensor:
        ctx.keep = keep
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, None]:
        return errors[0] * ctx.keep, None


class MaskingDropout(nn.Dropout):
    """Inverted dropout in the forward, a mask without 1/p in the backward.

    Section 2.1.2 of the paper assumes this.
    """

    def forward(self, input: Tensor) -> Tensor:
        masked: Tensor = OnlyMasks.apply(super().forward(input), 1 - self.p)
        return masked


def net(keep: float, dropout: type[nn.Dropout] = nn.Dropout, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """Dropout behind every ReLU; the last layer's z is the output."""
    layers: list[nn.Module] = []
    inputs = widths[0]
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU(), dropout(1 - keep)]
        inputs = width
    return nn.Sequential(*layers[:-2])


def measure_spread(model: nn.Module, initialise: Initialise, seed: int) -> dict[str, Any]:
    """Return Var(z) and Var(δ) of every layer, in the order of execution.

    Var(δ) is in units of what is fed in at the end.
    """
    torch.manual_seed(seed)
    batch = torch.randn(SAMPLES, WIDTHS[0])
    initialise(model, batch[:2], seed)
    layers = measure_signals(model, [batch], seed=seed)
    return {
        "forward": [_short(layer.variance) for layer in layers],
        "backward": [_short(layer.error_variance or 0.0) for layer in layers],
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def verdict(claim: str, end: float) -> Verdict:
    """Judge a claim ("stable", "explodes", "vanishes") by the variance at the far end.

    A change of less than tenfold counts as the same direction.
    """
    if claim == "stable":
        return Verdict.REPRODUCED if STABLE[0] <= end <= STABLE[1] else Verdict.NOT
    grows = claim == "explodes"
    if (end > EXPLODES) if grows else (end < VANISHES):
        return Verdict.REPRODUCED
    moved = end > STABLE[1] if grows else end < STABLE[0]
    return Verdict.DIRECTION if moved else Verdict.NOT


def geometric(ends: Sequence[float]) -> float:
    """The geometric mean over seeds: variances of deep nets scatter by factors."""
    return math.exp(mean([math.log(end) for end in ends]).value)


def rule() -> str:
    """The verdicts' legend."""
    return (
        "Geometric means over the seeds, × or ÷ e^(standard error of the logarithm). "
        f"Stable: between {STABLE[0]:g} and {STABLE[1]:g}; "
        f"explodes: above {EXPLODES:g}; vanishes: below {VANISHES:g}; same "
        f"direction: less than that."
    )


def spread(ends: Sequence[float]) -> str:
    """ "1.05 ×÷ 1.02"."""
    estimate = mean([math.log(end) for end in ends])
    error = "" if math.isnan(estimate.error) else f" ×÷ {math.exp(estimate.error):.2f}"
    return f"{math.exp(estimate.value):.3g}{error}"


def picture(records: Sequence[Record], side: str, label: str, colours: dict[str, str]) -> Figure:
    """Draw variance against depth on a logarithmic axis.

    There is a panel for each keep probability, and a thin line for each seed.
    """
    keeps = list(dict.fromkeys(record.cell.keep for record in records))
    figure, panels = grid(1, len(keeps))
    for keep, panel in zip(keeps, panels[0], strict=True):
        for name, colour in colours.items():
            lines = values(select(records, keep=keep, initialisation=name), side)
            for number, line in enumerate(lines):
                label_once = name if number == 0 else None
                panel.plot(
                    range(1, len(line) + 1), line, color=colour, linewidth=0.8, alpha=0.7, label=label_once
                )
        panel.set_title(f"keep {keep:g}")
        panel.set_yscale("log")
        panel.set_xlabel("layer")
    panels[0][0].set_ylabel(label)
    legend(figure, panels[0][0])
    return figure
