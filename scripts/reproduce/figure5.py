"""Figure 5: the variance of the error signal back through 20 layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ckpt_tools import activation_moments
from ckpt_tools.contract import BackwardFactor
from ckpt_tools.initialize.rule import divisor
from ckpt_tools.initialize.scheme import fill
from ckpt_tools.results import Geometry
from reproduce import signals
from reproduce.experiment import Experiment, Setup
from reproduce.initialisations import HE, OURS, XAVIER, Initialise, initialisations
from reproduce.pictures import COLOURS
from reproduce.records import Record, select, values
from reproduce.signals import Cell, MaskingDropout
from reproduce.tables import table

KEEPS = (1.0, 0.6)  # the figure's rows
WIDTHS = (500,) * 20  # appendix A gives none
INVERTED, PAPERS = "ours, E[f′²]/p", "ours, p·E[f′²], PyTorch's dropout"
MASKING, SCALING = (OURS, XAVIER, HE), (PAPERS, INVERTED)
BACKWARD_COLOURS = {**COLOURS, INVERTED: "#8c6bb1", PAPERS: "#e08a2e"}


def backward_alone(keep: float, factor: BackwardFactor) -> Initialise:
    """The unit hypersphere divided by the backward term of a ReLU alone."""
    scale = divisor(
        0.0, 1.0, next_slope=activation_moments(torch.relu).backward, next_keep=keep, backward_factor=factor
    )

    def initialise(model: nn.Module, batch: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                fill(layer.weight, Geometry(), "hypersphere", generator, divisor=scale)
                nn.init.zeros_(layer.bias)

    return initialise


def plan(setup: Setup, records: Sequence[Record]) -> list[Cell]:
    return [
        Cell(keep, name, seed)
        for keep in KEEPS
        for name in (*MASKING, *SCALING)
        for seed in range(setup.seeds)
    ]


def run(cell: Cell, setup: Setup) -> dict[str, Any]:
    name = cell.initialisation
    model = signals.net(cell.keep, MaskingDropout if name in MASKING else nn.Dropout, WIDTHS)
    if name in (XAVIER, HE):
        initialise = initialisations()[name]
    else:
        initialise = backward_alone(cell.keep, "inverted" if name == INVERTED else "paper")
    return {"backward": signals.measure_spread(model, initialise, cell.seed)["backward"]}


def claim(initialisation: str) -> str:
    """What the caption and appendix A say, of dropout whose backward only masks."""
    return "vanishes" if initialisation == XAVIER else "stable"


def section(records: Sequence[Record]) -> str:
    rows = []
    for keep in dict.fromkeys(record.cell.keep for record in records):
        for name in (*MASKING, *SCALING):
            ends = [line[0] for line in values(select(records, keep=keep, initialisation=name), "backward")]
            if not ends:
                continue
            claimed = claim(name) if name != INVERTED else "—"
            verdict = "no claim" if claimed == "—" else signals.verdict(claimed, signals.geometric(ends))
            backward = "only masks" if name in MASKING else "PyTorch's, scales by 1/p"
            rows.append([f"{keep:g}", name, backward, signals.spread(ends), claimed, verdict])
    head = ["keep", "initialisation", "backward of dropout", "Var(δ) of layer 1 / fed in", "paper", "verdict"]
    note = (
        "Appendix A gives no widths; all layers have 500 neurons here, for the correction says nothing of "
        "fan-out / fan-in: where a layer narrows to half, errors lose a factor of 2 on the hypersphere. "
        "The paper's p·E[f′²] belongs to a backward pass that masks without dividing by p; "
        "with PyTorch's dropout the factor is E[f′²]/p."
    )
    return "\n\n".join([signals.rule(), table(head, rows), note])


def picture(records: Sequence[Record]) -> Figure:
    return signals.picture(records, "backward", "Var(δ) / fed in", BACKWARD_COLOURS)


EXPERIMENT = Experiment(
    name="figure5",
    title="Figure 5: the error signal back through 20 ReLU layers",
    paper=(
        "N(0, 0.01²) fed in at the end, zeros included. Ours is the unit hypersphere with the "
        "backward correction alone."
    ),
    cell=Cell,
    plan=plan,
    run=run,
    section=section,
    pictures={"figure5": picture},
)
