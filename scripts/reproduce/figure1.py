"""Figure 1: the variance of z through 20 layers, by initialisation and keep probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from reproduce import signals
from reproduce.experiment import Experiment, Setup
from reproduce.initialisations import HE, OURS, XAVIER, initialisations
from reproduce.pictures import COLOURS
from reproduce.records import Record, select, values
from reproduce.signals import Cell
from reproduce.tables import table

KEEPS = (1.0, 0.8, 0.6, 0.5)
INITIALISATIONS = initialisations(backward_term="off")


def plan(setup: Setup, records: Sequence[Record]) -> list[Cell]:
    keeps = KEEPS[::2] if setup.quick else KEEPS
    return [
        Cell(keep, name, seed) for keep in keeps for name in INITIALISATIONS for seed in range(setup.seeds)
    ]


def run(cell: Cell, setup: Setup) -> dict[str, Any]:
    model = signals.net(cell.keep)
    return {
        "forward": signals.measure_spread(model, INITIALISATIONS[cell.initialisation], cell.seed)["forward"]
    }


def claim(keep: float, initialisation: str) -> str:
    """What the caption and section 2.1.1 say."""
    if initialisation == XAVIER:
        return "vanishes"
    return "explodes" if initialisation == HE and keep < 1 else "stable"


def section(records: Sequence[Record]) -> str:
    rows = []
    for keep in dict.fromkeys(record.cell.keep for record in records):
        for name in INITIALISATIONS:
            ends = [line[-1] for line in values(select(records, keep=keep, initialisation=name), "forward")]
            if ends:
                claimed = claim(keep, name)
                rows.append(
                    [
                        f"{keep:g}",
                        name,
                        signals.spread(ends),
                        claimed,
                        signals.verdict(claimed, signals.geometric(ends)),
                    ]
                )
    note = "Xavier's factor a layer is 0.5/p for a ReLU: at keep 0.5 it happens to be right."
    return "\n\n".join(
        [
            signals.rule(),
            table(["keep", "initialisation", "Var(z) of layer 20", "paper", "verdict"], rows),
            note,
        ]
    )


def picture(records: Sequence[Record]) -> Figure:
    return signals.picture(records, "forward", "Var(z)", {name: COLOURS[name] for name in (OURS, XAVIER, HE)})


EXPERIMENT = Experiment(
    name="figure1",
    title="Figure 1: the forward variance through 20 ReLU layers",
    paper="N(0, 1) input, dropout on. Ours is the unit hypersphere with the forward correction alone.",
    cell=Cell,
    plan=plan,
    run=run,
    section=section,
    pictures={"figure1": picture},
)
