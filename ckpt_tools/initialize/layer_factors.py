"""The factors of every weight's divisor: what feeds the layer, and what follows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ckpt_tools.contract import BackwardFactor, BackwardTerm, InitRule, Scheme
from ckpt_tools.initialize.constants import Constants
from ckpt_tools.initialize.followers import Follower, find_follower
from ckpt_tools.initialize.init_results import Factors
from ckpt_tools.initialize.paper_rule import PaperRule
from ckpt_tools.initialize.rule import divisor, fan_ratio
from ckpt_tools.initialize.scheme import fans
from ckpt_tools.initialize.state import State
from ckpt_tools.walker.graph import Graph
from ckpt_tools.walker.weights import WeightUse

# Two uses of a weight are enough. Averaging over all would carry the state of a recurrent net
# through every step, so that its divisor would depend on the length of the sequence.
MAX_USES = 2
# E[x²] below this is that of a layer behind a scale that starts at zero.
ZERO_INPUT = 1e-12


@dataclass(frozen=True)
class InitMethod:
    """How an init rewrite computes and draws weights; `rewrite_init` explains the settings."""

    scheme: Scheme
    rule: InitRule
    backward_term: BackwardTerm
    backward_factor: BackwardFactor

    def has_backward_term(self, use: WeightUse) -> bool:
        """Whether the divisor of this weight has the backward term.

        "auto" has it where the paper has it: for linear layers under the paper's rule.
        """
        if self.backward_term == "auto":
            return use.geometry.kind == "linear" and self.rule == "paper"
        return self.backward_term == "on"

    def fan_ratio(self, use: WeightUse) -> float:
        """The weight of the backward term.

        `ckpt_tools.initialize.rule.fan_ratio` explains it.
        """
        return fan_ratio(self.scheme, *fans(use.view.shape, use.geometry))


def compute_factors(
    graph: Graph, constants: Constants, uses: Sequence[WeightUse], method: InitMethod
) -> dict[str, Factors]:
    """The factors of every weight by the paper's rule, by parameter, in order of execution."""
    paper_rule = PaperRule(graph, constants, uses)
    inputs = paper_rule.weight_inputs()
    followers = {
        use.node: find_follower(paper_rule, use.node) for use in uses if method.has_backward_term(use)
    }
    factors = {}
    for name, uses_of_weight in _group_by_parameter(uses).items():
        chosen = uses_of_weight[:MAX_USES]
        factors[name] = _combine_uses(
            [inputs[use.node] for use in chosen],
            [followers[use.node] for use in chosen if use.node in followers],
            method.fan_ratio(chosen[0]),
            method.backward_factor,
        )
    return factors


def _group_by_parameter(uses: Iterable[WeightUse]) -> dict[str, list[WeightUse]]:
    groups: dict[str, list[WeightUse]] = {}
    for use in uses:
        groups.setdefault(use.parameter, []).append(use)
    return groups


def _combine_uses(
    inputs: Sequence[State],
    followers: Sequence[Follower],
    ratio: float,
    backward_factor: BackwardFactor,
) -> Factors:
    second = sum(state.signal.second for state in inputs) / len(inputs)
    without_dropout = sum(state.signal.second * state.signal.keep for state in inputs) / len(inputs)
    activation = _join_names(state.activation for state in inputs)
    if second < ZERO_INPUT:
        # Nothing reaches the layer yet, so it gets the weights of one with standardised input.
        factors = Factors(f"{activation}, nothing yet", 1.0, 1.0)
    else:
        factors = Factors(activation, without_dropout, min(1.0, without_dropout / second))
    if followers:
        factors = replace(
            factors,
            next_activation=_join_names(follower.activation for follower in followers),
            next_slope=sum(follower.slope for follower in followers) / len(followers),
            next_keep=sum(follower.keep for follower in followers) / len(followers),
        )
    value = divisor(
        factors.second_moment,
        factors.keep,
        next_slope=factors.next_slope,
        next_keep=factors.next_keep,
        backward_factor=backward_factor,
        fan_ratio=ratio,
    )
    return replace(factors, divisor=value)


def _join_names(names: Iterable[str]) -> str:
    return " | ".join(list(dict.fromkeys(names))[:3])
