"""Table 1: E[f(z)²] and E[f'(z)²] of five nonlinearities, by quadrature and by drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ckpt_tools import activation_moments
from reproduce.estimates import mean
from reproduce.experiment import Experiment, Setup
from reproduce.records import Record, distinct, select, values
from reproduce.tables import of_number, table

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda z: z,
    "ReLU": torch.relu,
    "GELU": F.gelu,
    "tanh": torch.tanh,
    "ELU": F.elu,
}
PRINTED = {
    "Identity": ("1", "1"),
    "ReLU": ("0.5", "0.5"),
    "GELU": ("0.425", "0.444"),
    "tanh": ("0.394", "0.216"),
    "ELU": ("0.645", "0.671"),
}
SIDES = ("forward", "backward")  # E[f²], E[f'²]


@dataclass(frozen=True)
class Cell:
    """One nonlinearity, ``draws`` standard normal numbers of this seed."""

    activation: str
    draws: int
    seed: int


def plan(setup: Setup, records: Sequence[Record]) -> list[Cell]:
    draws = 10_000 if setup.quick else 1_000_000
    return [Cell(activation, draws, seed) for activation in ACTIVATIONS for seed in range(setup.seeds)]


def run(cell: Cell, setup: Setup) -> dict[str, Any]:
    f = ACTIVATIONS[cell.activation]
    exact = activation_moments(f)
    generator = torch.Generator().manual_seed(cell.seed)
    z = torch.randn(cell.draws, generator=generator, dtype=torch.float64).to(setup.device).requires_grad_()
    value = f(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    drawn = {"forward": float(value.detach().square().mean()), "backward": float(slope.square().mean())}
    return {"quadrature": {side: getattr(exact, side) for side in SIDES}, "drawn": drawn}


def section(records: Sequence[Record]) -> str:
    rows = []
    for activation in distinct(records, lambda record: record.cell.activation):
        of_one = select(records, activation=activation)
        for side, symbol, printed in zip(SIDES, ("E[f²]", "E[f′²]"), PRINTED[activation], strict=True):
            exact = values(of_one, "quadrature")[0][side]
            drawn = mean([drawn[side] for drawn in values(of_one, "drawn")])
            rows.append(
                [activation, symbol, f"{exact:.4f}", drawn.text(4), printed, of_number(exact, printed)]
            )
    head = ["f", "", "quadrature", f"Monte Carlo, {records[0].cell.draws:,} draws a seed", "paper", "verdict"]
    return table(head, rows)


EXPERIMENT = Experiment(
    name="table1",
    title="Table 1: moments of five nonlinearities",
    paper="E[f(z)²] and E[f′(z)²] for z ~ N(0, 1), what the initialisation divides by; "
    "the paper calls them estimates.",
    cell=Cell,
    plan=plan,
    run=run,
    section=section,
)
