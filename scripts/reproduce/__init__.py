"""Repeat the tables and figures of the paper, one experiment each.

Hendrycks & Gimpel 2016, Adjusting for Dropout Variance in Batch Normalization and Weight
Initialization.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reproduce.experiment import Experiment

EXPERIMENTS = (
    "table1",
    "figure1",
    "figure5",
    "figure2",
    "figure3",
    "figure4",
    "table2",
)  # in the order of RESULTS.md, a module each


def find(name: str) -> Experiment:
    """The experiment in the module of this name."""
    experiment: Experiment = import_module(f"reproduce.{name}").EXPERIMENT
    return experiment
